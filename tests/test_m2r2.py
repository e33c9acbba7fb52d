"""The accelerated stream: its drafts leave the text as it was, and are those of a pass from scratch."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, decoder, from_scratch, model
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.methods.decoding.draft.own_text import OwnBatches, own_text
from formery.methods.depth.m2r2 import Accelerator, make, make_at_the_exit, normed, objective, streams
from formery.parts import Rotary

NAMES = ["m2r2" + shape for shape in ("", ":length=1", ":length=4", ":length=3:confidence=0.2", ":adapt=true")]
STEADY = [one for one in NAMES if "adapt" not in one]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAMES[0], *NAMES[2:]])
def test_greedy_is_the_same_by_every_shape(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    for asked in (Settings(max_new_tokens=24), Settings(max_new_tokens=9, repetition_penalty=1.3)):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", STEADY)  # how much others draft, the clock says
def test_some_guesses_stand_and_some_do_not(name: str) -> None:
    target = model("rotary")
    found = generate(target, [[row + 2, 5] for row in range(12)], name, draft=guide(name, target), max_new_tokens=40)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)


@pytest.mark.parametrize("name", ["m2r2:length=1", "m2r2:length=3:confidence=0.3"])
def test_it_samples_from_the_target(name: str) -> None:
    target = model("rotary", vocabulary=6)
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    own: dict[str, Any] = {**vars(asked), "draft": guide(name, target)}
    found = generate(target, [[3, 3]] * 3000, name, **own)
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@pytest.mark.parametrize("kind", ["rotary", "translator"])
@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_do_not_depend_on_neighbours(kind: str, name: str, temperature: float) -> None:
    target = model(kind)
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(7)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 16, "stop_tokens": [9, 31]}
    asked["draft"] = guide(name, target)
    whole = generate(target, prompts, name, **asked)
    for batch in (1, 5):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_the_target_goes_on_from_the_slow_stream_bit_for_bit(dtype: torch.dtype) -> None:
    target = decoder(Rotary(), layers=4, key_value_heads=2).eval().to(dtype)
    own = guide("m2r2", target).to(dtype)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8]]
    plain = generate(target, prompts, max_new_tokens=60)
    found = generate(target, prompts, "m2r2:length=3", draft=own, max_new_tokens=60)
    assert [one.tokens for one in found] == [one.tokens for one in plain]
    assert sum(one.accepted for one in found) > 0


@torch.inference_mode()
@pytest.mark.parametrize("made", [make, make_at_the_exit])
def test_guesses_are_those_of_the_stream_from_scratch(made: Any) -> None:
    """Each place attends to the slow stream alone, in training and in decoding after any history of guesses."""
    target = decoder(Rotary(), layers=5, key_value_heads=2).eval()
    own = made(target).eval()
    found = generate(target, [[5, 6, 7], [9, 10, 11, 12], [8]], "m2r2:length=3", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            tokens = text + event.drafted
            batch = {"tokens": torch.tensor([tokens]), "positions": torch.arange(len(tokens))[None]}
            fast, _ = streams(target, own, batch, torch.arange(len(tokens)))
            said = target.logits(normed(target, fast[-1]))[0].argmax(-1).tolist()
            assert said[len(text) - 1 : -1] == event.drafted
            text += event.emitted


@torch.inference_mode()
def test_without_adapters_the_streams_are_one() -> None:
    """An adapter that adds nothing leaves the slow stream: the accelerated one attends to just what that attends to."""
    target = decoder(Rotary(), layers=4).eval()
    own = make(target)
    for name, weight in own.named_parameters():
        if "down" in name:
            weight.zero_()
    batch = {"tokens": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])}
    batch["positions"] = torch.tensor([[0, 1, 2, 3], [0, 1, 2, -1]])
    fast, slow = streams(target, own, batch, torch.tensor([0, 2, 3]))
    assert len(fast) == 3 and len(slow) == 5
    for one, other in zip(fast, slow, strict=False):
        torch.testing.assert_close(one[0], other[0])
        torch.testing.assert_close(one[1, :2], other[1, :2])
    torch.testing.assert_close(normed(target, slow[-1][0]), target.hidden(batch["tokens"][:1])[0, [0, 2, 3]])


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_the_adapters_alone_learn(kind: str, tmp_path: Any) -> None:
    target = model(kind).requires_grad_(False)
    batch = OwnBatches(own_text(target, [[3, 4, 5], [6, 7, 8, 9], [10, 11, 12]], 20, tmp_path), 3).batch(0)
    own = guide("m2r2", target)
    optimizer = torch.optim.Adam(own.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        loss = objective(target, own, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in target.parameters())


def test_what_does_not_fit_is_refused() -> None:
    target = model("rotary")
    with pytest.raises(FormeryError, match="the guide is for a model of width 16"):
        generate(target, [[5, 6]], "m2r2", draft=Accelerator(16, 97, [4]), max_new_tokens=4)
    with pytest.raises(FormeryError, match="length >= 1 and a confidence"):
        generate(target, [[5, 6]], "m2r2:confidence=2", draft=guide("m2r2", target), max_new_tokens=4)
