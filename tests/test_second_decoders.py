"""Guides that are decoders of their own on the target's encoder: Whisper-Medusa's block, and hybrid decoding's."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model
from guides import guide
from scipy.stats import chisquare
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.generate.target import Target
from formery.methods.decoding.draft import hybrid_decoding, whisper_medusa
from formery.methods.decoding.draft.hybrid_decoding import aligned
from formery.models import EncoderDecoder

BLOCK = ["whisper-medusa", "whisper-medusa:length=2", "whisper-medusa:width=3:nodes=9", "whisper-medusa:adapt=true"]
HYBRID = ["hybrid-decoding", "hybrid-decoding:length=5:match=1", "hybrid-decoding:adapt=true"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in BLOCK[1:3] for kind in KINDS] + [(name, "translator") for name in HYBRID],
)
def test_greedy_is_the_same(name: str, kind: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(7)]
    for asked in (
        Settings(max_new_tokens=24, stop_tokens=frozenset([9, 31])),
        Settings(max_new_tokens=9, repetition_penalty=1.3),
    ):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 7):
            found = generate(target, prompts, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", [one for one in BLOCK + HYBRID if "adapt" not in one])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    target = model("translator")
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


def test_samples_are_the_target_s_own() -> None:
    target, asked = model("rotary", vocabulary=6), Settings(max_new_tokens=2, temperature=1.2, seed=11)
    name = "whisper-medusa:width=2:nodes=5"
    found = generate(target, [[3, 3]] * 3000, name, draft=guide(name, target), **vars(asked))
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@torch.inference_mode()
def test_behind_a_hypothesis_samples_are_the_target_s_own() -> None:
    target, asked = model("translator", vocabulary=6), Settings(max_new_tokens=2, temperature=1.2, seed=11)
    assert isinstance(target, EncoderDecoder)
    own = guide("hybrid-decoding", target)
    found = generate(target, [[3, 3]] * 3000, "hybrid-decoding", draft=own, **vars(asked))
    seen = Counter(tuple(one.tokens) for one in found)
    start, source = target.start_token, torch.tensor([[3, 3]])
    texts = [[start], *([start, a] for a in range(6))]
    first, *second = [(target(source, torch.tensor([text]))[0, -1] / 1.2).softmax(-1) for text in texts]
    wanted = [3000 * float(first[a] * second[a][b]) for a in range(6) for b in range(6)]
    counts = [seen[a, b] for a in range(6) for b in range(6)]
    common = [place for place, one in enumerate(wanted) if one >= 5]
    rest = [place for place in range(36) if place not in common]
    groups = [[place] for place in common] + ([rest] if rest else [])
    totals = [[sum(one[place] for place in group) for group in groups] for one in (counts, wanted)]
    assert chisquare(*totals).pvalue > 0.01
    assert sum(one.accepted for one in found) > 0


@pytest.mark.parametrize("kind", ["rotary", "translator"])
@torch.inference_mode()
def test_the_block_guesses_as_if_it_read_the_text_anew(kind: str) -> None:
    """After any history of accepted and rejected guesses, from the vectors and what the encoder made."""
    target = model(kind)
    own = guide("whisper-medusa", target)
    assert isinstance(own, whisper_medusa.MedusaBlock)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8, 3]]
    for one in generate(target, prompts, "whisper-medusa:length=3", draft=own, max_new_tokens=18):
        apart = isinstance(target, EncoderDecoder)
        assert not isinstance(one.prompt, str)
        text = [target.start_token] if isinstance(target, EncoderDecoder) else list(one.prompt)
        for event in one.trace:
            if len(text) > 1:
                state = Target(target, [one.prompt], Settings(max_new_tokens=30))
                if apart:
                    assert state.encoded is not None
                    vectors = target.read(torch.tensor([text[:-1]]), state.state)
                else:
                    vectors = target.hidden(torch.tensor([text[:-1]]))  # type: ignore[union-attr]
                positions = torch.arange(len(text) - 1)[None]
                made = own.over(vectors, positions, state.encoded)[:, -1]
                wanted = target.logits(own.heads(made))[0].argmax(-1).tolist()
                assert event.drafted == wanted[: len(event.drafted)]
            text += event.emitted


@torch.inference_mode()
def test_the_hypothesis_is_what_the_second_decoder_writes() -> None:
    target = model("translator")
    assert isinstance(target, EncoderDecoder)
    own = guide("hybrid-decoding", target)
    assert isinstance(own, hybrid_decoding.FastDecoder)
    prompts = [[5, 6, 7], [9, 10, 11, 12, 8], [8, 3]]
    for one in generate(target, prompts, "hybrid-decoding", draft=own, max_new_tokens=12):
        assert not isinstance(one.prompt, str)
        memory, text = target.encoder(torch.tensor([one.prompt])), [target.start_token]
        for token in one.trace[0].drafted:
            embedded = target.embedding.looked_up(torch.tensor([text]))
            vectors = own.over(embedded, torch.arange(len(text))[None], memory)
            assert int(target.logits(vectors[:, -1:]).argmax()) == token
            text.append(token)
        assert len(one.trace[0].drafted) == 11  # the target adds one of its own


def test_a_hypothesis_that_is_right_takes_one_call() -> None:
    """The second decoder says what the target says: a copy of the target's layer, where it has just one."""
    target = model("translator")
    assert isinstance(target, EncoderDecoder)
    target = target.clone()
    target.decoder.layers = torch.nn.ModuleList([])
    own = guide("hybrid-decoding", target)
    for part in own.parameters():
        torch.nn.init.zeros_(part)
    own.norm = target.decoder.norm  # type: ignore[assignment]
    [found] = generate(target, [[5, 6, 7]], "hybrid-decoding", draft=own, max_new_tokens=12)
    [wanted] = generate(target, [[5, 6, 7]], max_new_tokens=12)
    assert found.tokens == wanted.tokens and found.calls == 1 and found.accepted == 11


def test_the_rest_is_found_again() -> None:
    hypothesis = [3, 4, 5, 6, 4, 7, 8]
    assert aligned(hypothesis, [3, 9], 2, 3) == 2  # nothing found: one for one
    assert aligned(hypothesis, [3, 9, 5], 3, 3) == 3  # behind the 5
    assert aligned(hypothesis, [3, 5], 2, 3) == 3  # a token is missing
    assert aligned(hypothesis, [3, 9, 9, 4], 4, 3) == 5  # of two the nearer one
    assert aligned(hypothesis, [3, 4], 2, 3) == 2
    assert aligned(hypothesis, [6, 4], 2, 3) == 5  # a longer run counts more
    assert aligned(hypothesis, [6, 4], 2, 1) == 2
    assert aligned(hypothesis, [8], 5, 1) == 7


def test_a_guide_or_model_of_another_kind_is_refused() -> None:
    text, apart = model("rotary"), model("translator")
    asked: dict[str, Any] = {"max_new_tokens": 4}
    with pytest.raises(FormeryError, match="for models with an encoder"):
        generate(text, [[5, 6]], "hybrid-decoding", draft=guide("hybrid-decoding", text), **asked)
    with pytest.raises(FormeryError, match="needs a second decoder as its guide"):
        generate(apart, [[5, 6]], "hybrid-decoding", draft=guide("medusa", apart), **asked)
    with pytest.raises(FormeryError, match="for a model without an encoder"):
        generate(apart, [[5, 6]], "whisper-medusa", draft=guide("whisper-medusa", text), **asked)
    with pytest.raises(FormeryError, match="for a model with an encoder of width 32"):
        generate(text, [[5, 6]], "whisper-medusa", draft=guide("whisper-medusa", apart), **asked)
    with pytest.raises(FormeryError, match="a hypothesis needs"):
        generate(apart, [[5, 6]], "hybrid-decoding:match=0", draft=guide("hybrid-decoding", apart), **asked)
