"""RetNet: three forms of one retention, against the formula token by token, and a state that can be taken back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import from_scratch, noisy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mamba2 import CLOSE, Mirror, context
from test_near_ties import deviation
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.methods.attention.retnet import retnet
from formery.models import Decoder
from formery.parts import Attention, Embedding, Layer, Output, PreNorm, RMSNorm, Rotary, build
from formery.parts.mixers.retention import Retention, ages_of, chunkwise, parallel, recurrent
from formery.parts.order import Chain
from formery.parts.recurrence import RecurrentState

VOCABULARY, WIDTH, REACH = 13, 8, 3
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def mixer(**options: Any) -> Retention:
    """A small mixer of random weights in float64 whose heads forget soon."""
    given_ = {"heads": 2, "position": Rotary(), "shortest": 2.0, "longest": 9.0, "chunk": 4, "reach": REACH, **options}
    made = Retention(WIDTH, **given_).double()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.5)
    return made.eval()


def stack(*inner: Callable[[], nn.Module]) -> Decoder:
    layers = [Layer([PreNorm(RMSNorm(WIDTH), make())]) for make in inner]  # type: ignore[arg-type]
    model = Decoder(Embedding(VOCABULARY, WIDTH), layers, RMSNorm(WIDTH), Output(WIDTH, VOCABULARY)).double()
    nn.init.normal_(model.embedding.weight)
    return model.eval()


MODELS: dict[str, Callable[[], Decoder]] = {
    "two layers": lambda: stack(mixer, lambda: mixer(heads=4, value_width=4, chunk=1, reach=1)),
    "hybrid": lambda: stack(mixer, lambda: Attention(WIDTH, 2, position=Rotary()), lambda: mixer(position=None)),
    "looped": lambda: (lambda model: Decoder(model.embedding, [model.layers[0]] * 2, None, model.output))(stack(mixer)),
}


def by_the_formula(part: Retention, hidden: Tensor) -> Tensor:
    """One row's outputs by the sum over all earlier tokens, head by head, with rotations as complex numbers."""
    time, dim, inner = len(hidden), WIDTH // part.heads, part.inner // part.heads
    tokens = (part.shortest, part.longest)
    lengths = [tokens[0] * (tokens[1] / tokens[0]) ** (head / max(1, part.heads - 1)) for head in range(part.heads)]
    angle = torch.arange(time)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones_like(angle), angle) if part.position is not None else torch.ones_like(angle)
    query, key = (
        torch.complex(*one(hidden).view(time, part.heads, dim).chunk(2, -1)) * turn[:, None]
        for one in (part.query, part.key)
    )
    value = part.value(hidden).view(time, part.heads, inner)
    rows = []
    for n in range(time):
        heads = []
        for head in range(part.heads):
            total = torch.zeros(inner, dtype=hidden.dtype)
            for m in range(n + 1):
                score = (query[n, head] * key[m, head].conj()).sum().real * dim**-0.5
                total = total + (1 - 1 / lengths[head]) ** (n - m) * score * value[m, head]
            heads.append((total - total.mean()) / (total.var(correction=0) + part.epsilon).sqrt())
        gate = part.gate(hidden[n])
        rows.append(part.output(gate * torch.sigmoid(gate) * torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, {"heads": 1, "value_width": 3}, {"heads": 4, "position": None}, {"epsilon": 0.1}], ids=str
)
@pytest.mark.parametrize("time", [1, 2, 4, 11])
def test_it_is_the_formula(options: dict[str, Any], time: int) -> None:
    part, hidden = mixer(**options), torch.randn(2, time, WIDTH, dtype=torch.float64, requires_grad=True)
    found = part(hidden, context([list(range(time))] * 2, even=True))
    wanted = torch.stack([by_the_formula(part, row) for row in hidden])
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the tables of rotations are of 32 bits
    weights, toward = [hidden, *part.parameters()], torch.randn_like(found)
    slopes = [torch.autograd.grad((one * toward).sum(), weights) for one in (found, wanted)]
    for one, other in zip(*slopes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3), time=st.integers(1, 70), heads=st.integers(1, 3), chunk=st.integers(1, 70),
    longest=st.floats(1.5, 1000), widths=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_three_forms_are_one(
    batch: int, time: int, heads: int, chunk: int, longest: float, widths: tuple[int, int], seed: int
) -> None:
    """In 32 bits, to 1e-5 of what is largest, in outputs, gradients and memory."""
    torch.manual_seed(seed)
    rates = torch.log1p(-1 / torch.linspace(1.2, longest, heads, dtype=torch.float64))
    key, query = (torch.randn(batch, time, heads, widths[0]) * widths[0] ** -0.5 for _ in range(2))
    value, memory = torch.randn(batch, time, heads, widths[1]), torch.zeros(batch, heads, *widths)
    inputs = [one.requires_grad_() for one in (query, key, value)]
    ages, sequences = ages_of(Chain([time] * batch), key)
    lower = torch.ones(1, time, time, dtype=torch.bool).tril()
    step, end = recurrent(*inputs, rates, memory)
    pieces, last = chunkwise(*inputs, rates, memory, ages, sequences, chunk)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5 * float(end.detach().abs().max()))
    toward, found = torch.randn_like(step), [parallel(*inputs, rates, ages, lower), step, pieces]
    slopes = [torch.autograd.grad((one * toward).sum(), inputs) for one in found]
    for one, gradients in zip(found[:2], slopes[:2], strict=True):
        for own, other in zip((one, *gradients), (pieces, *slopes[2]), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * max(1.0, float(other.detach().abs().max())))


@settings(max_examples=25, suppress_health_check=SLOW)
@given(data=st.data(), rows=st.integers(1, 3), chunk=st.integers(1, 13))
def test_padding_leaves_no_trace_and_sequences_do_not_mix(data: st.DataObject, rows: int, chunk: int) -> None:
    part, time = mixer(chunk=chunk), data.draw(st.integers(1, 12))
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
        alone = part(hidden[row, at][None], context([list(range(len(at)))], even=True))[0]
        torch.testing.assert_close(found[row, at], alone, **CLOSE)


class Retold(Mirror):
    def __init__(self, model: Decoder, batch: int, data: st.DataObject):
        self.model, self.data, self.clock = model, data, 0
        self.state = model.start(batch, data.draw(st.integers(0, 6)))
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self.back = [0] * batch
        self.reach = min(part.reach for part in model.modules() if isinstance(part, Retention))


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=7, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3))
def test_step_rollback_select(name: str, data: st.DataObject, batch: int) -> None:
    operations = st.lists(st.sampled_from(["step", "step", "rollback", "rollback", "select", "keep"]), max_size=8)
    Retold(MODELS[name](), batch, data).run(["step", *data.draw(operations)])


@torch.no_grad()
def test_branches_of_a_tree_and_the_path_that_stays() -> None:
    model, text = MODELS["hybrid"](), torch.randint(VOCABULARY, (1, 6))
    drafts, parents = torch.randint(VOCABULARY, (1, 5)), [-1, 0, 0, 2, 3]
    seen = torch.zeros(1, 5, 11, dtype=torch.bool)
    seen[:, :, :6] = True
    depths, ways = [], []
    for place, parent in enumerate(parents):
        ways.append([*(ways[parent] if parent >= 0 else []), place])
        depths.append(5 + len(ways[-1]))
        seen[0, place, [6 + one for one in ways[-1]]] = True
    state = model.start(1, 20)
    model.step(text, state)
    found = model.step(drafts, state, torch.tensor([depths]), seen)
    for place, way in enumerate(ways):
        wanted = model(torch.cat((text, drafts[:, way]), 1))
        torch.testing.assert_close(found[:, place], wanted[:, -1], **CLOSE)
    state.settle([[0, 2, 3]])
    following = torch.randint(VOCABULARY, (1, 2))
    wanted = model(torch.cat((text, drafts[:, [0, 2, 3]], following), 1))[:, -2:]
    torch.testing.assert_close(model.step(following, state), wanted, **CLOSE)


@torch.no_grad()
def test_what_is_held_does_not_grow_with_the_text() -> None:
    model, tokens = stack(mixer), torch.randint(VOCABULARY, (2, 60))
    state, sizes = model.start(2, 400), []
    for time in (60, *[1] * 30, 7, 1, 1):
        model.step(tokens[:, :time], state)
        [own] = [one for one in state.layers.values() if isinstance(one, RecurrentState)]
        sizes.append(sum(one.untyped_storage().nbytes() for one in own.tensors()))
    memory, inputs = 2 * 2 * 2 * 4 * 8, 2 * 2 * REACH * 3 * WIDTH
    assert set(sizes[1:31]) == {8 * (memory + inputs)} and sizes[-1] == sizes[1] < sizes[0]


def test_the_memory_is_at_least_float32() -> None:
    model = stack(mixer).to(torch.bfloat16)
    state = model.start(1, 4)
    with torch.no_grad():
        assert model.step(torch.tensor([[1, 2]]), state).dtype == torch.bfloat16
    [own] = state.layers.values()
    assert isinstance(own, RecurrentState) and own.carried[0].dtype == torch.float32


def speaker() -> Decoder:
    """A model of random weights whose output varies: what it says depends on all that it has read."""
    layers = retnet(97, 24, 2, 2, 32, reach=8).layers
    return Decoder(Embedding(97, 24, deviation=0.2), [*layers], RMSNorm(24), Output(24, 97)).eval()


def test_every_method_writes_what_greedy_writes() -> None:
    model = speaker()
    prompts = [[5, 7, 9], [4], [11, 3, 8, 6, 5] * 5, list(range(20, 31)), [12, 12, 12, 12, 12, 12]]
    wanted = [from_scratch(model, prompt, Settings(max_new_tokens=12))[0] for prompt in prompts]
    assert min(len(set(one)) for one in wanted) > 3
    methods: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {}),
        ("aggressive-decoding", {}),
        ("parallel-jacobi-decoding", {}),
        ("speculative-sampling", {"draft": noisy(model, 0.05), "length": 4}),
    ]
    for method, options in methods:
        for batch in (1, 5):
            found = generate(model, prompts, method, batch, max_new_tokens=12, **options)
            assert [one.tokens for one in found] == wanted, (method, batch)
        if method == "speculative-sampling":
            assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)


def test_logits_with_a_state_are_off_by_rounding_only() -> None:
    random = torch.Generator().manual_seed(1)
    texts = [torch.randint(0, 97, (21 - row % 7,), generator=random).tolist() for row in range(6)]
    pairs = [(text, text) for text in texts]
    assert max(deviation(speaker(), pairs[:rows], width, rows) for width, rows in ((1, 1), (3, 5), (8, 6))) < 0.5


def test_described_rebuilt_and_refused() -> None:
    model = retnet(VOCABULARY, 16, 2, 2, 24, 64, reach=8)
    twin = build(model.describe())
    assert isinstance(twin, Decoder) and twin.describe() == model.describe()
    assert [one.shape for one in twin.parameters()] == [one.shape for one in model.parameters()]
    for options in ({"heads": 3}, {"shortest": 1.0}, {"longest": 1.5}, {"chunk": 0}, {"reach": 0}, {"value_width": 3}):
        with pytest.raises(ValueError, match=r"divide|fade|at least 1"):
            mixer(**options)
    with pytest.raises(FormeryError, match="can only read chains"):
        mixer()(torch.zeros(1, 2, WIDTH, dtype=torch.float64), context([[3, 3]]))
