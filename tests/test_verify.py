"""Draft and verify is exact: greedily the very tokens, and counts that add up."""

import pytest
import torch
from generation import KINDS, from_scratch, model, noisy, recital, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.generate import Generation, Settings, draft_and_verify
from formery.generate.drafters import ModelDrafter
from formery.generate.run import generate
from formery.models import Decoder, EncoderDecoder

METHODS = {
    "greedy": {},
    "speculative-sampling": {},
    "speculative-sampling:length=1": {},
    "speculative-sampling:length=7": {},
    "aggressive-decoding": {},
    "aggressive-decoding:longest=2:shortest=1:length=3": {},
    "parallel-jacobi-decoding:form=plain": {},
    "parallel-jacobi-decoding:form=block:block=4": {},
    "parallel-jacobi-decoding:form=hybrid:block=3:until=5": {},
}
DRAFTS = {"perfect": 0.0, "good": 0.1, "bad": 3.0}


def options(method: str, target: Decoder | EncoderDecoder, draft: str = "good") -> dict[str, object]:
    """The draft, for methods that need one."""
    return {"draft": noisy(target, DRAFTS[draft])} if method.startswith("speculative") else {}


def check(one: Generation) -> None:
    """What every generation's counts must satisfy."""
    assert one.calls == len(one.trace) > 0
    assert one.drafted == sum(len(event.drafted) for event in one.trace)
    assert one.accepted == sum(event.accepted for event in one.trace) <= one.drafted
    assert one.tokens == [token for event in one.trace for token in event.emitted]
    assert one.text == "".join(event.text for event in one.trace)
    assert one.state_bytes > 0
    assert [event.stop for event in one.trace[:-1]] == [None] * (one.calls - 1)
    assert one.trace[-1].stop == one.stop
    for event in one.trace:
        assert event.emitted[: event.accepted] == event.drafted[: event.accepted]
        assert len(event.emitted) == event.accepted + 1 or event.stop in ("end", "stop")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(data=st.data())
def test_greedy_is_the_same_by_every_method(kind: str, data: st.DataObject) -> None:
    target = model(kind, data.draw(st.integers(0, 2), "model"), max_length=20)
    prompt = st.lists(st.integers(2, 96), min_size=1, max_size=12)
    rows = data.draw(st.sampled_from([1, 3, 16]), "rows")
    prompts = data.draw(st.lists(prompt, min_size=rows, max_size=rows), "prompts")
    asked = Settings(
        max_new_tokens=data.draw(st.sampled_from([1, 6, 14]), "new"),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.0, 1.3, 0.8]), "penalty"),
        stop_tokens=frozenset(data.draw(st.sets(st.integers(0, 96), max_size=6), "ends")),
    )
    wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
    draft = data.draw(st.sampled_from(sorted(DRAFTS)), "draft")
    for method in METHODS:
        found = generate(target, prompts, method, **vars(asked), **options(method, target, draft))
        assert [(one.tokens, one.stop) for one in found] == wanted, method
        for one in found:
            check(one)


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_are_accepted_and_rejected(kind: str) -> None:
    """Without this, the test above could pass on methods that never draft, or never are right or wrong."""
    target = model(kind)
    prompts = [[row + 2, 3 * row + 2] for row in range(16)]
    for method in METHODS:
        if method == "greedy":
            continue
        for draft in DRAFTS if method.startswith("speculative") else ["good"]:
            found = generate(target, prompts, method, max_new_tokens=24, **options(method, target, draft))
            drafted, accepted = sum(one.drafted for one in found), sum(one.accepted for one in found)
            if draft == "perfect":
                assert accepted >= 0.9 * drafted > 0
            elif draft == "good":
                assert 0 < accepted < drafted, method
            else:
                assert accepted < 0.5 * drafted


def test_texts_with_stop_strings_are_the_same_by_every_method() -> None:
    target = model("rotary", vocabulary=small_tokenizer().vocabulary_size)
    target.tokenizer = small_tokenizer()
    prompts = [[row + 40, 3 * row + 40, 50][: 1 + row % 3] for row in range(12)]
    plain = [one.text for one in generate(target, prompts, max_new_tokens=24)]
    # Strings that do occur, cut from the middle of each other row's text.
    stop = tuple({text[9:11] for text in plain[::2]} - {""})
    asked = Settings(max_new_tokens=24, stop=stop)
    wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
    assert {"stop", "length"} == {why for _, why in wanted}
    for method in METHODS:
        found = generate(target, prompts, method, max_new_tokens=24, stop=stop, **options(method, target))
        assert [(one.tokens, one.stop) for one in found] == wanted, method
        for one, text in zip(found, plain, strict=True):
            check(one)
            places = [text.find(each) for each in stop if each in text]
            assert one.text == text[: min(places, default=None)]


@pytest.mark.parametrize("at", range(1, 9))
def test_what_stops_within_a_draft_stops_there(at: int) -> None:
    """A perfect draft of 6 runs over an end token, a stop string or the length; nothing behind it is written."""
    text = small_tokenizer().encode("the cat sat on the mat; then the dog")
    target = recital(text, small_tokenizer().vocabulary_size)
    target.tokenizer = small_tokenizer()
    asked = {"draft": target, "length": 6}
    end = generate(target, [[9]], "speculative-sampling", stop_tokens=[text[at]], **asked)[0]
    first = text.index(text[at])
    assert (end.tokens, end.stop) == (text[:first], "end")
    short = generate(target, [[9]], "speculative-sampling", max_new_tokens=at, **asked)[0]
    assert (short.tokens, short.stop) == (text[:at], "length")
    word = target.tokenizer.decode([text[at]])
    cut = generate(target, [[9]], "speculative-sampling", stop=[word], **asked)[0]
    whole = target.tokenizer.decode(text)
    assert (cut.text, cut.stop) == (whole[: whole.index(word)], "stop")
    for one in (end, short, cut):
        check(one)
        assert one.calls <= 2 + at // 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_model_stops(kind: str) -> None:
    """The last token that a full model can predict is written, none after it, and nothing is raised."""
    target = model(kind, max_length=10)
    prompts = [[5], [6, 7, 8, 9], list(range(20, 30))]
    for method in METHODS:
        for found in generate(target, prompts, method, max_new_tokens=50, **options(method, target)):
            read = 1 if target.reads_apart else len(found.prompt)
            assert (len(found.tokens), found.stop) == (11 - read, "length")


def test_batches_and_the_whole_list_agree() -> None:
    target = model("rotary")
    prompts = [[row + 2, row + 3][: 1 + row % 2] for row in range(7)]
    whole = generate(target, prompts, "aggressive-decoding", max_new_tokens=12)
    for batch in (1, 3, 7, 100):
        parts = generate(target, prompts, "aggressive-decoding", batch=batch, max_new_tokens=12)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]


def test_dropout_is_off_while_generating_and_back_on_after() -> None:
    target = model("rotary")
    for part in target.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    quiet = generate(target, [[5, 6]], max_new_tokens=12)[0].tokens
    draft = noisy(target, 0.0).train()
    target.train()
    assert generate(target, [[5, 6]], max_new_tokens=12)[0].tokens == quiet
    perfect = generate(target, [[5, 6]], "speculative-sampling", draft=draft, max_new_tokens=12)[0]
    assert perfect.tokens == quiet
    assert perfect.accepted == perfect.drafted
    assert target.training
    assert draft.training


def test_no_prompts_no_generations() -> None:
    assert generate(model("rotary"), []) == []


def test_a_wrong_rule_changes_greedy_nothing() -> None:
    """The rule decides sampling only; greedy tokens are compared."""
    target = model("rotary")
    wrong = draft_and_verify(
        target,
        [[5, 6]],
        Settings(max_new_tokens=9),
        0,
        ModelDrafter(noisy(target, 3.0)),
        rule=lambda *_: None,
    )
    tokens = [token for events in wrong for token in events[0].emitted]
    assert tokens == from_scratch(target, [5, 6], Settings(max_new_tokens=9))[0]


@pytest.mark.parametrize("rows", [1, 4])
def test_events_of_one_call_share_its_times(rows: int) -> None:
    target = model("rotary")
    for events in draft_and_verify(
        target, [[5, 6]] * rows, Settings(max_new_tokens=5), 0, ModelDrafter(noisy(target, 0.1))
    ):
        assert len({(event.draft_seconds, event.verify_seconds) for event in events}) == 1
        assert events[0].verify_seconds > 0
    assert not torch.is_inference_mode_enabled()
