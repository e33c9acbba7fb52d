"""Falcon's blocks: the text stays as it was, rows do not depend on neighbours, and drafting is what was learned."""

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.methods.decoding.draft import falcon
from formery.methods.decoding.draft.falcon import FalconGuide, Shown, glanced

NAMES = ["falcon", "falcon:length=2:blocks=3", "falcon:length=3:width=2:nodes=6:blocks=2"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES[1:], "falcon:adapt=true"])
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
    found = generate(target, prompts, name, **asked)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)
    for temperature in (0.0, 0.8):
        whole = generate(target, prompts, name, temperature=temperature, stop_tokens=[9, 31], **asked)
        for batch in (1, 2, 5):
            parts = generate(target, prompts, name, batch=batch, temperature=temperature, stop_tokens=[9, 31], **asked)
            assert [one.tokens for one in parts] == [one.tokens for one in whole]
            assert [[(event.drafted, event.parents) for event in one.trace] for one in parts] == [
                [(event.drafted, event.parents) for event in one.trace] for one in whole
            ]


@pytest.mark.parametrize("name", ["falcon:length=2:width=2:nodes=4", "falcon:length=1:blocks=2"])
def test_it_samples_from_the_target(name: str) -> None:
    target = model("rotary", vocabulary=6)
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    own = {"draft": guide(name, target)}
    found = generate(target, [[3, 3]] * 1000, name, **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@torch.inference_mode()
def test_a_block_is_guessed_as_it_was_learned_and_the_next_goes_on_from_it() -> None:
    target = model("rotary")
    own = guide("falcon", target)
    assert isinstance(own, FalconGuide)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8, 3]]
    found = generate(target, prompts, "falcon:length=3:blocks=2", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            vectors, tokens = target.hidden(torch.tensor([text]))[:, :-1], text[1:]
            for begin in range(0, len(event.drafted), 3):
                embedded = target.embedding.looked_up(torch.tensor([tokens]))
                at = torch.tensor([[len(tokens) - 1]])
                made = own.blocks(vectors, embedded, torch.arange(len(tokens))[None], at)[:, 0, :3]
                drafted = event.drafted[begin : begin + 3]
                assert target.logits(made).argmax(-1)[0, : len(drafted)].tolist() == drafted
                vectors, tokens = torch.cat((vectors, made), 1), [*tokens, *drafted]
            text += event.emitted


@torch.inference_mode()
def test_blocks_see_their_text_and_their_own_places_only() -> None:
    target = model("rotary")
    own = guide("falcon", target)
    assert isinstance(own, FalconGuide)
    random = torch.Generator().manual_seed(1)
    vectors, embedded = torch.randn(2, 9, 32, generator=random), torch.randn(2, 9, 32, generator=random)
    positions, at = torch.arange(9).expand(2, 9), torch.tensor([[2, 5], [4, 4]])
    shown = Shown(
        torch.tensor([[[0, 1, 0, 0], [0, 0, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]], dtype=torch.bool),
        torch.randn(2, 2, 4, 32, generator=random),
        torch.randn(2, 2, 4, 32, generator=random),
    )
    plain, glanced_at = (own.blocks(vectors, embedded, positions, at, one) for one in (None, shown))
    # What is shown changes the guesses of its own block, those before it too, and of no other.
    torch.testing.assert_close(glanced_at[:, 1], plain[:, 1])
    assert all(
        not torch.allclose(glanced_at[row, 0, place], plain[row, 0, place]) for row in (0, 1) for place in range(4)
    )
    torch.testing.assert_close(plain[1, 0], plain[1, 1])
    vectors[0, 3:] += 1
    changed = own.blocks(vectors, embedded, positions, at)
    torch.testing.assert_close(changed[0, 0], plain[0, 0])
    assert not torch.allclose(changed[0, 1], plain[0, 1])


def test_as_many_answers_are_shown_as_guesses_are_wrong() -> None:
    torch.manual_seed(0)
    wrong = torch.rand(2000, 4) < torch.rand(2000, 1)
    assert (glanced(wrong, 1.0).sum(-1) == wrong.sum(-1)).all()
    half = glanced(wrong, 0.5).sum(-1)
    assert ((half - wrong.sum(-1) / 2).abs() < 1).all() and abs(
        float(half.float().mean() * 2 / wrong.sum(-1).float().mean()) - 1
    ) < 0.05
    assert (glanced(wrong, 1.0).float().mean(0) - wrong.float().mean()).abs().max() < 0.05  # every place alike


def test_it_learns_from_what_is_not_shown() -> None:
    target = model("rotary").requires_grad_(False)
    own = falcon.make(target).train()
    with torch.inference_mode(False):
        tokens = torch.randint(0, 97, (3, 12), generator=torch.Generator().manual_seed(2))
        positions = torch.arange(12).repeat(3, 1)
        positions[2, 8:] = -1
        batch = {"tokens": tokens, "positions": positions, "hidden": target.hidden(tokens)}
        batch |= {"written": (torch.arange(12) >= 4) & (positions >= 0), "step": torch.tensor(0)}
        for learn in (falcon.objective, partial(falcon.block_loss, share=0.0)):
            loss = learn(target, own, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            assert torch.isfinite(loss) and own.carry.grad is not None


def test_bad_shapes_are_refused() -> None:
    target = model("rotary")
    own = guide("falcon", target)
    for bad, message in (("blocks=0", "at least 1 block"), ("length=0", "needs length >= 1")):
        with pytest.raises(FormeryError, match=message):
            generate(target, [[5, 6]], f"falcon:{bad}", draft=own, max_new_tokens=4)
    with pytest.raises(FormeryError, match="the guide is for a model of width 16"):
        generate(target, [[5, 6]], "falcon", draft=FalconGuide(16, 97, 4, 16, 4), max_new_tokens=4)
