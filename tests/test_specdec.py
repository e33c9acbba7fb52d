"""Masks that are filled all at once, as in training, whatever came before; strictly the text stays the same."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import from_scratch, model
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.methods.decoding.draft.specdec import MaskFiller
from formery.models import EncoderDecoder, load, save
from formery.models.decoder import memory_context
from formery.parts import Context

NAMES = ["specdec:length=4", "specdec:length=10", "specdec:length=3:width=3:nodes=9", "specdec:adapt=true"]
PROMPTS = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(6)]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_same(name: str) -> None:
    target = model("translator", max_length=30)
    for asked in (
        Settings(max_new_tokens=24, stop_tokens=frozenset([9, 31])),
        Settings(max_new_tokens=9, repetition_penalty=1.3),
    ):
        wanted = [from_scratch(target, prompt, asked) for prompt in PROMPTS]
        for batch in (1, 6):
            found = generate(target, PROMPTS, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_some_guesses_stand_and_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    target = model("translator")
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 30, "stop_tokens": [9]}
    asked["draft"] = guide(name, target)
    whole = generate(target, PROMPTS, name, **asked)
    assert sum(one.accepted for one in whole) < sum(one.drafted for one in whole)
    for batch in (1, 2):
        parts = generate(target, PROMPTS, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


@torch.inference_mode()
def test_masks_are_filled_as_when_it_learned() -> None:
    """After any history the guesses are those of one pass over the text and the masks."""
    target = model("translator")
    own = guide("specdec", target)
    assert isinstance(target, EncoderDecoder) and isinstance(own, MaskFiller)
    found = generate(target, PROMPTS, "specdec:length=5", draft=own, max_new_tokens=18)
    for prompt, one in zip(PROMPTS, found, strict=True):
        text = [target.start_token]
        memory = target.encoder(torch.tensor([prompt]))
        for event in one.trace:
            vectors = target.decoder.hidden(torch.tensor([text]), memory=memory)[:, :-1]
            embedded = target.embedding.looked_up(torch.tensor([text[1:]], dtype=torch.long))
            depths = len(event.drafted)
            entered = torch.cat((own.enter(vectors, embedded), own.masks[None, :depths]), 1)
            context = Context(torch.arange(entered.shape[1])[None])
            context.memory, context.memory_hidden = memory_context(context.positions, memory, None), memory
            made = own._run(entered, context)[:, len(text) - 1 :]
            if depths:
                assert target.decoder.logits(made).argmax(-1)[0].tolist() == event.drafted
            text += event.emitted


def test_samples_are_the_target_s_own() -> None:
    target, asked = model("translator", vocabulary=6), Settings(max_new_tokens=2, temperature=1.2, seed=11)
    own = {"draft": guide("specdec", target)}
    found = generate(target, [[3, 3]] * 2000, "specdec:length=2", **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked, "translator") > 0.01
    assert sum(one.accepted for one in found) > 0


def test_relaxed_more_stands() -> None:
    target = model("translator")
    own = guide("specdec", target)

    def calls(name: str) -> int:
        return sum(one.calls for one in generate(target, PROMPTS, name, draft=own, max_new_tokens=30))

    assert calls("specdec-relaxed:beta=1") == calls("specdec-relaxed:tau=0") == calls("specdec")
    assert calls("specdec-relaxed:beta=20:tau=9") < calls("specdec")


def test_it_comes_back_from_disk_as_it_was(tmp_path: Any) -> None:
    own = guide("specdec", model("translator"))
    save(own, tmp_path / "guide")
    again = load(tmp_path / "guide")
    assert isinstance(own, MaskFiller) and torch.equal(again.masks, own.masks)


def test_a_model_without_an_encoder_is_refused() -> None:
    with pytest.raises(FormeryError, match="the guide is for a model with an encoder"):
        generate(model("rotary"), [[3, 4]], "specdec", draft=guide("specdec", model("translator")), max_new_tokens=4)
