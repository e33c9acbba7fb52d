"""Attention dealt out to workers: every tile once, evenly, and plain attention whatever the schedule."""

from typing import Any

import pytest
import spread_runs as runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.errors import FormeryError
from formery.generate import generate
from formery.methods.runtime.layers import Shape, plain, reach
from formery.methods.runtime.leanattention import DEALS, FEW, LeanAttention, lean, model_rows, modelled
from formery.methods.runtime.schedules import Span, dealt, fixed_split, makespan, per_head, stream_k, tiles
from formery.models import Decoder
from formery.parts import Attention, Embedding, Mamba2, PreNorm, RMSNorm, TiedOutput, build
from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager

COUNTS = st.lists(st.integers(0, 40), max_size=6)


@given(COUNTS, st.integers(1, 5), st.integers(1, 30), st.sampled_from(list(DEALS.values())))
def test_every_tile_is_dealt_once(counts: list[int], heads: int, workers: int, deal: Any) -> None:
    schedule = deal(counts, heads, workers)
    assert len(schedule) == workers
    spans = [span for one in schedule for span in one]
    assert all(len(span) > 0 for span in spans)
    dealt_out = sorted((span.row, span.head, tile) for span in spans for tile in range(span.first, span.last))
    assert dealt_out == [
        (row, head, tile) for row, count in enumerate(counts) for head in range(heads) for tile in range(count)
    ]


@given(COUNTS, st.integers(1, 5), st.integers(1, 30))
def test_stream_k_is_level_and_in_line(counts: list[int], heads: int, workers: int) -> None:
    schedule = stream_k(counts, heads, workers)
    work = [sum(map(len, spans)) for spans in schedule]
    assert max(work) - min(work) <= 1
    spans = [span for one in schedule for span in one]
    assert spans == sorted(spans, key=lambda span: (span.row, span.head, span.first))
    # A worker goes on to another head only when it has done all that is left of one.
    assert len(spans) <= workers + heads * len(counts)
    assert makespan(schedule, 0.0) <= min(makespan(deal(counts, heads, workers), 0.0) for deal in DEALS.values())


def test_what_a_schedule_takes() -> None:
    whole, split, line = (deal([6, 2], 1, 4) for deal in (per_head, fixed_split, stream_k))
    assert whole[0] == [Span(0, 0, 0, 6)] and whole[1] == [Span(1, 0, 0, 2)] and whole[2] == whole[3] == []
    assert split == [[Span(0, 0, 0, 3)], [Span(0, 0, 3, 6)], [Span(1, 0, 0, 2)], []]
    assert line == [[Span(0, 0, 0, 2)], [Span(0, 0, 2, 4)], [Span(0, 0, 4, 6)], [Span(1, 0, 0, 2)]]
    assert [makespan(one, 0.0) for one in (whole, split, line)] == [6, 3, 2]
    assert [makespan(one, 0.5) for one in (whole, split, line)] == [6.5, 4, 3.5]
    assert makespan([[], []], 0.5) == 0 and tiles([0, 1, 256, 257], 256) == [0, 1, 1, 2]


def test_a_fixed_split_leaves_enough_heads_whole() -> None:
    assert fixed_split([50] * 90, 1, 108) == per_head([50] * 90, 1, 108)  # 90 of 108 are more than 80 %
    split = fixed_split([128], 8, 108)  # in 12 pieces each: 96 of 108 are the first that are 85 % of all
    assert sum(map(len, split)) == 8 * 12 and makespan(split, 0.0) == 11


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 7, 64]),
    st.booleans(), st.sampled_from(list(DEALS.values())), st.integers(0, 2**20),
)  # fmt: skip
def test_any_schedule_is_plain_attention(
    lengths: list[int], groups: int, shared: int, time: int, workers: int, tile: int, masked: bool, deal: Any, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows, slots, heads = len(lengths), max(lengths), groups * shared
    query = torch.randn(rows, heads, time, 8, generator=draw)
    key, value = (torch.randn(rows, groups, slots, 8, generator=draw) for _ in range(2))
    allowed = (torch.arange(slots) < torch.tensor(lengths)[:, None])[:, None, None].expand(rows, 1, time, slots)
    bias = sees = None
    if masked:
        sees, bias = runs.sight(rows, heads, time, slots, draw)
        allowed = allowed & sees
    wide = (query.double(), key.double(), value.double())
    wanted = eager(*wide, Visibility(allowed), bias, 0.3, 2.0, 0.0)[0].nan_to_num(0.0)
    found = dealt(deal, query, key, value, lengths, workers, tile, sees, bias, 0.3, 2.0)
    assert (found - wanted).abs().max() < 1e-6


def test_gradients_flow_through_threads() -> None:
    query, key, value = (one.double().requires_grad_() for one in Shape(4, 2, 8).drawn(37, 0, 2))
    found = dealt(stream_k, query, key, value, [37, 20], 3, 8)
    wanted = plain(query, key, value, reach([37, 20]))
    for own, other in zip(
        *(torch.autograd.grad(one.square().sum(), (query, key, value)) for one in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("name", ["rotary", "biased", "translator"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_model_writes_the_same_by_every_kind_of_method(name: str, workers: int) -> None:
    model = runs.models()[name]
    own = lean(model, workers, tile=3)
    for method in ("greedy", "parallel-jacobi-decoding", "aggressive-decoding", "beam"):
        texts = [generate(one, runs.PROMPTS, method, max_new_tokens=12) for one in (model, own)]
        assert [one.tokens for one in texts[0]] == [one.tokens for one in texts[1]]


@torch.inference_mode()
def test_ragged_rows_and_thinned_states_are_those_of_a_plain_model() -> None:
    model = runs.models()["rotary"]
    said = []
    for one in (model, lean(model, 2, tile=4)):
        state = one.start(3, 4)
        found = [one.step(torch.arange(3 * (FEW + 4)).view(3, -1) % 31, state)]
        state.rollback([20, 3, 11])
        found.append(one.step(torch.arange(15).view(3, 5), state))
        state.keep(torch.rand(3, state.slots.filled, generator=torch.Generator().manual_seed(3)) < 0.6)
        state.select([2, 0, 0])
        found.append(one.step(torch.tensor([[4, 1], [5, 2], [6, 3]]), state))
        said.append(found)
    for own, other in zip(*said, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@torch.inference_mode()
def test_decoding_is_a_pass_from_scratch() -> None:
    own = lean(runs.models()["biased"], 3, tile=2)
    tokens = torch.randint(31, (2, 14))
    state = own.start(2, 14)
    stepped = torch.cat([own.step(piece, state) for piece in tokens.split([1, 3, 1, 9], 1)], 1)
    torch.testing.assert_close(stepped, own(tokens), rtol=1e-12, atol=1e-12)


def test_a_rewritten_model_shares_its_weights_and_can_be_built_anew() -> None:
    model = runs.models()["rotary"]
    own = lean(model, 5, tile=32)
    assert {id(one) for one in own.parameters()} == {id(one) for one in model.parameters()}
    again = build(own.describe())
    assert again.describe() == own.describe()
    assert [(p.workers, p.tile) for p in again.modules() if isinstance(p, LeanAttention)] == [(5, 32)] * 2  # type: ignore[attr-defined]
    assert all(type(p) is Attention for p in model.modules() if isinstance(p, Attention))


def test_bad_input_is_told() -> None:
    model = runs.models()["rotary"]
    with pytest.raises(FormeryError, match="way of its own"):
        lean(lean(model))
    embedding = Embedding(7, 8)
    with pytest.raises(FormeryError, match="no part of the kind Attention"):
        lean(Decoder(embedding, [PreNorm(RMSNorm(8), Mamba2(8, 2, 8, 4))], None, TiedOutput(embedding)))
    with pytest.raises(FormeryError, match="at least 1 worker"):
        dealt(stream_k, *Shape().drawn(4, 0), [4], 0, 1)
    with pytest.raises(FormeryError, match="at least 1 worker"):
        lean(model, workers=0)


def test_the_model_of_the_schedules_has_no_idle_worker() -> None:
    model = modelled((0,))
    assert all(0 <= one["over even"] < 1 for one in model)
    assert all(one["stream-K"] <= min(one["per head"], one["fixed split"]) for one in model if one["overhead"] == 0)
    assert len(list(model_rows(model))) == 18
