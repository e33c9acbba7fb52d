"""Serial guides: a beam leaves the text as it was, its lines share beginnings, and nothing depends on neighbours."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Draft, Settings
from formery.generate.run import generate
from formery.methods.decoding.draft import clover_2, redrafter

SHAPES = {
    "redrafter": ["", ":length=3:beam=3", ":length=4:beam=2:adapt=true"],
    "clover-2": ["", ":width=2:beam=2:nodes=6", ":length=3:width=3:beam=2:nodes=9"],
}
NAMES = [name + shape for name, shapes in SHAPES.items() for shape in shapes]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAMES[1], NAMES[-1]])
def test_greedy_is_the_same_for_every_kind_of_model(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    for asked in (Settings(max_new_tokens=24), Settings(max_new_tokens=9, repetition_penalty=1.3)):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", NAMES)
def test_some_guesses_stand_and_drafts_do_not_depend_on_neighbours(name: str) -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    asked: dict[str, Any] = {"max_new_tokens": 24, "draft": guide(name, target)}
    whole = generate(target, prompts, name, **asked)
    plain = generate(target, prompts, max_new_tokens=24)
    assert [one.tokens for one in whole] == [one.tokens for one in plain]
    if "adapt" in name:  # what is drafted then depends on the clock
        return
    assert 0 < sum(one.accepted for one in whole) < sum(one.drafted for one in whole)
    for temperature in (0.0, 0.8):
        whole = generate(target, prompts, name, temperature=temperature, stop_tokens=[9, 31], **asked)
        for batch in (1, 2, 5):
            parts = generate(target, prompts, name, batch=batch, temperature=temperature, stop_tokens=[9, 31], **asked)
            assert [one.tokens for one in parts] == [one.tokens for one in whole]
            assert [[(event.drafted, event.parents) for event in one.trace] for one in parts] == [
                [(event.drafted, event.parents) for event in one.trace] for one in whole
            ]


@pytest.mark.parametrize("name", ["redrafter:length=2:beam=2", "clover-2:width=2:beam=2:nodes=4:length=2"])
def test_guides_sample_from_the_target(name: str) -> None:
    target = model("rotary", vocabulary=6)
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    own = {"draft": guide(name, target)}
    found = generate(target, [[3, 3]] * 2000, name, **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@torch.inference_mode()
def test_the_lines_of_a_beam_are_those_of_a_beam_search_and_share_their_beginnings() -> None:
    target = model("rotary")
    own = guide("redrafter", target)
    assert isinstance(own, redrafter.RecurrentHead) and isinstance(own.mix.weight, torch.nn.Parameter)
    own.mix.weight *= 20  # so that it matters a good deal what was guessed before
    prompt, beam, length = [5, 6, 7, 8], 3, 4
    [found] = generate(target, [prompt], f"redrafter:length={length}:beam={beam}", draft=own, max_new_tokens=8)
    event = found.trace[0]
    tree = Draft(event.drafted, parents=event.parents)
    ends = set(range(len(tree.tokens))) - {tree.parent(place) for place in range(len(tree.tokens))}
    drawn = {tuple(tree.tokens[place] for place in tree.line(end)) for end in ends}

    vector = target.hidden(torch.tensor([prompt[:-1]]))[:, -1]
    lines: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(length):
        grown = []
        for score, line in lines:
            embedded = target.embedding.looked_up(torch.tensor([[prompt[-1], *line]]))
            log = target.logits(own(vector, embedded)[:, -1:])[0, 0].log_softmax(-1)
            grown += [(score + float(log[token]), (*line, token)) for token in range(len(log))]
        lines = sorted(grown, reverse=True)[:beam]
    assert drawn == {line for _, line in lines}
    # A beginning is there once: no two guesses after the same token are alike.
    assert len({tuple(tree.tokens[place] for place in tree.line(one)) for one in range(len(tree.tokens))}) == len(
        tree.tokens
    )


@torch.inference_mode()
def test_clover_goes_on_as_it_was_trained() -> None:
    """After any history its chain is that of a pass over the whole text, each guess made from those before."""
    target = model("rotary")
    own = guide("clover-2", target)
    assert isinstance(own, clover_2.CloverGuide)
    found = generate(target, [[5, 6, 7], [9, 10, 11, 12], [8, 3]], "clover-2:length=3", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            vectors = target.hidden(torch.tensor([text]))[:, :-1]
            embedded = target.embedding.looked_up(torch.tensor([text[1:]]))
            read = own(vectors, embedded, torch.arange(len(text) - 1)[None])[:, -1]
            between = target.embedding.looked_up(torch.tensor([event.drafted[:-1]], dtype=torch.long))
            if event.drafted:
                made = own.chain(read, between)
                assert target.logits(made).argmax(-1)[0].tolist() == event.drafted
            text += event.emitted


def test_bad_shapes_are_refused() -> None:
    target = model("rotary")
    with pytest.raises(FormeryError, match="a beam needs at least 1 line, not 0"):
        generate(target, [[5, 6]], "redrafter:beam=0", draft=guide("redrafter", target), max_new_tokens=4)
    with pytest.raises(FormeryError, match="the guide is for a model of width 16"):
        generate(target, [[5, 6]], "redrafter", draft=redrafter.RecurrentHead(16, 97), max_new_tokens=4)
