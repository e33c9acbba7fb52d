"""Partial softmaxes: however the keys are split, and in whatever order along whatever tree they are merged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager
from formery.parts.kernels.partial import Partial, empty, merge, merged, partial

SETTINGS = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "groups": st.integers(1, 3),
        "shared": st.integers(1, 3),
        "time": st.integers(1, 4),
        "slots": st.integers(0, 40),
        "masked": st.booleans(),
        "biased": st.booleans(),
        "soft_cap": st.sampled_from([None, 2.0]),
        "size": st.sampled_from([1.0, 30.0]),
        "seed": st.integers(0, 2**20),
    }
)


class Case:
    """Random queries, keys and values in float32, ragged rows, some of which see nothing; plain attention to them."""

    def __init__(self, batch: int, groups: int, shared: int, time: int, slots: int, masked: bool, biased: bool,
                 soft_cap: float | None, size: float, seed: int):  # fmt: skip
        draw = torch.Generator().manual_seed(seed)
        heads, self.slots, self.soft_cap = groups * shared, slots, soft_cap
        self.query = torch.randn(batch, heads, time, 8, generator=draw) * size**0.5
        self.key = torch.randn(batch, groups, slots, 8, generator=draw) * size**0.5
        self.value = torch.randn(batch, groups, slots, 5, generator=draw)
        self.allowed = self.bias = None
        if masked:
            lengths = torch.randint(0, slots + 1, (batch, 1, 1, 1), generator=draw)
            self.allowed = (torch.arange(slots) < lengths) & (
                torch.rand(batch, heads, time, slots, generator=draw) < 0.7
            )
        if biased:
            self.bias = torch.randn(1, heads, time, slots, generator=draw)

    def plain(self) -> Tensor:
        """By the formula, in float64; 0 where a query sees nothing."""
        wide = (self.query.double(), self.key.double(), self.value.double())
        bias = None if self.bias is None else self.bias.double()
        return eager(*wide, Visibility(self.allowed), bias, 8**-0.5, self.soft_cap, 0.0)[0].nan_to_num(0.0)

    def of(self, places: list[int]) -> Partial:
        """The partial softmax over these keys."""
        parts = [None if one is None else one[..., places] for one in (self.allowed, self.bias)]
        return partial(self.query, self.key[:, :, places], self.value[:, :, places], *parts, None, self.soft_cap)


def close(found: Partial, case: Case) -> None:
    # Scores of some hundreds are only known to that many units of rounding.
    room = 1e-6 * max(
        1.0, float((case.query.norm(dim=-1).amax() * case.key.norm(dim=-1).amax() if case.slots else 1) / 8)
    )
    assert (found.value.double() - case.plain()).abs().max() <= room


@settings(max_examples=40)
@given(SETTINGS, st.data())
def test_any_split_in_any_order_along_any_tree_is_plain_attention(setting: dict, data: st.DataObject) -> None:
    case = Case(**setting)
    order = data.draw(st.permutations(range(case.slots)))
    cuts = sorted(data.draw(st.lists(st.integers(0, case.slots), max_size=6)))
    parts = [case.of(list(order[a:b])) for a, b in zip([0, *cuts], [*cuts, case.slots], strict=True)]
    while len(parts) > 1:
        first = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        second = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        parts.append(merge(first, second))
    close(parts[0], case)


@settings(max_examples=40)
@given(SETTINGS, st.data())
def test_merging_is_associative_and_commutative(setting: dict, data: st.DataObject) -> None:
    case = Case(**setting)
    cuts = sorted(data.draw(st.lists(st.integers(0, case.slots), min_size=2, max_size=2)))
    one, two, three = (case.of(list(range(a, b))) for a, b in zip([0, *cuts], [*cuts, case.slots], strict=True))
    left, right, back = merge(merge(one, two), three), merge(one, merge(two, three)), merge(three, merge(two, one))
    for other in (right, back):
        assert torch.equal(left.maximum, other.maximum)
        torch.testing.assert_close(left.denominator, other.denominator, rtol=2e-6, atol=0)
        torch.testing.assert_close(left.numerator, other.numerator, rtol=2e-6, atol=2e-6)


@settings(max_examples=40)
@given(SETTINGS)
def test_no_keys_change_nothing(setting: dict) -> None:
    case = Case(**setting)
    whole, nothing = case.of(list(range(case.slots))), empty(case.query, 5)
    for both in (merge(whole, nothing), merge(nothing, whole), merged([nothing, whole, nothing])):
        assert torch.equal(both.packed(), whole.packed())
    assert not nothing.value.any() and (nothing.log_sum_exp == -torch.inf).all()
    again = Partial.unpacked(whole.packed())
    assert torch.equal(again.value, whole.value) and torch.equal(again.log_sum_exp, whole.log_sum_exp)


def test_scores_that_overflow_an_exponential() -> None:
    query = torch.tensor([[[[300.0]]]])
    key, value = torch.tensor([[[[1.0], [-1.0], [1.0], [0.5]]]]), torch.tensor([[[[1.0], [9.0], [3.0], [9.0]]]])
    parts = [partial(query, key[:, :, [i]], value[:, :, [i]], scale=1.0) for i in range(4)]
    assert merged(parts).value.item() == 2.0 and merged(parts[::-1]).value.item() == 2.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_kept_in_float32(dtype: torch.dtype) -> None:
    case = Case(2, 2, 2, 3, 33, True, True, None, 1.0, 0)
    case.query, case.key, case.value = (one.to(dtype) for one in (case.query, case.key, case.value))
    found = merged([case.of(list(range(a, 33, 4))) for a in range(4)])
    assert {found.maximum.dtype, found.denominator.dtype, found.numerator.dtype} == {torch.float32}
    assert (found.value - case.plain()).abs().max() < 0.03
