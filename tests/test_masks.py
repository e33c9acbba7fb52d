"""Masks against their definitions in plain Python, and the algebra they obey."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formery.parts import Context, Mask, block_causal, causal, dilated, everything, prefix, window
from formery.parts.part import Described

Definition = Callable[[int, int], bool]

MASKS: dict[str, tuple[Mask, Definition]] = {
    "Everything": (everything, lambda q, k: True),
    "Causal": (causal, lambda q, k: k in range(q + 1)),
    "Window": (window(4), lambda q, k: k in {q - 3, q - 2, q - 1, q, q + 1, q + 2, q + 3}),
    "Dilated": (dilated(3), lambda q, k: k in range(q % 3, 1000, 3)),
    "Prefix": (prefix(5), lambda q, k: k in range(5)),
    "BlockCausal": (block_causal(4), lambda q, k: k < (q - q % 4) + 4),
    "Not": (~window(4), lambda q, k: max(q, k) - min(q, k) >= 4),
    "Both": (causal & dilated(3), lambda q, k: k in range(q, -1, -3)),
    "Either": (causal | prefix(5), lambda q, k: k <= max(q, 4)),
}
POSITIONS = st.lists(st.integers(0, 60), min_size=1, max_size=12)


def table(mask: Mask, queries: list[int], keys: list[int], batch: int = 1, heads: int = 1) -> torch.Tensor:
    shape = (batch, heads, len(queries), len(keys))
    return mask(
        torch.arange(batch)[:, None, None, None],
        torch.arange(heads)[None, :, None, None],
        torch.tensor(queries)[None, None, :, None],
        torch.tensor(keys)[None, None, None, :],
    ).expand(shape)


def test_every_mask_has_a_definition() -> None:
    known = {name for name, cls in Described.registry.items() if issubclass(cls, Mask) and cls is not Mask}
    here = {name for name in known if Described.registry[name].__module__ == "formery.parts.mask"}
    assert here == set(MASKS)
    assert all(type(mask).__name__ == name for name, (mask, _) in MASKS.items())


@pytest.mark.parametrize("name", sorted(MASKS))
@given(queries=POSITIONS, keys=POSITIONS)
def test_mask_is_its_definition(name: str, queries: list[int], keys: list[int]) -> None:
    mask, definition = MASKS[name]
    expected = [[definition(query, key) for key in keys] for query in queries]
    for row in table(mask, queries, keys, 2, 3).flatten(0, 1).tolist():
        assert row == expected


LEAVES = st.sampled_from([everything, causal]) | st.builds(
    lambda kind, size: kind(size), st.sampled_from([window, dilated, prefix, block_causal]), st.integers(1, 9)
)
ANY = st.recursive(
    LEAVES,
    lambda inner: (
        st.builds(lambda a: ~a, inner)
        | st.builds(lambda a, b: a & b, inner, inner)
        | st.builds(lambda a, b: a | b, inner, inner)
    ),
    max_leaves=5,
)


@given(ANY, ANY, ANY, POSITIONS, POSITIONS)
def test_algebra(a: Mask, b: Mask, c: Mask, queries: list[int], keys: list[int]) -> None:
    def same(left: Mask, right: Mask) -> bool:
        return torch.equal(table(left, queries, keys), table(right, queries, keys))

    assert same(~(a & b), ~a | ~b) and same(~(a | b), ~a & ~b)
    assert same(~~a, a) and same(a & b, b & a) and same(a | b, b | a)
    assert same(a & (b | c), (a & b) | (a & c)) and same(a | (b & c), (a | b) & (a | c))
    assert same(a & everything, a) and same(a | ~everything, a) and same(a | ~a, everything)
    for row, one in zip(table(a & b, queries, keys).flatten(), table(a, queries, keys).flatten(), strict=True):
        assert one or not row


@given(ANY)
def test_equal_masks_hash_alike(mask: Mask) -> None:
    from formery.parts import build

    twin = build(mask.describe())
    assert twin == mask and hash(twin) == hash(mask) and mask != ~mask


class ByHead(Mask):
    """Head h sees h positions back; row b of the batch sees nothing beyond position b."""

    def __call__(self, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (query - key == head) | (key == batch)


@pytest.mark.parametrize("even", [True, False])
def test_a_mask_knows_its_batch_row_and_its_head(even: bool) -> None:
    positions = torch.arange(6).expand(4, 6)
    allowed = Context(positions, even=even).visibility(ByHead(), 3).allowed
    assert allowed is not None
    for b, h, q, k in torch.cartesian_prod(*(torch.arange(size) for size in (4, 3, 6, 6))).tolist():
        assert allowed[b, h, q, k] == (q - k == h or k == b)


@given(
    ANY,
    st.lists(st.lists(st.integers(-1, 20), min_size=5, max_size=5), min_size=1, max_size=3),
    st.booleans(),
)
def test_nobody_sees_padding(mask: Mask, rows: list[list[int]], restricted: bool) -> None:
    positions = torch.tensor(rows)
    visible = torch.rand(len(rows), 5, 5) < 0.5 if restricted else None
    allowed = Context(positions, visible=visible).visibility(mask, 1).tensor(5, 5, positions.device)
    for b, row in enumerate(rows):
        for q, query in enumerate(row):
            seen = [
                key >= 0 and bool(table(mask, [query], [key])) and (visible is None or bool(visible[b, q, k]))
                for k, key in enumerate(row)
            ]
            if not any(seen):  # a token sees itself; what padding sees is never read, but is something
                seen = [query < 0 or key == query for key in row]
            assert allowed.expand(len(rows), 1, 5, 5)[b, 0, q].tolist() == seen


@pytest.mark.parametrize("mask", [everything, causal, window(3), causal & prefix(2), causal & ~window(2)])
@pytest.mark.parametrize("time", [1, 3, 7])
def test_the_short_way_for_even_rows_is_the_long_way(mask: Mask, time: int) -> None:
    slots = torch.arange(7).expand(3, 7)
    positions = slots[:, 7 - time :]
    short = Context(positions, slots, even=True).visibility(mask, 2).tensor(time, 7, slots.device)
    long = Context(positions, slots, even=False).visibility(mask, 2).tensor(time, 7, slots.device)
    assert torch.equal(short.expand(3, 2, time, 7), long.expand(3, 2, time, 7))
