"""The compiled kernels compute what the parts' own `forward` computes, and each row by itself."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formery.models import Decoder
from formery.parts import (
    Alibi,
    Attention,
    Codes,
    Embedding,
    LayerNorm,
    LinearScaling,
    Llama3Scaling,
    Output,
    Part,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Together,
    YarnScaling,
    block_causal,
    causal,
    dilated,
    everything,
    kernel,
    prefix,
    window,
)
from formery.parts.kernels.product import product
from formery.parts.native import build, using
from formery.parts.native.stack import alone
from formery.parts.native.writer import ACTIVATIONS, SET, Writer
from formery.parts.part import activation

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler here")

STORES = ("float32", "bfloat16", "int8", "int4")
WIDTHS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2500)


@pytest.fixture(autouse=True)
def with_kernels() -> Iterator[None]:
    with torch.inference_mode(), using(True):
        yield


def steps(hidden: Tensor, outputs: int, write: Callable[[Writer], None]) -> Tensor | None:
    library = build.library(wait=True)
    assert library is not None
    return alone(library, hidden, outputs, write)


# Products


def stored(weight: Tensor, store: str) -> Tensor | Codes:
    if store in ("float32", "bfloat16"):
        return weight.to(getattr(torch, store))
    return Codes.of(weight, int(store[3:]))


def written_out(hidden: Tensor, weight: Tensor | Codes) -> tuple[Tensor, Tensor]:
    """The product in 64 bits, and how far off one in 32 bits may be."""
    whole = (weight.weights() if isinstance(weight, Codes) else weight).double()
    # With weights of 16 bits inputs have 16 bits too; with codes they are whole numbers up to 32512.
    read = (hidden.bfloat16() if weight.dtype == torch.bfloat16 else hidden).double()
    off = 2e-6 * (read.abs() @ whole.abs().T)
    if isinstance(weight, Codes):
        off += hidden.abs().amax(-1, keepdim=True) / 32512 * 0.51 * whole.abs().sum(-1)
    return read @ whole.T, off + 1e-30


@settings(max_examples=150)
@given(
    rows=st.integers(1, 40),
    inputs=st.sampled_from(WIDTHS),
    outputs=st.one_of(st.integers(1, 70), st.sampled_from(WIDTHS)),
    store=st.sampled_from(STORES),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_product_is_the_formula_and_each_row_is_as_if_it_were_alone(
    rows: int, inputs: int, outputs: int, store: str, biased: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, inputs, generator=random)
    weight = stored(torch.randn(outputs, inputs, generator=random), store)
    shift = torch.randn(outputs, generator=random) if biased else None
    found = product(hidden, weight, shift)
    exact, off = written_out(hidden, weight)
    if shift is not None:
        exact, off = exact + shift.double(), off + 2e-7 * (exact.abs() + shift.abs())
    assert bool(((found.double() - exact).abs() <= off).all())
    for row in range(rows):
        assert torch.equal(product(hidden[row], weight, shift), found[row])
    some = hidden[torch.randperm(rows, generator=random)[: rows // 2 + 1]]
    others = torch.cat([some, hidden])[:, None]
    assert torch.equal(product(others, weight, shift)[-rows:, 0], found)
    torch.set_num_threads(2)
    try:
        assert torch.equal(product(hidden, weight, shift), found)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("store", STORES)
def test_what_is_special_in_a_product(store: str) -> None:
    weight = stored(torch.randn(20, 70), store)
    assert product(torch.randn(0, 3, 70), weight).shape == (0, 3, 20)
    assert not product(torch.zeros(2, 70), weight).any()
    assert product(torch.randn(2, 70, dtype=torch.bfloat16), weight).dtype == torch.bfloat16
    for size in (1e-40, 1e-30, 1e30):
        hidden = torch.randn(3, 70) * size
        exact, off = written_out(hidden, weight)
        assert bool(((product(hidden, weight).double() - exact).abs() <= off.clamp(min=1e-36)).all())
    strided = torch.randn(70, 5).T
    assert torch.equal(product(strided, weight), product(strided.contiguous(), weight))


# Norms and activations


@settings(max_examples=60)
@given(
    rows=st.integers(1, 9),
    width=st.one_of(st.integers(1, 70), st.sampled_from(WIDTHS)),
    size=st.sampled_from([1e-6, 1.0, 1e6]),
    make=st.sampled_from(
        [LayerNorm, lambda width: LayerNorm(width, 1e-12, bias=False), RMSNorm, lambda width: RMSNorm(width, 1e-5, 1.0)]
    ),
)
def test_norms_are_those_of_the_parts(rows: int, width: int, size: float, make: Callable[[int], Part]) -> None:
    part = make(width).eval()
    for weight in part.parameters():
        weight.normal_()
    hidden = size * (torch.randn(rows, width) + 0.5)
    found = steps(hidden, width, lambda writer: writer.norm(part, 0, 1))
    assert found is not None
    with using(False):
        exact = copy.deepcopy(part).double()(hidden.double())
    atol = 1e-4 if width <= 2 and size < 1 else 5e-6
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=atol)
    for row in range(rows):
        one = steps(hidden[row], width, lambda writer: writer.norm(part, 0, 1))
        assert one is not None and torch.equal(one, found[row])


def values() -> Tensor:
    """Numbers of all sizes, both signs, densely where functions bend."""
    sizes = 10.0 ** torch.arange(-44, 38.5, 0.25, dtype=torch.float64)
    whole = torch.cat([sizes, torch.linspace(0, 100, 20_001, dtype=torch.float64), torch.tensor([3.4e38])])
    return torch.cat([whole, -whole]).float()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_pytorch(name: str) -> None:
    hidden = values()[:, None]
    weight = torch.ones(19, 1)
    found = steps(hidden, 19, lambda writer: writer.product(weight, None, 0, 1, SET, ACTIVATIONS.index(name)))
    assert found is not None and bool((found == found[:, :1]).all())
    exact = activation(name)(hidden.double())[:, 0]
    finite = exact.abs() < 1e38
    torch.testing.assert_close(found[finite, 0].double(), exact[finite], rtol=2e-6, atol=4e-7)
    assert bool((found[~finite, 0].abs() > 0.99e38).all()) and not found.isnan().any()


# Attention

POSITIONS: dict[str, Callable[[int], Any]] = {
    "none": lambda heads: None,
    "rotary": lambda heads: Rotary(),
    "neighbours": lambda heads: Rotary(500.0, 0.5, interleaved=True),
    "linear": lambda heads: Rotary(scaling=LinearScaling(2.0)),
    "llama3": lambda heads: Rotary(500.0, scaling=Llama3Scaling(4.0, original_length=16), interleaved=True),
    "yarn": lambda heads: Rotary(500.0, scaling=YarnScaling(4.0, 16)),
    "alibi": lambda heads: Alibi(),
    "buckets": lambda heads: RelativeBuckets(heads, 8, 20),
    "both": lambda heads: Together([Rotary(), Alibi()]),
}
MASKS = [causal, causal & window(5), window(5) & causal, window(4), everything, causal & dilated(2) | prefix(2)]
MASKS += [block_causal(3), ~(causal & window(2)) & causal]
CASES = st.fixed_dictionaries(
    {
        "groups": st.integers(1, 3),
        "share": st.sampled_from([1, 2, 5]),
        "dim": st.sampled_from([8, 10, 16, 20, 48, 64, 72, 80, 128]),
        "mask": st.sampled_from(MASKS),
        "position": st.sampled_from(sorted(POSITIONS)),
        "norm": st.sampled_from([None, RMSNorm, LayerNorm]),
        "scale": st.sampled_from([None, 0.1]),
        "soft_cap": st.sampled_from([None, 2.0]),
        "biased": st.booleans(),
        "dtype": st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
        "seed": st.integers(0, 2**31),
    }
)


def attending(case: dict[str, Any]) -> Decoder:
    """A model of one attention, with random norms and biases."""
    torch.manual_seed(case["seed"])
    heads, dim, norm = case["groups"] * case["share"], case["dim"], case["norm"]
    norms = {} if norm is None else {"query_norm": norm(dim), "key_norm": norm(dim)}
    part = Attention(
        24, heads, case["groups"], dim, POSITIONS[case["position"]](heads), case["mask"], case["biased"],
        scale=case["scale"], soft_cap=case["soft_cap"], **norms,
    )  # fmt: skip
    made = Decoder(Embedding(50, 24, deviation=1.0), [PreNorm(RMSNorm(24), part)], None, Output(24, 9))
    for weight in made.parameters():
        if weight.dim() == 1:
            weight += 0.3 * torch.randn(weight.shape)
    return made.to(case["dtype"]).eval()


def passes(target: Decoder) -> list[Tensor]:
    """Vectors from scratch, padded, segmented, with a state, and in one that was thinned out."""
    tokens = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    at = torch.arange(40).expand(2, 40).clone()
    at[0, 33:], at[1, :3], at[1, 3:] = -1, -1, torch.arange(37)
    found = [target.hidden(tokens), target.hidden(tokens, at)[at >= 0]]
    found += [target.hidden(tokens, segments=torch.arange(40).expand(2, 40) // 15)]
    state = target.start(2, 8)
    found += [target.read(tokens[:, :19], state), target.read(tokens[:, 19:20], state)]
    state.rollback([20, 11])
    found += [target.read(tokens[:, 20:24], state)]
    state.keep(torch.arange(24).expand(2, 24) % 3 > 0)
    found += [target.read(tokens[:, 24:27], state, torch.arange(24, 27) - torch.tensor([[0], [9]]))]
    return [one.double() for one in found]


@settings(max_examples=60)
@given(CASES)
def test_attention_is_that_of_the_part(case: dict[str, Any]) -> None:
    target = attending(case)
    with using(False), kernel("eager"):
        exact = passes(copy.deepcopy(target).double())
    rough = case["dtype"] == torch.bfloat16
    for found, wanted in zip(passes(target), exact, strict=True):
        torch.testing.assert_close(
            found, wanted, **({"rtol": 0.05, "atol": 0.1} if rough else {"rtol": 1e-5, "atol": 2e-5})
        )
