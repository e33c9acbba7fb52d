"""MASFormer: windows layer by layer, and a rolling cache that holds no more than they see."""

import json
from typing import Any

import pytest
import torch
from generation import from_scratch, noisy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mamba2 import context
from test_state import CLOSE, MODELS, VOCABULARY, Mirror, decoder
from torch import nn

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.methods.attention.masformer import masformer, scores
from formery.models import Decoder
from formery.models.checkpoint import load, save
from formery.parts import (
    Alibi,
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    Output,
    PreNorm,
    RMSNorm,
    Rotary,
    build,
    causal,
    everything,
    prefix,
    rolling,
    window,
)
from formery.parts.local import BLOCK, LocalAttention, hides_future, localised, span_of
from formery.parts.rolling import BACK, RollingKeyValues

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
KINDS = ("rotary, grouped", "learned", "alibi", "buckets", "parallel, post-norm", "looped", "window")


def full(kind: str) -> tuple[int, ...]:
    """The last of two layers; none where all layers are one."""
    return () if kind == "looped" else (1,)


def masked(model: Decoder, wide: tuple[int, ...], span: int) -> Decoder:
    """The same windows as masks of plain attention, whose cache holds everything."""
    twin = build(json.loads(json.dumps(model.describe())))
    assert isinstance(twin, Decoder)
    twin.to(next(model.parameters()).dtype).load_state_dict(model.state_dict())
    layers = [part for part in twin.modules() if isinstance(part, Attention)]
    for number, part in enumerate(layers):
        if number not in wide:
            part.mask = part.mask & window(span)
    return twin.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("time", [5, 2 * BLOCK + 9])
@torch.no_grad()
def test_windows_are_masks(kind: str, time: int) -> None:
    """From scratch and into a state, at once, in blocks, and token by token."""
    model, tokens = MODELS[kind](), torch.randint(VOCABULARY, (2, time))
    for span in (1, 4, BLOCK + 3):
        own, other = masformer(model, full(kind), span), masked(model, full(kind), span)
        wanted = other(tokens)
        torch.testing.assert_close(own(tokens), wanted, **CLOSE)
        state = own.start(2, 7)
        found = [own.step(piece, state) for piece in (tokens[:, :-4], *tokens[:, -4:].split(1, 1)) if piece.shape[1]]
        torch.testing.assert_close(torch.cat(found, 1), wanted, **CLOSE)


def test_gradients_of_blocks_are_those_of_the_mask() -> None:
    model, tokens = decoder(Rotary(), key_value_heads=2), torch.randint(VOCABULARY, (2, 2 * BLOCK + 9))
    slopes = []
    for one in (masformer(model, (), 5), masked(model, (), 5)):
        one(tokens).square().sum().backward()
        slopes.append([weight.grad for weight in one.parameters()])
    for own, other in zip(*slopes, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)


class Rolling(Mirror):
    """A mirror that goes back no further than is promised: `BACK` tokens before each pass, or to the beginning."""

    def __init__(self, model: Decoder, state: Any, data: st.DataObject):
        super().__init__(model, state, data)
        self.back = [0] * state.batch

    def step(self) -> None:
        self.back = [max(back, length - rolling.BACK) for back, length in zip(self.back, self.next, strict=True)]
        super().step()

    def rollback(self) -> None:
        self.next = [
            self.draw(st.integers(min(max(0, back), length), length) | st.sampled_from([0, length]))
            for back, length in zip(self.back, self.next, strict=True)
        ]
        self.state.rollback(self.next)
        self.back = [back if length else 0 for back, length in zip(self.back, self.next, strict=True)]
        self.rows = [
            [one for one in row if one.position < length] for row, length in zip(self.rows, self.next, strict=True)
        ]

    def select(self) -> None:
        rows = self.draw(st.lists(st.integers(0, len(self.rows) - 1), min_size=1, max_size=4))
        self.draw = lambda _: rows  # type: ignore[method-assign]
        super().select()
        del self.draw  # type: ignore[method-assign]
        self.back = [self.back[row] for row in rows]

    def check(self) -> None:
        assert self.state.lengths == self.next
        for own in self.state.layers.values():
            if isinstance(own, RollingKeyValues):
                most = own.span - 1 + rolling.BACK + max(rolling.BACK, own.latest)
                assert all(one.shape[1] <= most for one in own.tensors())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3), span=st.integers(1, 4), back=st.integers(1, 4))
def test_step_rollback_select_keep(kind: str, data: st.DataObject, batch: int, span: int, back: int) -> None:
    names = st.sampled_from(["step", "step", "step", "rollback", "select", "keep"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rolling, "BACK", back)
        model = masformer(MODELS[kind](), full(kind), span)
        Rolling(model, model.start(batch, 3), data).run(["step", *data.draw(st.lists(names, max_size=10))])


@torch.no_grad()
def test_branches_of_a_tree_and_the_path_that_stays() -> None:
    model, text = masformer(decoder(Rotary()), (0,), 3), torch.randint(VOCABULARY, (2, 9))
    drafts, parents = torch.randint(VOCABULARY, (2, 5)), [-1, 0, 0, 2, 3]
    seen, ways = torch.zeros(2, 5, 14, dtype=torch.bool), []
    seen[:, :, :9] = True
    for place, parent in enumerate(parents):
        ways.append([*(ways[parent] if parent >= 0 else []), place])
        seen[:, place, [9 + one for one in ways[-1]]] = True
    state = model.start(2, 20)
    for piece in text.split(1, 1):
        model.step(piece, state)
    found = model.step(drafts, state, torch.tensor([[8 + len(way) for way in ways]] * 2), seen)
    for place, way in enumerate(ways):
        wanted = model(torch.cat((text, drafts[:, way]), 1))[:, -1]
        torch.testing.assert_close(found[:, place], wanted, **CLOSE)
    state.settle([[0, 2, 3], [0]])
    ids = torch.randint(VOCABULARY, (2, 1))
    after = [
        torch.cat((text[:1], drafts[:1, [0, 2, 3]], ids[:1]), 1),
        torch.cat((text[1:], drafts[1:, :1], ids[1:]), 1),
    ]
    found = model.step(ids, state)
    for row, read in enumerate(after):
        torch.testing.assert_close(found[row, 0], model(read)[0, -1], **CLOSE)


@torch.no_grad()
def test_what_is_held_does_not_grow_with_the_text() -> None:
    model, tokens = masformer(decoder(Rotary(), key_value_heads=2), (1,), 7), torch.randint(VOCABULARY, (2, 150))
    state = model.start(2, 200)
    model.step(tokens, state)
    state.rollback([120, 3])  # any point of the latest pass
    sizes = set()
    for _ in range(60):
        model.step(tokens[:, :1], state)
        own, _ = state.layers.values()
        assert isinstance(own, RollingKeyValues)
        sizes.add(sum(one.untyped_storage().nbytes() for one in own.tensors()))
    places = 2 * (7 - 1 + 2 * BACK)
    assert sizes == {places * (2 * 2 * 2 * 8 + 16)}  # two heads of 2 numbers, keys and values; position and slot
    with pytest.raises(FormeryError, match="row 0 cannot go on from 100 tokens: a window of 7 has kept only"):
        state.rollback([100, 60])
    state.rollback([180 - BACK, 0])
    wanted = model(torch.cat((tokens[:1, :120], tokens[:1, :1].expand(1, 60)), 1)[:, : 180 - BACK])
    again = model.step(torch.cat((tokens[:1, :1], tokens[1:, :1])), state)
    longer = torch.cat((tokens[:1, :120], tokens[:1, :1].expand(1, 61 - BACK)), 1)
    assert wanted.shape[1] == 180 - BACK
    torch.testing.assert_close(again[0, 0], model(longer)[0, -1], **CLOSE)
    torch.testing.assert_close(again[1], model(tokens[1:, :1])[0], **CLOSE)
    with pytest.raises(FormeryError, match="cannot go on from"):
        model.step(tokens[:, :1], state, torch.tensor([[90], [1]]))


@torch.no_grad()
def test_as_far_back_as_promised_at_any_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "BACK", 3)
    model, tokens = masformer(decoder(Rotary()), (), 5), torch.randint(VOCABULARY, (1, 40))
    wanted = model(tokens)
    for length in range(6, 28):
        state = model.start(1, 40)
        for place in range(length):
            model.step(tokens[:, place : place + 1], state)
        state.rollback([length - 4])  # the latest pass, and three tokens before it
        found = model.step(tokens[:, length - 4 : length + 2], state)
        torch.testing.assert_close(found, wanted[:, length - 4 : length + 2], **CLOSE)


@torch.no_grad()
def test_a_span_of_one_is_no_attention_at_all() -> None:
    """Each token then reads its own value, through maps that could be one map; no token knows of another."""
    part = localised(Attention(8, 2, 1, position=Rotary()).double(), 1)
    hidden = torch.randn(2, 9, 8, dtype=torch.float64)
    alone = part.output(part.value(hidden).unflatten(-1, (1, 4)).expand(2, 9, 2, 4).flatten(2))
    torch.testing.assert_close(part(hidden, context([list(range(9))] * 2, even=True)), alone, **CLOSE)
    silent = decoder(Rotary())
    for one in silent.modules():
        if isinstance(one, Attention):
            one.output.weight.zero_()
    tokens = torch.randint(VOCABULARY, (2, 9))
    removed = Decoder(
        silent.embedding, [Layer([layer.sublayers[1]]) for layer in silent.layers], silent.norm, silent.output
    )
    torch.testing.assert_close(masformer(silent, (), 1)(tokens), removed(tokens), **CLOSE)


def test_weights_are_shared_and_changes_are_told() -> None:
    model = decoder(Rotary())
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    own = masformer(model, (0,), 5)
    found = [part for part in own.modules() if isinstance(part, Attention)]
    assert [type(part) for part in found] == [Attention, LocalAttention] and found[1].span == 5  # type: ignore[attr-defined]
    assert found[1].query.weight is layers[1].query.weight and found[1].position is found[0].position
    assert [id(one) for one in own.parameters()] == [id(one) for one in model.parameters()]
    assert type(layers[1]) is Attention and layers[1].mask == causal
    narrower = masformer(own, (0,), 2)
    assert [part.span for part in narrower.modules() if isinstance(part, LocalAttention)] == [2]


def test_described_saved_and_refused(tmp_path: Any) -> None:
    model = masformer(decoder(Rotary()).float(), (1,), 5)
    save(model, tmp_path / "made")
    twin, tokens = load(tmp_path / "made"), torch.randint(VOCABULARY, (1, 20))
    assert twin.describe() == model.describe()
    torch.testing.assert_close(twin(tokens), model(tokens))
    for mask in (causal, window(3), causal & prefix(2), causal & (window(2) | prefix(1)), everything):
        with pytest.raises(ValueError, match="causal and bounded"):
            LocalAttention(8, 2, mask=mask)
    data = {**LocalAttention(8, 2, mask=causal & window(3)).describe(), "mask": causal.describe()}
    with pytest.raises(FormeryError, match="causal and bounded"):
        build(data)
    assert span_of(causal & (window(2) | window(9)) & window(5)) == 5 and not hides_future(causal | window(2))
    for wide, span, says in (
        ((2,), 4, "layers are 0 to 1"),
        ((-1,), 4, "layers are 0 to 1"),
        ((0,), 0, "at least the token"),
    ):
        with pytest.raises(FormeryError, match=says):
            masformer(model, wide, span)
    with pytest.raises(FormeryError, match="layer 0 cannot have a window"):
        masformer(decoder(mask=everything), (1,), 4)


@pytest.mark.parametrize("position", [Rotary(), Alibi()], ids=["rotary", "alibi"])
def test_every_method_writes_what_greedy_writes(position: Any) -> None:
    def layer() -> Layer:
        return Layer(
            [PreNorm(RMSNorm(24), Attention(24, 4, 2, position=position)), PreNorm(RMSNorm(24), GatedMLP(24, 32))]
        )

    whole = Decoder(Embedding(97, 24, deviation=0.2), [layer(), layer()], RMSNorm(24), Output(24, 97)).eval()
    model = masformer(whole, (1,), 4)
    prompts = [[5, 7, 9], [4], [11, 3, 8, 6, 5] * 5, list(range(20, 31)), [12, 12, 12, 12, 12, 12]]
    wanted = [from_scratch(model, prompt, Settings(max_new_tokens=8))[0] for prompt in prompts]
    assert min(len(set(one)) for one in wanted) > 3
    methods: list[tuple[str, dict[str, Any]]] = [
        ("greedy", {}),
        ("aggressive-decoding", {}),
        ("aded", {}),
        ("layerskip", {"exit": 1}),
        ("speculative-sampling", {"draft": noisy(model, 0.05), "length": 4}),
        ("beam", {}),
    ]
    for method, options in methods:
        found = [generate(model, prompts, method, batch, max_new_tokens=8, **options) for batch in (1, 5)]
        if method == "beam":
            assert [one.tokens for one in found[0]] == [one.tokens for one in found[1]]
        else:
            assert all([one.tokens for one in some] == wanted for some in found), method


def test_scores_are_those_that_the_masks_leave() -> None:
    for length, span in ((1, 1), (5, 9), (20, 3), (20, 20)):
        query, key = torch.arange(length)[:, None], torch.arange(length)
        near, every = (
            int(mask(torch.tensor(0), torch.tensor(0), query, key).sum()) for mask in (causal & window(span), causal)
        )
        assert scores(1, 3, span, length) == every + 2 * near


def test_a_long_prompt_and_many_steps_in_ragged_rows() -> None:
    model = masformer(decoder(Rotary()).float(), (), 3)
    nn.init.normal_(model.embedding.weight)
    prompts = [[1, 2, 3] * 30, [4], [5, 6] * 20]
    wanted = [from_scratch(model, prompt, Settings(max_new_tokens=60))[0] for prompt in prompts]
    assert [one.tokens for one in generate(model, prompts, batch=3, max_new_tokens=60)] == wanted
