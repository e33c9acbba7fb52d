"""Mamba-2: against the recurrence token by token, against transformers, and a decode state that can be taken back."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import from_scratch, noisy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_near_ties import deviation
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.models import Decoder
from formery.parts import (
    Attention,
    CausalConvolution,
    Context,
    Embedding,
    GatedMLP,
    GatedRMSNorm,
    Layer,
    Mamba2,
    Output,
    PreNorm,
    RecurrentState,
    RMSNorm,
    Rotary,
    State,
    build,
)
from formery.parts.mixers.mamba2 import CHUNK

VOCABULARY, WIDTH, REACH = 13, 8, 3
CLOSE: dict[str, float] = {"rtol": 1e-8, "atol": 1e-8}
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def mixer(**options: Any) -> Mamba2:
    """A small mixer of random weights in float64, with steps and decays of all sizes."""
    made = Mamba2(WIDTH, **{"heads": 4, "head_width": 3, "state_width": 5, "reach": REACH, **options}).double()
    for name, weight in made.named_parameters():
        nn.init.normal_(weight, std=1.0 if name in ("log_decay", "step_shift") else 0.5)
    return made


def stack(*inner: Callable[[], nn.Module]) -> Decoder:
    layers = [Layer([PreNorm(RMSNorm(WIDTH), make())]) for make in inner]  # type: ignore[arg-type]
    model = Decoder(Embedding(VOCABULARY, WIDTH), layers, RMSNorm(WIDTH), Output(WIDTH, VOCABULARY)).double()
    nn.init.normal_(model.embedding.weight)
    return model.eval()


def attention() -> Attention:
    return Attention(WIDTH, 2, position=Rotary())


MODELS: dict[str, Callable[[], Decoder]] = {
    "two layers": lambda: stack(mixer, lambda: mixer(groups=2, kernel=2, reach=1)),
    "hybrid": lambda: stack(mixer, attention, lambda: mixer(groups=4, kernel=3)),
    "looped": lambda: (lambda model: Decoder(model.embedding, [model.layers[0]] * 2, None, model.output))(stack(mixer)),
}


def by_the_formula(part: Mamba2, hidden: Tensor) -> Tensor:
    """One row's outputs, token by token and head by head."""
    inner, state = part.heads * part.head_width, part.groups * part.state_width
    gate, read, steps = part.input(hidden).split((inner, inner + 2 * state, part.heads), -1)
    memory = [torch.zeros(part.head_width, part.state_width, dtype=hidden.dtype) for _ in range(part.heads)]
    outputs = []
    for t in range(len(hidden)):
        mixed = torch.zeros_like(read[t]) if part.convolution.shift is None else part.convolution.shift
        for back in range(min(part.kernel, t + 1)):
            mixed = mixed + part.convolution.weight[:, part.kernel - 1 - back] * read[t - back]
        x, keys, queries = (mixed * torch.sigmoid(mixed)).split((inner, state, state))
        heads = []
        for head in range(part.heads):
            group = slice(head // (part.heads // part.groups) * part.state_width, None)
            key, query = keys[group][: part.state_width], queries[group][: part.state_width]
            value = x[head * part.head_width :][: part.head_width]
            step = torch.log1p(torch.exp(steps[t, head] + part.step_shift[head]))
            step = step.clamp(part.shortest_step, math.inf if part.longest_step is None else part.longest_step)
            memory[head] = memory[head] * torch.exp(-step * part.log_decay[head].exp()) + step * value[:, None] * key
            heads.append(memory[head] @ query + part.skip[head] * value)
        y = torch.cat(heads) * gate[t] * torch.sigmoid(gate[t])
        parts = [one / (one.square().mean() + part.epsilon).sqrt() for one in y.chunk(part.groups)]
        outputs.append(part.output(torch.cat(parts) * part.norm.weight))
    return torch.stack(outputs)


def context(positions: list[list[int]], **options: Any) -> Context:
    return Context(torch.tensor(positions), **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"groups": 2, "kernel": 3, "bias": True},
        {"groups": 4, "kernel": 1, "convolution_bias": False, "epsilon": 0.1},
        {"shortest_step": 0.4, "longest_step": 0.9},
        {"heads": 1, "head_width": 1, "state_width": 1, "kernel": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("time", [1, 2, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
def test_chunks_are_the_recurrence(options: dict[str, Any], time: int) -> None:
    part, hidden = mixer(**options), torch.randn(2, time, WIDTH, dtype=torch.float64, requires_grad=True)
    found = part(hidden, context([list(range(time))] * 2, even=True))
    wanted = torch.stack([by_the_formula(part, row) for row in hidden])
    torch.testing.assert_close(found, wanted, **CLOSE)
    if time <= CHUNK + 1:
        weights, toward = [hidden, *part.parameters()], torch.randn_like(found)
        slopes = [torch.autograd.grad((one * toward).sum(), weights) for one in (found, wanted)]
        for one, other in zip(*slopes, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@settings(max_examples=40)
@given(data=st.data(), kernel=st.integers(1, 5), rows=st.integers(1, 3))
def test_padding_leaves_no_trace_and_sequences_do_not_mix(data: st.DataObject, kernel: int, rows: int) -> None:
    """Rows of several sequences with padding before, between and within them; what padding holds is of no account."""
    part, time = mixer(kernel=kernel), data.draw(st.integers(1, 12))
    positions: list[list[int]] = []
    texts: list[tuple[int, list[int]]] = []
    for row in range(rows):
        places: list[int] = []
        for _ in range(time):
            kind = data.draw(st.sampled_from(["next", "next", "next", "padding", "new"]))
            real = [one for one in places if one >= 0]
            places.append(-1 if kind == "padding" else 0 if kind == "new" or not real else real[-1] + 1)
            if places[-1] == 0:
                texts.append((row, []))
            if places[-1] >= 0:
                texts[-1][1].append(len(places) - 1)
        positions.append(places)
    hidden = torch.randn(rows, time, WIDTH, dtype=torch.float64)
    found = part(hidden, context(positions))
    assert torch.isfinite(found).all()
    for row, at in texts:
        torch.testing.assert_close(found[row, at], by_the_formula(part, hidden[row, at]), **CLOSE)


def test_sequences_packed_over_chunks() -> None:
    part, lengths = mixer(), [3, CHUNK, 1, 2 * CHUNK, 7]
    texts = [torch.randn(length, WIDTH, dtype=torch.float64) for length in lengths]
    segments = torch.cat([torch.full((length,), i) for i, length in enumerate(lengths)])
    places = [place for length in lengths for place in range(length)]
    visible = segments[None, :, None] == segments[None, None, :]
    packed = part(torch.cat(texts)[None], context([places], visible=visible))[0]
    torch.testing.assert_close(packed, torch.cat([by_the_formula(part, one) for one in texts]), **CLOSE)


def test_long_and_short_steps_stay_exact_in_float32() -> None:
    """After much has been forgotten in a chunk, a slow decay is still told to the last bits."""
    part = mixer(heads=2).requires_grad_(False)
    part.log_decay.fill_(4.0)
    part.step_shift.fill_(0.0)
    part.input.weight[-2:] = 0
    part.input.weight[-2:, 0] = 1.0
    hidden = torch.randn(1, CHUNK, WIDTH, dtype=torch.float64)
    hidden[0, :, 0] = torch.tensor([40.0] * (CHUNK - 8) + [-12.0] * 8)
    wanted = by_the_formula(part, hidden[0])[-8:]
    found = part.float()(hidden.float(), context([list(range(CHUNK))], even=True))[0, -8:]
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def theirs_and_ours(groups: int, bias: bool) -> tuple[Mamba2ForCausalLM, Decoder]:
    """A small model of transformers, and ours with the very same weights."""
    config = Mamba2Config(
        vocab_size=29,
        hidden_size=16,
        num_heads=8,
        head_dim=4,
        state_size=6,
        num_hidden_layers=2,
        n_groups=groups,
        use_bias=bias,
        use_conv_bias=groups == 1,
        layer_norm_epsilon=1e-4,
        chunk_size=16,
        pad_token_id=0,
    )
    theirs = Mamba2ForCausalLM(config).eval()
    for name, weight in theirs.named_parameters():
        if name.endswith(("conv1d.bias", "_proj.bias", "norm.weight", "D")):
            nn.init.normal_(weight, mean=1.0, std=0.3)

    def layer() -> Layer:
        inner = Mamba2(16, 8, 4, 6, groups, 4, bias, groups == 1, 1e-4)
        return Layer([PreNorm(RMSNorm(16, 1e-4), inner)])

    ours = Decoder(Embedding(29, 16), [layer(), layer()], RMSNorm(16, 1e-4), Output(16, 29)).eval()
    names = {
        "embedding.weight": "backbone.embeddings.weight",
        "norm.weight": "backbone.norm_f.weight",
        "output.map.weight": "lm_head.weight",
    }
    inner = {
        "input.weight": "in_proj.weight",
        "input.shift": "in_proj.bias",
        "convolution.weight": "conv1d.weight",
        "convolution.shift": "conv1d.bias",
        "step_shift": "dt_bias",
        "log_decay": "A_log",
        "skip": "D",
        "norm.weight": "norm.weight",
        "output.weight": "out_proj.weight",
        "output.shift": "out_proj.bias",
    }
    for number in range(2):
        own, other = f"layers.{number}.sublayers.0", f"backbone.layers.{number}"
        names[f"{own}.norm.weight"] = f"{other}.norm.weight"
        names |= {f"{own}.inner.{key}": f"{other}.mixer.{value}" for key, value in inner.items()}
    weights = theirs.state_dict()
    shared = {own: weights.pop(other) for own, other in names.items() if other in weights}
    assert not weights
    ours.load_state_dict({name: one.squeeze(1) if one.dim() == 3 else one for name, one in shared.items()})
    return theirs, ours


@pytest.mark.parametrize(("groups", "bias"), [(1, False), (2, True), (8, False)])
@torch.no_grad()
def test_the_same_as_transformers(groups: int, bias: bool) -> None:
    theirs, ours = theirs_and_ours(groups, bias)
    tokens = torch.randint(29, (3, 90))
    wanted = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), wanted, rtol=1e-4, atol=1e-4)
    # Cached: a beginning at once, then token by token, in both.
    seen = theirs(tokens[:, :40], use_cache=True)
    state = ours.start(3, 90)
    torch.testing.assert_close(ours.step(tokens[:, :40], state), seen.logits, rtol=1e-4, atol=1e-4)
    for at in range(40, 60):
        seen = theirs(tokens[:, at : at + 1], cache=seen.cache, use_cache=True)
        found = ours.step(tokens[:, at : at + 1], state)
        torch.testing.assert_close(found, seen.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[:, 0], wanted[:, at], rtol=1e-4, atol=1e-4)


class Mirror:
    """A state, and for each row the tokens it should have read; compared with passes from scratch.

    back: how far each row can surely go back, besides to 0.
    """

    def __init__(self, model: Decoder, batch: int, data: st.DataObject):
        self.model, self.data, self.clock = model, data, 0
        self.state = model.start(batch, data.draw(st.integers(0, 6)))
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.back = [0] * batch
        self.reach = min(part.reach for part in model.modules() if isinstance(part, Mamba2))

    def step(self) -> None:
        """Reads up to 12 tokens in each row: evenly, or with padding wherever it falls."""
        batch, random = len(self.rows), torch.Generator().manual_seed(self.clock)
        time = self.data.draw(st.integers(1, 12))
        ids = torch.randint(VOCABULARY, (batch, time), generator=random)
        kind = self.data.draw(st.sampled_from(["even", "behind", "anywhere"]))
        if kind == "even":
            real = torch.ones(batch, time, dtype=torch.bool)
        elif kind == "behind":
            real = torch.arange(time) < torch.randint(time + 1, (batch, 1), generator=random)
        else:
            real = torch.rand(batch, time, generator=random) < 0.6
        starts = torch.tensor([len(row) for row in self.rows])[:, None]
        positions = (starts + real.cumsum(1) - 1).masked_fill(~real, -1)
        with torch.no_grad():
            logits = self.model.step(ids, self.state, None if kind == "even" else positions)
        for row, tokens in enumerate(self.rows):
            self.back[row] = max(self.back[row], len(tokens) - self.reach)
            tokens += ids[row][real[row]].tolist()
            if real[row].any():
                with torch.no_grad():
                    wanted = self.model(torch.tensor([tokens]))[0, -int(real[row].sum()) :]
                torch.testing.assert_close(logits[row][real[row]], wanted, **CLOSE)
        if kind != "even" and self.data.draw(st.booleans()):
            self.state.rollback(self.state.lengths)

    def rollback(self) -> None:
        lengths = [
            self.data.draw(st.integers(max(0, back), len(row)) | st.sampled_from([0, len(row)]))
            for row, back in zip(self.rows, self.back, strict=True)
        ]
        self.state.rollback(lengths)
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]
        self.back = [back if length else 0 for back, length in zip(self.back, lengths, strict=True)]

    def select(self) -> None:
        rows = self.data.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.state.select(rows)
        self.rows, self.back = [[*self.rows[row]] for row in rows], [self.back[row] for row in rows]

    def keep(self) -> None:
        """Drops padding, and no token."""
        self.state.keep(self.state.slots.positions >= 0)

    def run(self, operations: list[str]) -> None:
        for name in [*operations, "step"]:
            self.clock += 1
            getattr(self, name)()
            assert self.state.lengths == [len(row) for row in self.rows]


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=30, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3))
def test_step_rollback_select(name: str, data: st.DataObject, batch: int) -> None:
    operations = st.lists(st.sampled_from(["step", "step", "rollback", "rollback", "select", "keep"]), max_size=9)
    Mirror(MODELS[name](), batch, data).run(["step", *data.draw(operations)])


def recurrent(model: Decoder, state: Any) -> list[RecurrentState]:
    return [one for one in state.layers.values() if isinstance(one, RecurrentState)]


def test_what_is_held_does_not_grow_with_the_text() -> None:
    model, tokens = stack(mixer), torch.randint(VOCABULARY, (2, 60))
    part = model.layers[0].sublayers[0].inner
    assert isinstance(part, Mamba2)
    row = 2 * part.heads * part.head_width * part.state_width + 2 * (part.kernel - 1) * part.channels
    wanted = 2 * 8 * (row + 2 * REACH * (part.channels + part.heads))
    state = model.start(2, 400)
    slots = state.slots.positions.numel() * 8
    assert state.nbytes == wanted + slots
    with torch.no_grad():
        model.step(tokens, state)  # a long prompt can be taken back as a whole, until the next pass
        assert state.nbytes == wanted + slots + 2 * 8 * (60 - REACH) * (part.channels + part.heads)
        for time in (1, 2, 1, 3, *[1] * 20):
            model.step(tokens[:, :time], state)
            assert state.nbytes == wanted + slots
        state.rollback([length - REACH for length in state.lengths])
        assert state.nbytes == wanted + slots
        model.step(tokens, state)
        state.rollback([0, 0])
        model.step(tokens[:, :1], state)
        assert state.nbytes == wanted + slots


def test_the_memory_is_at_least_float32() -> None:
    model = stack(mixer).to(torch.bfloat16)
    state = model.start(1, 4)
    with torch.no_grad():
        assert model.step(torch.tensor([[1, 2]]), state).dtype == torch.bfloat16
    [own] = recurrent(model, state)
    assert [one.dtype for one in own.carried] == [torch.bfloat16, torch.float32]


@torch.no_grad()
def test_going_back_too_far_is_told() -> None:
    model, tokens = stack(mixer), torch.randint(VOCABULARY, (2, 40))
    state = model.start(2, 40)
    model.step(tokens[:, :30], state)
    state.rollback([30, 25])
    state.rollback([4, 25])  # any point of the latest pass, again and again
    model.step(tokens[:, :20], state)
    state.rollback([4 - REACH, 25 - REACH])
    [own] = recurrent(model, state)
    assert own.folded == [1, 22]
    with pytest.raises(FormeryError, match="row 1 cannot be taken back to 21 tokens.*to 22 of its 22 only.*reach"):
        state.rollback([1, 21])
    # Nothing has changed: the state can be read on from where it was.
    torch.testing.assert_close(
        model.step(tokens[:, :9], state)[1], model(torch.cat((tokens[1, :22], tokens[1, :9]))[None])[0, -9:], **CLOSE
    )


def remembered(state: State) -> list[Any]:
    """All that a state holds, in values of its own."""
    slots = state.slots
    own = [(one.folded[:], one.lengths[:]) for one in state.layers.values() if isinstance(one, RecurrentState)]
    held = [tensor.clone() for layer in state.layers.values() for tensor in layer.tensors()]
    return [slots.used[:], slots.lengths[:], slots.ordered, own, slots.positions.clone(), *held]


@pytest.mark.parametrize("name", sorted(MODELS))
@torch.no_grad()
def test_what_is_refused_changes_nothing(name: str) -> None:
    """Not in the layers before the one that refuses, nor in the slots; later passes are as if nobody had asked."""
    model, tokens = MODELS[name](), torch.randint(VOCABULARY, (2, 40))
    if name == "two layers":  # the first could go back further than the second
        model.layers[1].sublayers[0].inner.reach = 1
    state = model.start(2, 4)
    for time in (9, *[1] * 7):
        model.step(tokens[:, state.lengths[0] : state.lengths[0] + time], state)
    before = remembered(state)
    folded = max(max(one.folded) for one in recurrent(model, state))
    alone = torch.ones(2, 16, dtype=torch.bool)
    alone[1, 5] = False
    refused: list[tuple[Callable[[], None], str]] = [
        (lambda: state.rollback([16, folded - 1]), "row 1 cannot be taken back"),
        (lambda: state.rollback([0, 1]), "row 1 cannot be taken back"),
        (lambda: state.rollback([17, 3]), "cannot roll a state"),
        (lambda: state.keep(alone), "cannot drop single tokens"),
    ]
    for ask, says in refused:
        with pytest.raises(FormeryError, match=says):
            ask()
        for one, other in zip(remembered(state), before, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    torch.testing.assert_close(model.step(tokens[:, 16:20], state), model(tokens[:, :20])[:, 16:], **CLOSE)


@torch.no_grad()
def test_only_chains_can_be_read() -> None:
    model, tokens = MODELS["hybrid"](), torch.randint(VOCABULARY, (2, 4))

    def read(positions: list[int], visible: Tensor | None = None) -> None:
        state = model.start(2, 9)
        model.step(tokens, state)
        ids = torch.randint(VOCABULARY, (2, len(positions)))
        logits = model.step(ids, state, torch.tensor([positions] * 2), visible)
        kept = [at for at, position in enumerate(positions) if position >= 0]
        torch.testing.assert_close(logits[:, kept], model(torch.cat((tokens, ids[:, kept]), 1))[:, 4:], **CLOSE)

    def refused(positions: list[int], visible: Tensor | None = None) -> None:
        with pytest.raises(FormeryError, match="can only read chains|tokens were left out"):
            read(positions, visible)

    everything = torch.ones(2, 3, 7, dtype=torch.bool)
    for positions, visible in (([4, 5, 6], None), ([4, 5, 6], everything), ([-1, 4, 5], None)):
        read(positions, visible)
    chain = everything.clone()
    chain[:, :, 4:] = torch.ones(3, 3).tril()
    read([4, 5, 6], chain)
    for hidden in ((0, 2), (2, 4), (1, 3)):
        chain[:, *hidden] = False
        refused([4, 5, 6], chain)
        chain[:, *hidden] = True
    siblings = everything.clone()
    siblings[:, 2, 5] = False
    refused([4, 5, 5], siblings)
    for positions in ([4, 5, 5], [5, 4, 6], [4, 4, 6], [4, 6, 7], [5, 6, 7], [3, 4, 5], [4, 0, 1], [0, 1, 2]):
        refused(positions)
    for unordered in ([1, 0, 2, 3], [3, 0, 1, 2]):  # as many as the state counts, but not one after the other
        with pytest.raises(FormeryError, match="can only read chains"):
            model.step(tokens, model.start(2, 4), torch.tensor([unordered] * 2))
    with pytest.raises(FormeryError, match="can only read chains"):
        model(tokens, torch.tensor([[0, 1, 3, 4]] * 2))
    for segments in ([0, 0, 1, 1], [0, 1, 1, 0]):  # positions that do not begin anew do not fit
        with pytest.raises(FormeryError, match="can only read chains"):
            model(tokens, torch.arange(4).expand(2, 4), torch.tensor([segments] * 2))


@torch.no_grad()
def test_tokens_cannot_be_dropped() -> None:
    model = stack(mixer)
    state = model.start(2, 9)
    model.step(torch.ones(2, 3, dtype=torch.long), state, torch.tensor([[0, 1, 2], [0, -1, -1]]))
    state.keep(torch.tensor([[True, True, True], [True, False, False]]))
    with pytest.raises(FormeryError, match="cannot drop single tokens"):
        state.keep(torch.tensor([[True, False, True], [True, False, False]]))


def speaker(kind: str, reach: int = 8) -> Decoder:
    """A model of random weights whose output varies: what it says depends on all that it has read."""
    width, vocabulary = 24, 97

    def layer(inner: nn.Module) -> Layer:
        return Layer(
            [PreNorm(RMSNorm(width), inner), PreNorm(RMSNorm(width), GatedMLP(width, 32))]  # type: ignore[arg-type]
        )

    def mamba() -> Mamba2:
        return Mamba2(width, 6, 8, 8, 2, reach=reach)

    second = Attention(width, 4, 2, position=Rotary()) if kind == "hybrid" else mamba()
    embedding = Embedding(vocabulary, width, deviation=0.2)
    return Decoder(embedding, [layer(mamba()), layer(second)], RMSNorm(width), Output(width, vocabulary)).eval()


@pytest.mark.parametrize("kind", ["mamba2", "hybrid"])
def test_every_method_writes_what_greedy_writes(kind: str) -> None:
    model = speaker(kind)
    draft = noisy(model, 0.05)
    prompts = [[5, 7, 9], [4], [11, 3, 8, 6, 5] * 5, list(range(20, 31)), [12, 12, 12, 12, 12, 12]]
    asked = Settings(max_new_tokens=16)
    wanted = [from_scratch(model, prompt, asked)[0] for prompt in prompts]
    assert min(len(set(one)) for one in wanted) > 6
    methods: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {}),
        ("aggressive-decoding", {}),
        ("parallel-jacobi-decoding", {}),
        ("parallel-jacobi-decoding", {"form": "plain"}),
        ("speculative-sampling", {"draft": draft, "length": 4}),
    ]
    for method, options in methods:
        for batch in (1, 5):
            found = generate(model, prompts, method, batch, max_new_tokens=16, **options)
            assert [one.tokens for one in found] == wanted, (method, batch)
        if method == "speculative-sampling":
            assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_logits_with_a_state_are_off_by_rounding_only(dtype: torch.dtype, scale: float) -> None:
    target = speaker("hybrid").to(dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in target.parameters():
            if weight.dim() > 1:
                weight *= scale
    texts = [torch.randint(0, 97, (21 - row % 7,), generator=random).tolist() for row in range(6)]
    pairs = [(text, text) for text in texts]
    worst = max(deviation(target, pairs[:rows], width, rows) for width, rows in ((1, 1), (1, 6), (3, 5), (8, 6)))
    assert worst < 0.5 and (worst > 0 or dtype == torch.bfloat16)  # a few sums in 16 bits come out the same


def test_a_description_makes_an_equal_part() -> None:
    for part in (
        Mamba2(8, 4, 3, 5, 2, 3, True, False, 1e-3, 0.1, 0.5, 7),
        CausalConvolution(6, 3, False),
        GatedRMSNorm(8, 2, 1e-3),
    ):
        twin = build(json.loads(json.dumps(part.describe())))
        assert twin.describe() == part.describe() and repr(twin) == repr(part)
    with torch.device("meta"):
        assert {one.device.type for one in Mamba2(8, 4, 3, 5).parameters()} == {"meta"}
    for wrong in ({"heads": 3, "groups": 2}, {"groups": 0}, {"kernel": 0}, {"reach": 0}):
        data = {**Mamba2(8, 4, 3, 5).describe(), **wrong}
        with pytest.raises(FormeryError, match="Mamba2 cannot be made"):
            build(data)


def test_fresh_weights_have_steps_and_decays_as_published() -> None:
    part = Mamba2(8, 500, 1, 1)
    steps, decays = nn.functional.softplus(part.step_shift.detach()), part.log_decay.detach().exp()
    assert 0.001 <= float(steps.min()) < 0.0015 and 0.07 < float(steps.max()) <= 0.1001
    assert 1 <= float(decays.min()) < 1.5 and 15.5 < float(decays.max()) <= 16
