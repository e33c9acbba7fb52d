"""Guides: drafts of every shape leave the text as it was, rows do not depend on neighbours, and states keep up."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model, noisy
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.guided import best_first
from formery.generate.run import generate
from formery.methods.decoding.draft.medusa import MedusaHeads

SHAPES = {
    "medusa": ["", ":length=2", ":length=4:width=2:nodes=6", ":length=3:width=3:nodes=9", ":adapt=true"],
    "eagle": ["", ":length=2", ":width=2:beam=2:nodes=6", ":length=3:width=3:beam=3:nodes=12", ":adapt=true"],
}
NAMES = [name + shape for name, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("rotary", name) for name in NAMES] + [(kind, name) for kind in KINDS[1:] for name in NAMES if "=2:" in name],
)
def test_greedy_is_the_same_by_every_shape(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(7)]
    for asked in (Settings(max_new_tokens=24), Settings(max_new_tokens=9, repetition_penalty=1.3)):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 3, 7):
            found = generate(target, prompts, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", [one for one in NAMES if "adapt" not in one])
def test_some_guesses_stand_and_some_do_not(name: str) -> None:
    """Without this, the test above could pass with drafts that are never looked at."""
    target = model("rotary")
    found = generate(target, [[row + 2, 5] for row in range(12)], name, draft=guide(name, target), max_new_tokens=40)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)

    if "nodes" in name:
        assert any(event.parents is not None for one in found for event in one.trace)
        # A branch that is not the first one has stood too.
        assert any(event.path != list(range(len(event.path))) for one in found for event in one.trace)


@pytest.mark.parametrize("name", [one for one in NAMES if "adapt" not in one])
def test_guides_sample_from_the_target(name: str) -> None:
    target = model("rotary", vocabulary=6)
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    own = {"draft": guide(name, target)}
    found = generate(target, [[3, 3]] * 3000, name, **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@pytest.mark.parametrize("name", [one for one in NAMES if "adapt" not in one])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 20, "stop_tokens": [9, 31]}
    asked["draft"] = guide(name, target)
    whole = generate(target, prompts, name, **asked)
    for batch in (1, 2, 5):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


@torch.inference_mode()
def test_an_attending_guide_guesses_as_if_it_read_the_text_anew() -> None:
    """After any history of accepted and rejected guesses its chain is the one that it makes from scratch."""
    target = model("rotary")
    own = guide("eagle", target)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8, 3]]
    found = generate(target, prompts, "eagle:length=3", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            vectors = target.hidden(torch.tensor([text]))[:, :-1]
            tokens = text[1:]
            for guess in event.drafted:
                embedded = target.embedding.looked_up(torch.tensor([tokens]))
                made = own(vectors, embedded, torch.arange(len(tokens))[None])
                assert int(target.logits(made[:, -1:]).argmax()) == guess
                vectors, tokens = torch.cat((vectors, made[:, -1:]), 1), [*tokens, guess]
            text += event.emitted


def test_a_tree_holds_the_likeliest_lines() -> None:
    levels = [[(5, 0.6), (6, 0.3)], [(7, 0.5), (8, 0.4)], [(9, 0.9)]]
    draft = best_first(levels, 6)
    lines = [[draft.tokens[place] for place in draft.line(one)] for one in range(6)]
    # 0.6, 0.3, 0.3 (5 7), 0.27 (5 7 9), 0.24 (5 8), 0.216 (5 8 9); equals as they come
    assert sorted(map(tuple, lines)) == [(5,), (5, 7), (5, 7, 9), (5, 8), (5, 8, 9), (6,)]


def test_a_guide_of_another_model_is_refused() -> None:
    target = model("rotary")
    with pytest.raises(FormeryError, match="the guide is for a model of width 16"):
        generate(target, [[5, 6]], "medusa", draft=MedusaHeads(16, 97, 4), max_new_tokens=4)
    with pytest.raises(FormeryError, match="'draft' of medusa must be of kind guide"):
        generate(target, [[5, 6]], "medusa", draft=noisy(target, 0.1), max_new_tokens=4)
    with pytest.raises(FormeryError, match="at least as many nodes as its length"):
        generate(target, [[5, 6]], "medusa", draft=guide("medusa", target), length=4, nodes=2)
