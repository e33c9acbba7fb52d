"""Drafters: what they guess, and that a guess never depends on a row's neighbours."""

import itertools

import pytest
import torch
from generation import from_scratch, model, noisy
from hypothesis import given
from hypothesis import strategies as st

from formery.errors import FormeryError
from formery.generate import Row, Settings, Verdict
from formery.generate.draft import as_batch, stream_of
from formery.generate.drafters import CopyDrafter, ModelDrafter, Places
from formery.generate.run import generate
from formery.generate.target import Target
from formery.methods.decoding.parallel.parallel_jacobi_decoding import JacobiDrafter


def row(prompt: list[int], output: list[int], apart: bool = False, index: int = 0) -> Row:
    return Row(index, prompt, [1] if apart else prompt, apart, stream_of(0, index, "target"), output)


def copied(prompt: list[int], output: list[int], apart: bool = False, **options: int | bool) -> list[int]:
    """What is copied after this output."""
    drafter = CopyDrafter(**options)  # type: ignore[arg-type]
    one = row(prompt, [], apart)
    drafter.begin(Target(model("rotary"), [prompt], Settings()), [one], Settings())
    for token in output:
        one.output.append(token)
        drafter.observe([one], [Verdict(0, [token], [token])])
    return drafter.propose([one], [100])[0].tokens


def test_copying_follows_the_latest_place_of_the_longest_ending() -> None:
    assert copied([7, 8, 9, 5, 7, 8, 6, 7, 8], [], length=2) == [6, 7]
    assert copied([5, 7, 8, 9, 4, 7, 8, 6, 5], [7, 8], length=1) == [9]  # (5, 7, 8) is longer than (7, 8)
    assert copied([7, 8, 9], [8], length=4, shortest=1) == [9, 8]
    assert copied([7, 8, 9], [8], length=4) == []
    assert copied([7, 8, 9, 7, 8, 9], [7, 8], unique=True, longest=2) == []
    assert copied([7, 8, 9, 6], [7, 8], unique=True, length=2) == [9, 6]


def test_a_text_read_apart_is_first_proposed_whole() -> None:
    assert copied([5, 6, 7], [], apart=True) == [5, 6, 7]
    assert copied([5, 6, 7], [], apart=True, aligned=False) == []
    assert copied([5, 6, 7, 8], [9, 6, 7], apart=True) == [8, 9, 6, 7][:4]
    # The end of the input and the begin of the output are two texts: no ending reaches across.
    assert copied([5, 6, 3, 6, 5], [6], apart=True) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.booleans())
def test_places_are_those_of_a_search(tokens: list[int], shortest: int, more: int, unique: bool) -> None:
    longest = shortest + more
    places = Places(shortest, longest, tokens[:1], apart=False)
    for token in tokens[1:]:
        places.extend([token])
    wanted: list[int] = []
    for size in range(longest, shortest - 1, -1):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[len(tokens) - size :]]
        if len(tokens) >= size and ends and not (unique and len(ends) > 1):
            wanted = tokens[ends[-1] : ends[-1] + 5]
            break
    assert places.following(5, unique) == wanted


def test_jacobi_settles_at_least_as_fast_as_its_proof_says() -> None:
    """Each call settles one more token, and the call that finds nothing new to change is the last of its block."""
    target = model("alibi")
    for form, most in (("plain", 24), ("block", 24), ("hybrid", 24)):
        found = generate(target, [[9, 10, 11]], f"parallel-jacobi-decoding:form={form}", max_new_tokens=24)[0]
        assert found.calls <= most
        assert found.calls + found.accepted == 24
    plain = generate(target, [[9, 10, 11]], "parallel-jacobi-decoding:form=plain", max_new_tokens=24)[0]
    assert len(plain.trace[0].drafted) == 23


def test_jacobi_blocks_end_where_they_should() -> None:
    found = generate(model("rotary"), [[9, 10]], "parallel-jacobi-decoding:block=4", max_new_tokens=18)[0]
    written = 0
    for event in found.trace:
        assert written // 4 == (written + len(event.drafted)) // 4
        written += len(event.emitted)
    hybrid = generate(
        model("rotary"), [[9, 10]], "parallel-jacobi-decoding:form=hybrid:block=4:until=6", max_new_tokens=18
    )[0]
    written = 0
    for event in hybrid.trace:
        assert bool(event.drafted) == (written < 6 and written % 4 < 3)
        written += len(event.emitted)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["rotary", "learned", "alibi", "window"])
def test_jacobi_guesses_are_the_last_iterate(kind: str) -> None:
    """By hand: the next guess at each open place is the target's choice after the guesses before it."""
    target, prompt = model(kind), [5, 6, 7]
    found = generate(target, [prompt], "parallel-jacobi-decoding:form=plain", max_new_tokens=8)[0]
    assert found.calls > 2
    text = list(prompt)
    for event, after in itertools.pairwise(found.trace):
        choices = target(torch.tensor([[*text, *event.drafted]]))[0, len(text) - 1 :].argmax(-1).tolist()
        assert event.emitted == choices[: event.accepted + 1]
        assert after.drafted == choices[event.accepted + 1 :][: len(after.drafted)]
        text += event.emitted


@pytest.mark.parametrize("kind", ["rotary", "translator"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_models_state_keeps_up(kind: str, temperature: float) -> None:
    """Drafts after any history are those of a draft model that reads the text anew, alone."""
    target = model(kind)
    draft = noisy(target, 0.3)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12]]
    asked = {"temperature": temperature, "max_new_tokens": 16, "draft": draft, "length": 3}
    found = generate(target, prompts, "speculative-sampling", **asked)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)
    if temperature:
        return
    for one in found:
        written: list[int] = []
        for event in one.trace:
            start = [1] if draft.reads_apart else one.prompt
            for place, token in enumerate(event.drafted):
                read = torch.tensor([[*start, *written, *event.drafted[:place]]])
                logits = draft(torch.tensor([one.prompt]), read) if draft.reads_apart else draft(read)
                assert int(logits[0, -1].argmax()) == token
            written += event.emitted


def test_a_short_draft_model_drafts_until_it_is_full() -> None:
    """Its last token is written from its last position; rows that are longer do not keep others from drafting."""
    target, draft = model("learned", max_length=40), model("learned", max_length=12)
    prompts = [[5, 6], list(range(20, 31)), list(range(30, 42))]
    found = generate(target, prompts, "speculative-sampling", draft=draft, length=4, max_new_tokens=20)
    for one in found:
        assert one.tokens == from_scratch(target, one.prompt, Settings(max_new_tokens=20))[0]
        at = len(one.prompt)
        for event in one.trace:
            assert len(event.drafted) == max(0, min(4, 13 - at, len(one.prompt) + 20 - at - 1))
            at += len(event.emitted)
    alone = [
        generate(target, [one], "speculative-sampling", draft=draft, length=4, max_new_tokens=20)[0] for one in prompts
    ]
    assert [one.trace and [e.drafted for e in one.trace] for one in found] == [
        [e.drafted for e in one.trace] for one in alone
    ]


def test_rooms_are_respected_and_drafts_do_not_depend_on_neighbours() -> None:
    target = model("rotary")
    rows = [row([5, 6], [], index=0), row([7], [], index=1)]
    one = ModelDrafter(noisy(target, 0.2), 4)
    one.begin(Target(target, [[5, 6], [7]], Settings()), rows, Settings(temperature=1.0))
    together = one.propose(rows, [1, 9])
    assert [len(draft.tokens) for draft in together] == [1, 4]
    rows[0].output.append(3)
    rows[1].output.append(4)
    one.observe(rows, [Verdict(0, [3], [3]), Verdict(0, [4], [4])])
    again = one.propose(rows, [3, 0])
    assert [len(draft.tokens) for draft in again] == [3, 0]
    single = ModelDrafter(noisy(target, 0.2), 4)
    fresh = [row([5, 6], [], index=0)]
    single.begin(Target(target, [[5, 6]], Settings()), fresh, Settings(temperature=1.0))
    assert single.propose(fresh, [1])[0].tokens == together[0].tokens
    fresh[0].output.append(3)
    single.observe(fresh, [Verdict(0, [3], [3])])
    assert single.propose(fresh, [3])[0].tokens == again[0].tokens


def test_rows_of_unequal_width_carry_positions() -> None:
    device = torch.device("cpu")
    assert as_batch([[1, 2], [3, 4]], [0, 5], device)[1] is None
    tokens, positions = as_batch([[1, 2], [3], []], [0, 5, 7], device)
    assert tokens.tolist() == [[1, 2], [3, 0], [0, 0]]
    assert positions is not None
    assert positions.tolist() == [[0, 1], [5, -1], [-1, -1]]


def test_bad_drafters_are_refused() -> None:
    for make in (
        lambda: ModelDrafter(model("rotary"), 0),
        lambda: CopyDrafter(length=0),
        lambda: CopyDrafter(shortest=3, longest=2),
        lambda: JacobiDrafter(form="blok"),
        lambda: JacobiDrafter(block=1),
        lambda: JacobiDrafter(until=0),
    ):
        with pytest.raises(FormeryError):
            make()
