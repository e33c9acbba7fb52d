"""Norms, maps, feed-forward, embedding, output and residual layouts against their formulas in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from formery.parts import (
    MLP,
    Context,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    Output,
    Parallel,
    Part,
    PostNorm,
    PreNorm,
    RMSNorm,
    Sandwich,
    TiedOutput,
)

CONTEXT = Context(torch.arange(5).expand(3, 5), even=True)


def random(part: Part) -> Part:
    """The part in float64, nothing left at a neutral starting value."""
    for parameter in part.double().parameters():
        nn.init.normal_(parameter)
    return part


def vectors(width: int = 6) -> Tensor:
    return torch.randn(3, 5, width, dtype=torch.float64) * 3 + 1


@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias: bool) -> None:
    part, x = random(Linear(6, 4, bias)), vectors()
    y = torch.einsum("oi,bti->bto", part.weight, x)
    torch.testing.assert_close(part(x), y + part.shift if bias else y)
    assert part.bias is bias


@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_linear_starts_with_the_deviation_it_names(gain: float) -> None:
    weight = Linear(400, 300, gain=gain).weight.detach()
    assert float(weight.std()) == pytest.approx(gain / 400**0.5, rel=0.02)
    assert float(weight.mean()) == pytest.approx(0, abs=gain * 1e-3)
    y = torch.randn(200, 400) @ weight.T
    assert float(y.std()) == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(bias: bool) -> None:
    part, x = random(LayerNorm(6, 0.01, bias)), vectors()
    mean = x.sum(-1, keepdim=True) / 6
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / 6
    y = (x - mean) / (variance + 0.01) ** 0.5 * part.weight
    torch.testing.assert_close(part(x), y + part.shift if bias else y)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset: float) -> None:
    part, x = random(RMSNorm(6, 0.01, offset)), vectors()
    y = x / ((x**2).sum(-1, keepdim=True) / 6 + 0.01) ** 0.5 * (offset + part.weight)
    torch.testing.assert_close(part(x), y)
    fresh = RMSNorm(6, offset=offset).double()(x)
    torch.testing.assert_close(fresh.square().mean(-1), torch.ones(3, 5, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_mlp(bias: bool) -> None:
    part, x = random(MLP(6, 10, "relu2", bias)), vectors()
    inner = torch.einsum("oi,bti->bto", part.up.weight, x) + (part.up.shift if bias else 0)
    y = torch.einsum("oi,bti->bto", part.down.weight, inner.clamp(min=0) ** 2) + (part.down.shift if bias else 0)
    torch.testing.assert_close(part(x, CONTEXT), y)


@pytest.mark.parametrize("bias", [True, False])
def test_gated_mlp(bias: bool) -> None:
    part, x = random(GatedMLP(6, 10, bias=bias)), vectors()
    gate, up = (torch.einsum("oi,bti->bto", one.weight, x) + (one.shift if bias else 0) for one in (part.gate, part.up))
    inner = gate / (1 + torch.exp(-gate)) * up
    y = torch.einsum("oi,bti->bto", part.down.weight, inner) + (part.down.shift if bias else 0)
    torch.testing.assert_close(part(x, CONTEXT), y)


def test_embedding() -> None:
    learned, norm = Learned(9, 6), RMSNorm(6)
    part, tokens = random(Embedding(11, 6, learned, norm, scale=3.0)), torch.randint(11, (3, 5))
    x = torch.stack([torch.stack([part.weight[token] for token in row]) for row in tokens.tolist()])
    torch.testing.assert_close(part(tokens, CONTEXT), norm(x * 3 + learned.weight[:5]))
    plain = random(Embedding(11, 6))
    assert torch.equal(plain(tokens, CONTEXT), plain.weight[tokens])
    assert float(Embedding(400, 300, deviation=0.5).weight.detach().std()) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_outputs(soft_cap: float | None, bias: bool) -> None:
    own, embedding, x = random(Output(6, 11, bias, soft_cap)), Embedding(11, 6), vectors()
    tied = random(TiedOutput(embedding, 0.5, bias, soft_cap))

    def capped(y: Tensor) -> Tensor:
        return y if soft_cap is None else soft_cap * torch.tanh(y / soft_cap)

    y = torch.einsum("vi,bti->btv", own.map.weight, x) + (own.map.shift if bias else 0)
    torch.testing.assert_close(own(x), capped(y))
    y = torch.einsum("vi,bti->btv", embedding.weight, x) * 0.5 + (tied.shift if bias else 0)
    torch.testing.assert_close(tied(x), capped(y))
    if soft_cap:
        assert tied(x * 1000).abs().max() <= soft_cap
    assert tied.bias is bias and tied.parameter_count() == 66 + (11 if bias else 0)


def test_residual_layouts() -> None:
    a, b = random(MLP(6, 10)), random(GatedMLP(6, 7))
    n, m, x = random(RMSNorm(6)), random(LayerNorm(6)), vectors()

    def f(y: Tensor) -> Tensor:
        return a(y, CONTEXT)

    def g(y: Tensor) -> Tensor:
        return b(y, CONTEXT)

    expected: list[tuple[Part, Tensor]] = [
        (PreNorm(n, a), x + f(n(x))),
        (PostNorm(n, a), n(x + f(x))),
        (Sandwich(n, a, m), x + m(f(n(x)))),
        (Parallel([n], [a, b]), x + f(n(x)) + g(n(x))),
        (Parallel([n, m], [a, b]), x + f(n(x)) + g(m(x))),
        (Parallel([n], [a]), x + f(n(x))),
        (Layer([PreNorm(n, a), PostNorm(m, b)]), m(x + f(n(x)) + g(x + f(n(x))))),
        (Layer([]), x),
    ]
    for part, y in expected:
        torch.testing.assert_close(part(x, CONTEXT), y)
    with pytest.raises(ValueError, match="2 norms for 3 parallel parts"):
        Parallel([n, m], [a, b, a])


DROPPING: dict[str, Callable[[], Part]] = {
    "PreNorm": lambda: PreNorm(RMSNorm(64), MLP(64, 8), 0.5),
    "PostNorm": lambda: PostNorm(nn.Identity(), MLP(64, 8), 0.5),  # type: ignore[arg-type]
    "Sandwich": lambda: Sandwich(RMSNorm(64), MLP(64, 8), RMSNorm(64), 0.5),
    "Parallel": lambda: Parallel([RMSNorm(64)], [MLP(64, 8)], 0.5),
}


@pytest.mark.parametrize("name", sorted(DROPPING))
def test_dropout_only_while_training(name: str) -> None:
    part, x = random(DROPPING[name]()), vectors(64)
    update = part.eval()(x, CONTEXT) - x
    assert torch.equal(part(x, CONTEXT) - x, update)
    dropped = part.train()(x, CONTEXT) - x
    away = dropped.abs() < 1e-9
    assert 0.35 < float(away.double().mean()) < 0.65
    torch.testing.assert_close(dropped[~away], 2 * update[~away])


def test_embedding_dropout_only_while_training() -> None:
    part, tokens = Embedding(11, 64, dropout=0.5), torch.randint(11, (3, 5))
    assert torch.equal(part.eval()(tokens, CONTEXT), part.weight[tokens])
    assert 0.35 < float((part.train()(tokens, CONTEXT) == 0).double().mean()) < 0.65
