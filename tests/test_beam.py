"""Beam search finds what an exhaustive search finds, and what transformers finds."""

import itertools

import pytest
import torch
from generation import llama, model, padded_left, random_told, small_tokenizer, until_end

from formery.errors import FormeryError
from formery.generate.run import generate


def test_one_beam_is_greedy() -> None:
    for kind in ("rotary", "translator"):
        target, prompts = model(kind), [[5, 6, 7], [8], [9, 10]]
        greedy = generate(target, prompts, max_new_tokens=12)
        beam = generate(target, prompts, "beam", beams=1, max_new_tokens=12)
        assert [one.tokens for one in beam] == [one.tokens for one in greedy]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0, 2.0])
def test_with_enough_beams_it_finds_the_best_text_there_is(seed: int, penalty: float) -> None:
    """Every text of up to 4 tokens over 3 tokens and an end token is scored by hand."""
    end, longest = 3, 4
    target = random_told(4, seed)
    scores: dict[tuple[int, ...], float] = {}
    for length in range(longest + 1):
        for text in itertools.product(range(3), repeat=length):
            whole = (*text, end) if length < longest else text
            total = sum(float(target.says((0, *whole[:i])).log_softmax(-1)[token]) for i, token in enumerate(whole))
            scores[text] = total / len(whole) ** penalty
    best = max(scores, key=lambda text: scores[text])
    found = generate(  # type: ignore[arg-type]
        target, [[0]], "beam", beams=100, length_penalty=penalty, max_new_tokens=longest, stop_tokens=[end]
    )[0]
    assert tuple(found.tokens) == best
    assert found.stop == ("length" if len(best) == longest else "end")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ends", [[2], [2, 5, 9]])
def test_it_is_the_beam_search_of_transformers(seed: int, ends: list[int]) -> None:
    ours, theirs = llama(seed, vocabulary=13)
    prompts = [[5, 7, 9], [4], [11, 3, 8, 6, 5], [12, 12]]
    stops = set()
    for beams, penalty in ((2, 0.0), (2, 1.0), (4, 0.7), (4, 1.0), (5, 1.6)):
        given = {"max_new_tokens": 14, "length_penalty": penalty}
        answers = theirs.generate(**padded_left(prompts), num_beams=beams, do_sample=False, eos_token_id=ends, **given)
        wanted = [until_end(tokens, ends) for tokens in answers[:, 5:].tolist()]
        found = generate(ours, prompts, "beam", beams=beams, stop_tokens=ends, **given)
        assert [one.tokens for one in found] == wanted
        stops |= {one.stop for one in found}
    assert stops == {"end", "length"}


def test_more_beams_find_likelier_texts_whatever_the_batch() -> None:
    target = model("translator")
    prompts = [[row + 2, 7, row + 9][: 1 + row % 3] for row in range(7)]
    for beams in (3, 5):
        whole = generate(target, prompts, "beam", beams=beams, max_new_tokens=8, stop_tokens=[9])
        single = generate(target, prompts, "beam", batch=1, beams=beams, max_new_tokens=8, stop_tokens=[9])
        assert [one.tokens for one in whole] == [one.tokens for one in single]
        assert all(one.calls == len(one.trace) <= 8 for one in whole)


def test_its_text_ends_at_a_stop_string() -> None:
    target = model("rotary", vocabulary=small_tokenizer().vocabulary_size)
    target.tokenizer = small_tokenizer()
    plain = generate(target, [[40, 41]], "beam", max_new_tokens=10)[0]
    stop = plain.text[2:4]
    cut = generate(target, [[40, 41]], "beam", max_new_tokens=10, stop=[stop])[0]
    assert (cut.text, cut.stop) == (plain.text[: plain.text.index(stop)], "stop")
    assert plain.text == small_tokenizer().decode(plain.tokens)


def test_a_penalty_on_repetition_reaches_the_beams() -> None:
    target = model("alibi")
    plain = generate(target, [[8]], "beam", beams=3, max_new_tokens=12)[0]
    varied = generate(target, [[8]], "beam", beams=3, max_new_tokens=12, repetition_penalty=5.0)[0]
    assert len(set(varied.tokens)) > len(set(plain.tokens))


def test_beams_do_not_sample() -> None:
    with pytest.raises(FormeryError, match="temperature"):
        generate(model("rotary"), [[5]], "beam", temperature=1.0)
    with pytest.raises(FormeryError, match="at least 1 beam"):
        generate(model("rotary"), [[5]], "beam", beams=0)


def test_a_full_model_ends_the_search() -> None:
    found = generate(model("learned", max_length=8), [[5, 6, 7]], "beam", beams=3, max_new_tokens=50)[0]
    assert (len(found.tokens), found.stop) == (6, "length")
    assert not torch.is_grad_enabled() or found.state_bytes > 0
