"""All kernels compute one formula, which is written out here entry by entry in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.parts import Visibility, attend, kernel
from formery.parts.kernels import KERNELS
from formery.parts.kernels.choose import _chosen
from formery.parts.kernels.eager import eager
from formery.parts.kernels.product import Packing, available, product
from formery.parts.native import using


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Attention with nothing but sums, for one query of one head at a time."""
    batch, heads, time, width = query.shape
    groups, slots = key.shape[1:3]
    result = torch.zeros(batch, heads, time, value.shape[-1], dtype=torch.float64)
    allowed = allowed.expand(batch, heads, time, slots)
    bias = None if bias is None else bias.expand(batch, heads, time, slots)
    for b in range(batch):
        for h in range(heads):
            group = h * groups // heads
            for t in range(time):
                weights = []
                for s in range(slots):
                    score = float(query[b, h, t].double() @ key[b, group, s].double())
                    score *= 1 / math.sqrt(width) if scale is None else scale
                    score = score if soft_cap is None else soft_cap * math.tanh(score / soft_cap)
                    score += 0.0 if bias is None else float(bias[b, h, t, s])
                    weights.append(math.exp(score) if allowed[b, h, t, s] else 0.0)
                for s, weight in enumerate(weights):
                    result[b, h, t] += weight / sum(weights) * value[b, group, s].double()
    return result


SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 3]),
        "share": st.sampled_from([1, 2, 4]),
        "time": st.integers(1, 5),
        "slots": st.integers(1, 6),
        "seed": st.integers(0, 2**31),
        "mask": st.sampled_from(["none", "causal", "row", "head", "shared"]),
        "bias": st.sampled_from([None, "head", "row"]),
        "scale": st.sampled_from([None, 1.0, 0.3]),
        "soft_cap": st.sampled_from([None, 2.0]),
    }
)


def case(shape: dict, dtype: torch.dtype = torch.float64, width: int = 5, value_width: int = 4) -> tuple:
    """Random inputs of `attend`; every query sees at least one slot."""
    random = torch.Generator().manual_seed(shape["seed"])
    batch, heads = shape["batch"], shape["groups"] * shape["share"]
    time = shape["time"]
    slots = time if shape["mask"] == "causal" else shape["slots"]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random, dtype=torch.float64).to(dtype)

    # Keys and values as the cache hands them out: a transposed view of part of a larger tensor.
    key = normal(batch, slots + 2, shape["groups"], width)[:, :slots].transpose(1, 2)
    value = normal(batch, slots + 2, shape["groups"], value_width)[:, :slots].transpose(1, 2)
    sizes = {"row": (batch, 1), "head": (batch, heads), "shared": (1, 1)}
    visibility = Visibility(causal=shape["mask"] == "causal")
    if shape["mask"] in sizes:
        allowed = torch.rand(*sizes[shape["mask"]], time, slots, generator=random) < 0.5
        allowed[..., torch.randint(slots, (1,), generator=random)] = True
        visibility = Visibility(allowed)
    bias = None if shape["bias"] is None else normal(batch if shape["bias"] == "row" else 1, heads, time, slots)
    return normal(batch, heads, time, width), key, value, visibility, bias, shape["scale"], shape["soft_cap"]


def expected(arguments: tuple) -> Tensor:
    query, key, value, visibility, *rest = arguments
    return written_out(query, key, value, visibility.tensor(query.shape[2], key.shape[2], query.device), *rest)


@pytest.mark.parametrize("name", ["eager", "sdpa", "auto"])
@settings(max_examples=60)
@given(SHAPES)
def test_kernel_is_the_formula(name: str, shape: dict) -> None:
    arguments = case(shape)
    with kernel(name):
        torch.testing.assert_close(attend(*arguments), expected(arguments), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=6)
@given(SHAPES)
def test_flex_is_the_formula(shape: dict) -> None:
    arguments = case(shape, torch.float32, 16, 16)
    with kernel("flex"):
        torch.testing.assert_close(attend(*arguments).double(), expected(arguments), rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(SHAPES)
def test_eager_returns_the_weights(shape: dict) -> None:
    query, key, value, visibility, bias, _, soft_cap = case(shape)
    mixed, weights = eager(query, key, value, visibility, bias, 0.5, soft_cap, 0.0)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    share = query.shape[1] // key.shape[1]
    torch.testing.assert_close(weights @ value.repeat_interleave(share, 1), mixed)
    hidden = ~visibility.tensor(query.shape[2], key.shape[2], query.device)
    assert not weights[hidden.expand_as(weights)].any()


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_near_the_formula(name: str, dtype: torch.dtype) -> None:
    shape = {
        "batch": 2,
        "groups": 2,
        "share": 2,
        "time": 4,
        "slots": 5,
        "seed": 1,
        "mask": "row",
        "bias": "head",
    }
    arguments = case({**shape, "scale": None, "soft_cap": None}, dtype)
    with kernel(name):
        mixed = attend(*arguments)
    assert mixed.dtype == dtype
    torch.testing.assert_close(mixed.double(), expected(arguments), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex"])
def test_dropout_drops_and_keeps_the_mean(name: str) -> None:
    query, key = torch.zeros(1, 1, 400, 8), torch.randn(1, 1, 50, 8)
    value = torch.ones(1, 1, 50, 8)
    with kernel(name):
        mixed = attend(query, key, value, Visibility(), dropout=0.5)
    assert mixed.std() > 0.05
    assert mixed.mean() == pytest.approx(1.0, abs=0.03)


def test_a_kernel_is_chosen_for_a_block_only() -> None:
    arguments = case(
        {"batch": 1, "groups": 1, "share": 1, "time": 2, "slots": 3, "seed": 1, "mask": "row"}
        | {"bias": None, "scale": None, "soft_cap": None}
    )
    with pytest.raises(FormeryError, match="did you mean flex"), kernel("flexx"):
        pass
    with pytest.raises(ZeroDivisionError), kernel("eager"), kernel("sdpa"):
        raise ZeroDivisionError
    assert set(KERNELS) == {"auto", "eager", "sdpa", "flex"}
    assert _chosen.get() == "auto"
    torch.testing.assert_close(attend(*arguments), expected(arguments))


def test_gradients_agree() -> None:
    shape = {
        "batch": 2,
        "groups": 2,
        "share": 2,
        "time": 4,
        "slots": 5,
        "seed": 1,
        "mask": "row",
        "bias": "head",
    }
    gradients = []
    for name in ("eager", "sdpa"):
        arguments = case({**shape, "scale": None, "soft_cap": None})
        inputs = [arguments[0].requires_grad_(), arguments[4].requires_grad_()]
        with kernel(name):
            gradients.append(torch.autograd.grad(attend(*arguments).square().sum(), inputs))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 1), (2, 4), (0, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_the_product(shape: tuple[int, int], bias: bool) -> None:
    # One weight on either side of the size from which a single row is worth packing for.
    for outputs, inputs in ((9, 20), (1100, 500)):
        weight, shift = torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
        hidden = torch.randn(*shape, inputs)
        plain = nn.functional.linear(hidden, weight, shift)
        with using(False):
            assert torch.equal(product(hidden, weight, shift), plain)
        with using(False), Packing() as packing:
            torch.testing.assert_close(product(hidden, weight, shift), plain, rtol=1e-5, atol=1e-4)
            again = product(hidden, weight, shift)
        assert len(packing.copies) <= 1
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-4)


def test_what_is_not_packed() -> None:
    weight, hidden = torch.randn(9, 20), torch.randn(4, 20)
    with using(False), Packing() as packing:
        assert product(hidden, weight.requires_grad_()).requires_grad
        with torch.no_grad():
            product(hidden.double(), weight.double())
            product(hidden.half(), weight.half())
            assert not packing.copies
            product(hidden, weight)
            assert len(packing.copies) == available()
