"""Decode state: whatever was appended, taken back, reordered and dropped, logits are those of a fresh pass.

The mirror of a state is plain Python: for each row its tokens, each with its position, the moment it was read
and the moment it was dropped. Logits are compared with a pass from scratch over those tokens in which a dense
mask hides what was dropped before a query was read. All in float64, so that tolerances are tight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models import Decoder, Encoder, EncoderDecoder
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    Context,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Learned,
    Output,
    Parallel,
    Part,
    Position,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sinusoidal,
    State,
    TiedOutput,
    causal,
    everything,
    kernel,
    prefix,
    window,
)

VOCABULARY, WIDTH, LONGEST = 13, 12, 200
CLOSE: dict[str, float] = {"rtol": 1e-7, "atol": 1e-7}


def random(model: Any) -> Any:
    for parameter in model.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def decoder(position: Position | None = None, at_input: Position | None = None, **options: Any) -> Decoder:
    def layer() -> Layer:
        attention = Attention(WIDTH, 6, position=position, **options)
        return Layer([PreNorm(RMSNorm(WIDTH), attention), PreNorm(RMSNorm(WIDTH), GatedMLP(WIDTH, 16))])

    embedding = Embedding(VOCABULARY, WIDTH, at_input)
    return random(Decoder(embedding, [layer(), layer()], RMSNorm(WIDTH), TiedOutput(embedding), LONGEST))


def parallel() -> Decoder:
    layers = [
        Parallel([LayerNorm(WIDTH)], [Attention(WIDTH, 3, 1, position=Rotary(interleaved=True)), MLP(WIDTH, 16)]),
        PostNorm(LayerNorm(WIDTH), Attention(WIDTH, 2, head_width=4, bias=True, soft_cap=2.0)),
    ]
    return random(Decoder(Embedding(VOCABULARY, WIDTH), layers, None, Output(WIDTH, VOCABULARY)))


def looped() -> Decoder:
    """One layer with one set of weights, run three times, as in a universal transformer."""
    layer = Layer([PreNorm(RMSNorm(WIDTH), Attention(WIDTH, 2, position=Rotary()))])
    embedding = Embedding(VOCABULARY, WIDTH)
    return random(Decoder(embedding, [layer, layer, layer], RMSNorm(WIDTH), TiedOutput(embedding)))


MODELS: dict[str, Callable[[], Decoder]] = {
    "rotary, grouped": lambda: decoder(Rotary(), key_value_heads=2),
    "learned": lambda: decoder(at_input=Learned(LONGEST, WIDTH, 2)),
    "sinusoidal, multi-query": lambda: decoder(at_input=Sinusoidal(WIDTH), key_value_heads=1),
    "alibi": lambda: decoder(Alibi(), key_value_heads=3),
    "buckets": lambda: decoder(RelativeBuckets(6, 8, 10)),
    "window": lambda: decoder(Rotary(), mask=causal & window(3)),
    "sinks": lambda: decoder(Rotary(), mask=causal & (window(2) | prefix(1)), key_value_heads=2),
    "parallel, post-norm": parallel,
    "looped": looped,
}


@dataclass
class Token:
    """A token that was read: where, when, and when it was dropped from the state."""

    id: int
    position: int
    read: int
    dropped: float = math.inf


Row = list[Token]


def fresh(model: Decoder, row: Row, memory: Tensor | None = None) -> Tensor:
    """Logits of a pass from scratch over one row, each token seeing what was there when it was read."""
    tokens, positions = (torch.tensor([[getattr(one, key) for one in row]]) for key in ("id", "position"))
    read, dropped = torch.tensor([one.read for one in row]), torch.tensor([one.dropped for one in row])
    visible = (dropped[None, :] > read[:, None])[None]
    context = Context(positions, visible=visible)
    if memory is not None:
        places = torch.arange(memory.shape[1])[None]
        context.memory, context.memory_hidden = Context(positions, places), memory
    with torch.no_grad():
        return model.output(model._run(tokens, context))[0]


class Mirror:
    """A state and what it should be, driven by random operations and compared at each step."""

    def __init__(self, model: Any, state: State, data: st.DataObject, memories: list[Tensor] | None = None):
        self.model, self.state, self.data = model, state, data
        self.decoder = model.decoder if isinstance(model, EncoderDecoder) else model
        self.rows: list[Row] = [[] for _ in range(state.batch)]
        self.next = [0] * state.batch
        self.memories, self.clock = memories, 0

    def draw(self, strategy: Any) -> Any:
        return self.data.draw(strategy)

    def step(self) -> None:
        """Reads 0 to 5 tokens in each row: evenly, or padded on either side."""
        batch = len(self.rows)
        ragged = self.draw(st.booleans())
        widths = self.draw(
            st.lists(st.integers(0, 5), min_size=batch, max_size=batch)
            if ragged
            else st.just([self.draw(st.integers(1, 5))] * batch)
        )
        time = max(*widths, 1)
        left = ragged and self.draw(st.booleans())
        ids = torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(self.clock))
        positions = torch.full((batch, time), -1)
        at = []
        for row, width in enumerate(widths):
            first = time - width if left else 0
            at.append(slice(first, first + width))
            positions[row, at[row]] = torch.arange(self.next[row], self.next[row] + width)
        with torch.no_grad():
            logits = self.model.step(ids, self.state, positions if ragged else None)
        for row, width in enumerate(widths):
            self.rows[row] += [
                Token(int(ids[row, at[row].start + i]), self.next[row] + i, self.clock) for i in range(width)
            ]
            self.next[row] += width
            if width:
                memory = None if self.memories is None else self.memories[row]
                expected = fresh(self.decoder, self.rows[row], memory)[-width:]
                torch.testing.assert_close(logits[row, at[row]], expected, **CLOSE)
        if ragged and self.draw(st.booleans()):
            self.state.rollback(self.state.lengths)

    def rollback(self) -> None:
        self.next = [self.draw(st.integers(max(0, length - 4), length)) for length in self.next]
        self.state.rollback(self.next)
        self.rows = [
            [one for one in row if one.position < length] for row, length in zip(self.rows, self.next, strict=True)
        ]

    def select(self) -> None:
        rows = self.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.state.select(rows)
        self.rows, self.next = (
            [[replace(one) for one in self.rows[row]] for row in rows],
            [self.next[row] for row in rows],
        )
        self.memories = self.memories and [self.memories[row] for row in rows]

    def keep(self) -> None:
        """Drops some slots at random; of each row the last token stays, so that later ones see something."""
        slots = self.state.slots
        wide = self.draw(st.booleans())
        keep = torch.rand(slots.positions.shape, generator=torch.Generator().manual_seed(self.clock)) < 0.6
        keep |= slots.positions == slots.positions.amax(1, keepdim=True)
        for row, tokens in enumerate(self.rows):
            gone = set(slots.positions[row][~keep[row]].tolist())
            for one in tokens:
                if one.position in gone and one.dropped == math.inf:
                    one.dropped = self.clock
        self.state.keep(keep if wide else keep[:, : slots.filled])

    def check(self) -> None:
        state, slots = self.state, self.state.slots
        assert state.lengths == self.next and state.batch == len(self.rows)
        for row, tokens in enumerate(self.rows):
            held = [position for position in slots.positions[row].tolist() if position >= 0]
            assert held == [one.position for one in tokens if one.dropped == math.inf]
            assert slots.used[row] >= len(held) and not (slots.positions[row, slots.used[row] :] >= 0).any()
        assert state.nbytes == held_bytes(self.decoder, state)

    def run(self, operations: list[str]) -> None:
        for name in [*operations, "step", "step"]:
            self.clock += 1
            getattr(self, name)()
            self.check()


def held_bytes(model: Decoder, state: State) -> int:
    """The bytes of a state, added up by hand from the shapes in the model."""
    batch, capacity = state.batch, state.slots.capacity
    total = batch * capacity * 8
    for part in [part for layer in model.layers for part in layer.modules()]:
        if isinstance(part, Attention):
            width = part.head_width or part.width // part.heads
            total += 2 * batch * capacity * (part.key_value_heads or part.heads) * width * 8
        if isinstance(part, CrossAttention):
            assert state.memory_positions is not None
            total += 2 * batch * state.memory_positions.shape[1] * part.width * 8
    return total + (0 if state.memory_positions is None else state.memory_positions.numel() * 8)


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def operations(*names: str) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(["step", "step", *names]), max_size=8)


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=15, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3), capacity=st.integers(0, 6))
def test_step_rollback_select(name: str, data: st.DataObject, batch: int, capacity: int) -> None:
    model = MODELS[name]()
    mirror = Mirror(model, model.start(batch, capacity), data)
    mirror.run(["step", *data.draw(operations("rollback", "select"))])


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=15, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3), capacity=st.integers(0, 6))
def test_step_rollback_select_keep(name: str, data: st.DataObject, batch: int, capacity: int) -> None:
    model = MODELS[name]()
    mirror = Mirror(model, model.start(batch, capacity), data)
    mirror.run(["step", *data.draw(operations("rollback", "select", "keep", "keep"))])


@pytest.mark.parametrize("name", ["eager", "sdpa"])
@settings(max_examples=10, suppress_health_check=SLOW)
@given(data=st.data())
def test_the_same_by_every_kernel(name: str, data: st.DataObject) -> None:
    model = MODELS["rotary, grouped"]()
    with kernel(name):
        Mirror(model, model.start(2, 4), data).run(["step", *data.draw(operations("rollback", "select", "keep"))])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_padded_and_packed_passes_are_separate_passes(name: str) -> None:
    model = MODELS[name]()
    texts = [torch.randint(VOCABULARY, (length,)) for length in (5, 1, 7, 3)]
    alone = [model(text[None])[0] for text in texts]
    longest = 8
    for side in ("left", "right"):
        tokens, positions = torch.zeros(4, longest, dtype=torch.long), torch.full((4, longest), -1)
        at = [slice(longest - len(text), longest) if side == "left" else slice(0, len(text)) for text in texts]
        for row, text in enumerate(texts):
            tokens[row, at[row]], positions[row, at[row]] = text, torch.arange(len(text))
        logits, state = model(tokens, positions), model.start(4, 2)
        read = model.step(tokens, state, positions)
        assert torch.isfinite(logits).all()
        for row in range(4):
            torch.testing.assert_close(logits[row, at[row]], alone[row], **CLOSE)
            torch.testing.assert_close(read[row, at[row]], alone[row], **CLOSE)
        # The prefilled state goes on from each row's own length.
        assert state.lengths == [5, 1, 7, 3]
        after = model.step(torch.full((4, 1), 3), state)
        for row, text in enumerate(texts):
            longer = model(torch.cat((text, torch.tensor([3])))[None])[0, -1:]
            torch.testing.assert_close(after[row], longer, **CLOSE)
    packed, segments = torch.cat(texts)[None], torch.tensor([[0] * 5 + [1] + [2] * 7 + [3] * 3])
    torch.testing.assert_close(model(packed, segments=segments)[0], torch.cat(alone), **CLOSE)
    ends = torch.cat([torch.arange(len(text)) for text in texts])[None]
    torch.testing.assert_close(model(packed, ends, segments)[0], torch.cat(alone), **CLOSE)


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=10, suppress_health_check=SLOW)
@given(data=st.data())
def test_a_tree_of_drafts_is_its_branches(name: str, data: st.DataObject) -> None:
    """Each node of the tree gets the logits of its own branch; one branch is kept and read on from."""
    model, size = MODELS[name](), data.draw(st.integers(1, 6))
    prompts = torch.randint(VOCABULARY, (2, 4))
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(size)]
    drafts = torch.randint(VOCABULARY, (2, size))
    paths = [[node] for node in range(size)]
    for path in paths:
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
    state = model.start(2, 5)
    model.step(prompts, state)
    positions = torch.tensor([[4 + len(path) - 1 for path in paths]]).expand(2, size)
    visible = torch.ones(2, size, 4 + size, dtype=torch.bool)
    for node, path in enumerate(paths):
        visible[:, node, 4:] = torch.tensor([other in path for other in range(size)])
    logits = model.step(drafts, state, positions, visible)
    for node, path in enumerate(paths):
        whole = model(torch.cat((prompts, drafts[:, path]), 1))[:, -1]
        torch.testing.assert_close(logits[:, node], whole, **CLOSE)
    chosen = [data.draw(st.sampled_from(paths)) for _ in range(2)]
    keep = torch.ones(2, 4 + size, dtype=torch.bool)
    keep[:, 4:] = torch.tensor([[node in path for node in range(size)] for path in chosen])
    state.keep(keep)
    state.rollback([4 + len(path) for path in chosen])
    assert state.lengths == [4 + len(path) for path in chosen]
    after = model.step(torch.full((2, 2), 5), state)
    for row, path in enumerate(chosen):
        text = torch.cat((prompts[row], drafts[row, path], torch.tensor([5, 5])))
        torch.testing.assert_close(after[row], model(text[None])[0, -2:], **CLOSE)


def test_a_kept_branch_is_as_fast_as_a_plain_state() -> None:
    model = MODELS["rotary, grouped"]()
    state = model.start(1, 9)
    model.step(torch.tensor([[1, 2]]), state)
    model.step(torch.tensor([[3, 4]]), state, torch.tensor([[2, 2]]))
    assert not state.slots.ordered
    state.keep(torch.tensor([[True, True, False, True]]))
    state.rollback([3])
    assert state.slots.ordered and state.slots.used == [3]
    state.keep(torch.tensor([[False, True, True]]))
    assert not state.slots.ordered
    state.rollback([0])
    assert state.slots.ordered and state.slots.used == [0]


@pytest.mark.parametrize("name", sorted(MODELS))
def test_padding_may_stay_where_it_is(name: str) -> None:
    """Padding behind a row's tokens is not rolled back; later tokens then lie out of order, and all goes on well."""
    model = MODELS[name]()
    tokens = torch.randint(VOCABULARY, (2, 9))
    state = model.start(2, 4)
    with torch.no_grad():
        model.step(tokens[:, :3], state, torch.tensor([[0, 1, 2], [0, -1, -1]]))
        assert state.lengths == [3, 1] and state.slots.ordered and not state.slots.even
        model.step(tokens[:, 3:6], state)
        assert state.lengths == [6, 4] and not state.slots.ordered
        state.rollback([5, 3])
        assert state.lengths == [5, 3] and state.slots.used == [5, 5]
        logits = model.step(tokens[:, 6:], state)
        for row, text in enumerate((tokens[0, [0, 1, 2, 3, 4, 6, 7, 8]], tokens[1, [0, 3, 4, 6, 7, 8]])):
            torch.testing.assert_close(logits[row], model(text[None])[0, -3:], **CLOSE)
    state.keep(torch.ones(2, 8, dtype=torch.bool))
    assert state.slots.used == state.lengths == [8, 6] and state.slots.ordered


def test_growing_at_least_doubles_and_keeps_the_rest() -> None:
    model = MODELS["learned"]()
    state, capacities = model.start(1, 1), []
    for _ in range(20):
        model.step(torch.tensor([[1]]), state)
        capacities.append(state.slots.capacity)
    assert sorted(set(capacities)) == [1, 2, 4, 8, 16, 32]
    state.rollback([0])
    assert state.slots.capacity == 32 and state.lengths == [0]
    model.step(torch.ones(1, 100, dtype=torch.long), state)
    assert state.slots.capacity == 100


def test_room_asked_for_is_room_enough() -> None:
    model = MODELS["learned"]()
    state, prefixes = model.begin([[1, 2, 3], [4]], 12)
    assert prefixes == [[1, 2, 3], [4]] and state.lengths == [0, 0]
    before = state.nbytes
    model.step(torch.ones(2, 12, dtype=torch.long), state)
    assert state.nbytes == before == held_bytes(model, state)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_state_without_memory_tells_the_bytes_that_it_would_take(name: str) -> None:
    """Also where tensors have no address by which to tell them apart; what is shared is counted once there too."""
    model = MODELS[name]()
    with torch.device("meta"):
        twin = MODELS[name]()
    for batch, capacity in ((1, 1), (3, 70)):
        real, laid_out = model.start(batch, capacity), twin.start(batch, capacity)
        assert laid_out.slots.positions.is_meta and laid_out.nbytes == real.nbytes == held_bytes(model, real)
        before = real.nbytes
        for state in (real, laid_out):
            state.memory_positions = state.slots.positions[:, :1]
        assert laid_out.nbytes == real.nbytes == before


def test_impossible_rollbacks() -> None:
    model = MODELS["learned"]()
    state = model.start(2, 4)
    model.step(torch.ones(2, 3, dtype=torch.long), state)
    for lengths in ([4, 3], [3, -1], [3], [3, 3, 3]):
        with pytest.raises(FormeryError, match="cannot roll"):
            state.rollback(lengths)
    assert state.lengths == [3, 3]


def translation() -> EncoderDecoder:
    def layers(decoding: bool) -> list[Layer]:
        position = RelativeBuckets(3, 8, 10, bidirectional=not decoding)
        mask = causal if decoding else everything
        inner: list[Part] = [Attention(WIDTH, 3, position=position, mask=mask)]
        inner += [CrossAttention(WIDTH, 3)] if decoding else []
        return [Layer([PreNorm(RMSNorm(WIDTH), one) for one in (*inner, MLP(WIDTH, 16))]) for _ in range(1)]

    embedding = Embedding(VOCABULARY, WIDTH)
    encoder = Encoder(embedding, layers(False), RMSNorm(WIDTH))
    return random(EncoderDecoder(encoder, Decoder(embedding, layers(True), RMSNorm(WIDTH), TiedOutput(embedding)), 1))


SOURCES = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6), min_size=1, max_size=3)


@settings(max_examples=30, suppress_health_check=SLOW)
@given(data=st.data(), sources=SOURCES)
def test_encoder_decoder_with_ragged_sources(data: st.DataObject, sources: list[list[int]]) -> None:
    model = translation()
    with torch.no_grad():
        memories = [model.encoder(torch.tensor([source])) for source in sources]
        state, prefixes = model.begin(sources, 3)
    assert prefixes == [[1]] * len(sources)
    mirror = Mirror(model, state, data, memories)
    mirror.run(["step", *data.draw(operations("rollback", "select", "keep"))])


@settings(max_examples=20, suppress_health_check=SLOW)
@given(sources=SOURCES, left=st.booleans(), left_target=st.booleans())
def test_padded_encoder_decoder_is_separate_passes(sources: list[list[int]], left: bool, left_target: bool) -> None:
    model = translation()
    targets = [source[: 1 + len(source) // 2] for source in sources]

    def padded(texts: list[list[int]], left: bool) -> tuple[Tensor, Tensor, list[slice]]:
        longest = max(map(len, texts)) + 1
        tokens, places = (
            torch.zeros(len(texts), longest, dtype=torch.long),
            torch.full((len(texts), longest), -1),
        )
        at = [slice(longest - len(text), longest) if left else slice(0, len(text)) for text in texts]
        for row, text in enumerate(texts):
            tokens[row, at[row]], places[row, at[row]] = torch.tensor(text), torch.arange(len(text))
        return tokens, places, at

    source, source_positions, _ = padded(sources, left)
    tokens, positions, at = padded(targets, left_target)
    logits = model(source, tokens, source_positions, positions)
    for row in range(len(sources)):
        alone = model(torch.tensor([sources[row]]), torch.tensor([targets[row]]))[0]
        torch.testing.assert_close(logits[row, at[row]], alone, **CLOSE)
