"""Lexical units: checked guesses leave the text as it was, unchecked ones stand, and the text is rearranged rightly."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from generation import KINDS, Told, from_scratch, model
from test_sampling import p_value
from torch import Tensor

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.methods.decoding.parallel import lexical_unit_decoding as units

NAMES = [
    "lexical-unit-drafting",
    "lexical-unit-drafting:length=2:everywhere=false",
    "lexical-unit-drafting:threshold=0.02",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "lexical-unit-drafting:adapt=true"])
def test_checked_guesses_leave_the_text_as_it_was(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    for asked in (Settings(max_new_tokens=24), Settings(max_new_tokens=9, repetition_penalty=1.3)):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


def counting(sure: float = 0.6) -> Told:
    """Says that numbers go up, and at placeholders what comes there; of every fifth it is less sure, and wrong."""

    def says(text: tuple[int, ...]) -> Tensor:
        placeholders = next((n for n, token in enumerate(text[::-1]) if token != 39), len(text))
        coming = text[-1 - placeholders] + placeholders + 1
        guess, chance = (coming, 0.9) if placeholders == 0 or coming % 5 else (coming + 1, sure)
        chances = torch.full((40,), (1 - chance) / 39, dtype=torch.float64)
        chances[guess % 39] = chance
        return chances.log()

    return Told(40, says)


def test_guesses_of_the_last_call_are_the_next_draft() -> None:
    [found] = generate(counting(), [[0]], "lexical-unit-drafting:length=3", max_new_tokens=20)
    assert found.tokens == list(range(1, 21))
    # Of 10 11 12 the first is guessed wrongly.
    assert [event.emitted for event in found.trace][:4] == [[1], [2, 3, 4, 5], [6, 7, 8, 9], [10]]
    # Behind a rejected guess there was a placeholder of the last token's own.
    assert found.trace[4].emitted == [11, 12, 13, 14]
    ends = generate(counting(), [[0]], "lexical-unit-drafting:length=3:everywhere=false", max_new_tokens=20)[0]
    assert ends.tokens == found.tokens and ends.trace[4].emitted == [11]
    assert all(len(event.drafted) <= 6 for event in ends.trace)


def test_confident_guesses_stand_unchecked() -> None:
    def written(options: str) -> list[int]:
        [found] = generate(counting(), [[0]], f"lexical-unit-decoding{options}", max_new_tokens=14)
        assert 39 not in found.tokens
        return found.tokens

    assert written(":threshold=0.95") == written(":threshold=0.8") == list(range(1, 15))
    assert written(":threshold=0.5:length=3") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 11, 12, 13, 14][:14]
    few = generate(counting(), [[0]], "lexical-unit-decoding:threshold=0.8", max_new_tokens=14)[0]
    assert few.calls < 14 - 4


@pytest.mark.parametrize("name", [*NAMES, "lexical-unit-decoding:threshold=0.02"])
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    for temperature in (0.0, 0.8):
        asked: dict[str, Any] = {"max_new_tokens": 20, "temperature": temperature, "stop_tokens": [9, 31]}
        whole = generate(target, prompts, name, **asked)
        for batch in (1, 5):
            parts = generate(target, prompts, name, batch=batch, **asked)
            assert [(one.tokens, one.stop) for one in parts] == [(one.tokens, one.stop) for one in whole]
            assert [[(event.drafted, event.parents) for event in one.trace] for one in parts] == [
                [(event.drafted, event.parents) for event in one.trace] for one in whole
            ]


@pytest.mark.parametrize("name", ["lexical-unit-drafting:length=1", "lexical-unit-decoding:threshold=0.1"])
def test_sampling_is_the_targets(name: str) -> None:
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    found = generate(model("rotary", vocabulary=6), [[3, 3]] * 1000, name, **vars(asked))
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01


def test_placeholders_see_their_prefix_and_those_before_them() -> None:
    tokens, at = torch.arange(10, 18)[None], torch.tensor([[2, 5]])
    whole, context = units.rearranged(tokens, at, 3, 96)
    target = model("rotary")
    with torch.inference_mode():
        hidden = target.embedding(whole, context)
        for layer in target.layers:
            hidden = layer(hidden, context)
        for number, place in enumerate(at[0].tolist()):
            alone = torch.cat((tokens[0, : place + 1], torch.full((3,), 96)))[None]
            found = target.norm(hidden[:, 8 + 3 * number : 11 + 3 * number])
            torch.testing.assert_close(found, target.hidden(alone)[:, place + 1 :], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(target.norm(hidden[:, :8]), target.hidden(tokens), rtol=1e-4, atol=1e-5)


def test_a_unit_is_a_run_of_sure_tokens() -> None:
    sure = torch.tensor([[1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    assert units.in_unit(sure, 2)[0].int().tolist() == [[1, 0], [0, 0], [0, 0], [1, 1], [1, 0], [0, 0]]


def test_units_alone_are_learned() -> None:
    target = model("rotary").train()
    tokens = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    learned = []
    for learn in (units.objective, partial(units.objective, units=False)):
        target.zero_grad()
        learn(target, {"tokens": tokens}).backward()  # type: ignore[no-untyped-call]
        learned.append(target.embedding.weight.grad[96].abs().sum())
    # A random model is sure of nothing: no placeholder learns.
    assert learned[0] == 0 < learned[1]


def test_bad_options_are_refused() -> None:
    for name in ("lexical-unit-decoding", "lexical-unit-drafting"):
        with pytest.raises(FormeryError, match="lexical units need length >= 1 and a threshold from 0 to 1"):
            generate(model("rotary"), [[5]], f"{name}:threshold=1.5", max_new_tokens=2)
