"""Thinner forms of the target that draft in its own state: the text stays, and each form is what it says."""

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from generation import KINDS, decoder, from_scratch, model
from test_mamba2 import speaker
from test_sampling import p_value
from torch import nn

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.generate.selfdraft import sublayers
from formery.methods.decoding.draft.swift import Search
from formery.methods.depth.layerskip import exit_loss, left_by_layers
from formery.methods.depth.layerskip import objective as exits
from formery.methods.feedforward import matformer
from formery.models import Decoder, EncoderDecoder
from formery.parts import Context, GatedMLP, Layer, Nested, PreNorm, Rotary

NAMES = [
    "layerskip:exit=1",
    "layerskip:exit=1:length=5:confidence=0.03",
    "swift:confidence=0:window=3:trials=5",
    "swift:skip=0.9:confidence=0.02",
    "matformer:share=0.5",
    "matformer:share=0.2:length=5:confidence=0.03",
    "layerskip:exit=1:adapt=true",
]
RECURRENT = ("mamba2", "hybrid")


@pytest.mark.parametrize("kind", [*KINDS, *RECURRENT])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_same(kind: str, name: str) -> None:
    target = speaker(kind) if kind in RECURRENT else model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    for asked in (
        Settings(max_new_tokens=24, stop_tokens=frozenset([9, 31])),
        Settings(max_new_tokens=9, repetition_penalty=1.3),
    ):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_some_guesses_stand_and_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target = decoder(Rotary(), layers=4).eval()
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(7)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 30, "stop_tokens": [9]}
    whole = generate(target, prompts, name, **asked)
    assert 0 < sum(one.accepted for one in whole) < sum(one.drafted for one in whole)
    for batch in (1, 3):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


@pytest.mark.parametrize("name", [NAMES[0], "swift:length=2:confidence=0.2", "matformer:share=0.5:length=2"])
def test_samples_are_the_target_s_own(name: str) -> None:
    target, asked = model("rotary", vocabulary=6), Settings(max_new_tokens=2, temperature=1.2, seed=11)
    found = generate(target, [[3, 3]] * 2000, name, **vars(asked))
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


def first_layers(target: Decoder) -> Decoder:
    return Decoder(target.embedding, target.layers[:1], target.norm, target.output).eval()  # type: ignore[arg-type]


def halved(target: Decoder) -> Decoder:
    layers = [
        Layer([PreNorm(one.norm, matformer.cut(one.inner, 0.5)) for one in layer.sublayers]) for layer in target.layers
    ]
    return Decoder(target.embedding, layers, target.norm, target.output).eval()


def without_a_sublayer(target: Decoder) -> Decoder:
    kept: list[Any] = [part for number, part in enumerate(sublayers(target)) if number != 2]
    return Decoder(target.embedding, kept, target.norm, target.output).eval()


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "alone"),
    [
        ("layerskip:exit=1:length=4", first_layers),
        ("matformer:share=0.5:length=4", halved),
        ("swift:length=4:skip=0.5:trials=0:confidence=0", without_a_sublayer),
    ],
)
def test_a_thinner_form_reads_the_text_as_the_target_and_guesses_by_itself(
    name: str, alone: Callable[[Decoder], Decoder]
) -> None:
    """The guesses are those of the thinner form on keys and values that the target has left of the text."""
    target = model("rotary")
    assert isinstance(target, Decoder)
    thin = alone(target)
    prompt, drafted = [5, 6, 7, 8], []
    # The thinner form's state, filled by the target: its attentions are the target's, or hold the same weights.
    whole, own = target.start(1, 20), thin.start(1, 20)
    target.read(torch.tensor([prompt[:-1]]), whole)
    thin.read(torch.tensor([prompt[:-1]]), own)
    for (part, _), layer in own.layers.items():
        theirs = next(held for (one, _), held in whole.layers.items() if one is part)
        layer.keys.copy_(theirs.keys)  # type: ignore[attr-defined]
        layer.values.copy_(theirs.values)  # type: ignore[attr-defined]
    token = prompt[-1]
    for _ in range(4):
        token = int(thin.step(torch.tensor([[token]]), own)[0, -1].argmax())
        drafted.append(token)
    [found] = generate(target, [prompt], name, max_new_tokens=8)
    assert found.trace[0].drafted == drafted


def test_a_search_keeps_the_best_set_and_its_size() -> None:
    free, wanted = [2, 3, 5, 6, 8, 9, 11, 12], {3, 8, 11}
    search = Search(free, 3, random.Random(5))
    scores = []
    for _ in range(24):
        tried = search.candidate()
        assert len(tried) == 3 and tried <= set(free)
        scores.append(len(tried & wanted) / 3)
        search.learn(tried, scores[-1])
    assert search.score == max(scores) and len(search.best & wanted) / 3 == max(scores)
    # The sets that are chosen by what was seen are better than those that are drawn.
    chosen, drawn = scores[3::4], [score for n, score in enumerate(scores) if n % 4 != 3]
    assert sum(chosen) / len(chosen) > sum(drawn) / len(drawn)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("layerskip:exit=0", "must be at least 1, not 0"),
        ("layerskip:exit=2", "of 2 layers at most 1 can draft, not 2"),
        ("layerskip:length=0", "a draft needs length >= 1"),
        ("swift:skip=0", "skipping needs 0 < skip <= 1"),
        ("matformer:share=2", "must lie above 0 and not above 1, not 2"),
    ],
)
def test_what_cannot_be_is_refused(name: str, said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        generate(model("rotary"), [[3, 4]], name, max_new_tokens=4)


@torch.no_grad()
def test_exits_are_the_model_s_own() -> None:
    target = model("rotary")
    assert isinstance(target, Decoder)
    tokens = torch.randint(97, (3, 12))
    left = left_by_layers(target, tokens)
    for layers in (1, 2):
        alone = Decoder(target.embedding, target.layers[:layers], target.norm, target.output).eval()  # type: ignore[arg-type]
        logits = target.output(target.norm(left[layers - 1]))  # type: ignore[misc]
        torch.testing.assert_close(logits, alone(tokens))
    whole = nn.functional.cross_entropy(target(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    last = left_by_layers(target, tokens[:, :-1])[-1]
    torch.testing.assert_close(exit_loss(target, last, {"tokens": tokens}), whole)


def test_dropped_layers_and_turns_depend_on_the_step_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        target = decoder(Rotary(), layers=4)
    batch = {"tokens": torch.randint(97, (6, 12))}
    found = [exits(target, {**batch, "step": torch.tensor(step)}).item() for step in (0, 1, 0)]
    assert found[0] == found[2] != found[1]


@torch.no_grad()
def test_nesting_leaves_the_whole_as_it_was_and_holds_what_a_small_one_computes() -> None:
    target = model("rotary")
    assert isinstance(target, Decoder)
    tokens = torch.randint(97, (2, 12))
    before = target(tokens)
    matformer.nest(target, {"tokens": tokens})
    torch.testing.assert_close(target(tokens), before)
    parts = matformer.nested(target)
    assert len(parts) == 2 and parts[0].sizes == [8, 16, 32, 64]
    hidden, context = torch.randn(2, 3, 32), Context(torch.arange(3).expand(2, 3))
    inner = parts[0].inner
    assert isinstance(inner, GatedMLP)
    parts[0].taken = 16
    units = nn.functional.silu(inner.gate(hidden)) * inner.up(hidden)
    units[..., 16:] = 0
    torch.testing.assert_close(parts[0](hidden, context), inner.down(units))
    with torch.enable_grad():
        torch.testing.assert_close(parts[0](hidden, context), inner.down(units))


def test_what_is_not_taken_gets_no_gradient() -> None:
    inner = GatedMLP(8, 12)
    part = Nested(inner, [3, 6, 12], 6)
    part(torch.randn(2, 3, 8), Context(torch.arange(3).expand(2, 3))).sum().backward()
    gradient = inner.up.weight.grad  # type: ignore[union-attr]
    assert gradient is not None and bool((gradient[:6] != 0).any()) and not bool((gradient[6:] != 0).any())


def test_an_encoder_decoder_drafts_with_its_decoder() -> None:
    target = model("translator")
    assert isinstance(target, EncoderDecoder)
    [found] = generate(target, [[5, 6, 7]], "layerskip:exit=1", max_new_tokens=12)
    assert found.drafted > 0
