"""Drafts from counts: a corpus is found again by brute force, the search finds the best tree, and the text stays."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model
from hypothesis import given
from hypothesis import strategies as st
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.generate.ngrams import MOST, Corpus, CorpusGuide, Counts
from formery.methods.decoding.draft.aded import AdedDrafter
from formery.models import Decoder, EncoderDecoder, load, save

NAMES = ["aded", "aded:width=3:nodes=9:least=0", "aded:width=1:explore=0", "aded:static=true:shortest=1:least=0"]


def corpus(target: Decoder | EncoderDecoder) -> CorpusGuide:
    """What the model writes behind some prompts."""
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(6)]
    found = generate(target, prompts, max_new_tokens=20)
    tokens = torch.tensor([token for one in found for token in [*one.prompt, *one.tokens]])
    guide = CorpusGuide(target.embedding.width, target.vocabulary, len(tokens))
    guide.tokens.copy_(tokens)
    return guide


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 3), st.integers(0, 2), st.data())
def test_what_followed_a_run_is_found(tokens: list[int], shortest: int, more: int, data: st.DataObject) -> None:
    longest = shortest + more
    known, counts = Corpus(torch.tensor(tokens, dtype=torch.int16), shortest, longest), Counts(shortest, longest)
    for place, token in enumerate(tokens):
        counts.add(tokens[:place], token)
    run = data.draw(st.lists(st.integers(0, 3), min_size=shortest, max_size=longest))
    places = [at for at in range(len(run), len(tokens)) if tokens[at - len(run) : at] == run]
    expected = Counter(tokens[at] for at in places)
    assert known.after(tuple(run)) == counts.after(tuple(run)) == dict(expected)


def test_of_a_frequent_run_a_part_is_looked_at() -> None:
    tokens = torch.tensor([1, 2, 1, 3] * 1000)
    found = Corpus(tokens, 1, 1).after((1,))
    assert sum(found.values()) == pytest.approx(2000)
    assert abs(found[2] - 1000) < 4 * 1000 / MOST**0.5


def test_without_exploration_the_likeliest_lines_are_drafted() -> None:
    drafter = AdedDrafter(length=3, nodes=5, width=2, longest=2, shortest=1, explore=0, least=0)
    table = Counts(1, 2)
    for before, after, times in [(1, 2, 6), (1, 3, 3), (2, 4, 5), (2, 5, 4), (3, 6, 9), (4, 7, 1), (6, 8, 2)]:
        for _ in range(times):
            table.add([0, before], after)
    draft = drafter._search(table, [0, 1], 3)
    assert draft.chances is not None
    reached: dict[int, float] = {-1: 1.0}
    for place, chance in enumerate(draft.chances):
        reached[place] = reached[draft.parent(place)] * chance
    lines = {tuple(draft.tokens[one] for one in draft.line(place)): reached[place] for place in range(5)}
    # All lines of up to three guesses, from the counts; those of two known tokens are unknown, so one decides.
    followers = {1: {2: 6, 3: 3}, 2: {4: 5, 5: 4}, 3: {6: 9}, 4: {7: 1}, 6: {8: 2}}

    def grown(token: int, depth: int) -> list[tuple[tuple[int, ...], float]]:
        options = followers.get(token, {})
        total = sum(options.values()) + 0.5
        found = []
        for one, count in options.items():
            found.append(((one,), count / total))
            if depth > 1:
                found += [((one, *line), count / total * chance) for line, chance in grown(one, depth - 1)]
        return found

    best = sorted(grown(1, 3), key=lambda pair: -pair[1])[:5]
    assert lines == pytest.approx(dict(best))


def test_exploration_tries_other_guesses() -> None:
    table = Counts(1, 1)
    for before, after, times in [(1, 2, 6), (1, 3, 4), (2, 4, 9), (4, 5, 9), (5, 6, 9)]:
        for _ in range(times):
            table.add([before], after)

    def drafted(explore: float) -> list[int]:
        drafter = AdedDrafter(length=4, nodes=3, width=2, longest=1, shortest=1, explore=explore, least=0)
        return drafter._search(table, [1], 4).tokens

    assert drafted(0) == [2, 4, 5] and 3 in drafted(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*NAMES, "aded:adapt=true"])
def test_greedy_is_the_same(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(6)]
    for asked in (
        Settings(max_new_tokens=24, stop_tokens=frozenset([9, 31])),
        Settings(max_new_tokens=9, repetition_penalty=1.3),
    ):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 6):
            for draft in (None, corpus(target)):
                found = generate(target, prompts, name, batch=batch, draft=draft, **vars(asked))
                assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, 0.4])
def test_some_guesses_stand_and_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(7)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 30, "draft": corpus(target)}
    whole = generate(target, prompts, name, **asked)
    assert 0 < sum(one.accepted for one in whole) < sum(one.drafted for one in whole)
    for batch in (1, 3):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


def test_samples_are_the_target_s_own() -> None:
    target, asked = model("rotary", vocabulary=6), Settings(max_new_tokens=2, temperature=1.2, seed=11)
    text = CorpusGuide(target.embedding.width, 6, 60)
    text.tokens.copy_(torch.randint(6, (60,), generator=torch.Generator().manual_seed(1)))
    own = {"draft": text, "shortest": 1, "width": 3, "nodes": 6, "least": 0.0}
    found = generate(target, [[3, 3]] * 2000, "aded", **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


def test_it_learns_from_what_the_target_says_also_behind_wrong_guesses() -> None:
    target = model("rotary")
    asked: dict[str, Any] = {"max_new_tokens": 40, "shortest": 1, "least": 0.0, "draft": corpus(target)}
    [found], [static] = (generate(target, [[5, 6]], "aded", static=one, **asked) for one in (False, True))
    assert found.calls < static.calls


def test_a_corpus_comes_back_from_disk_as_it_was(tmp_path: Any) -> None:
    own = corpus(model("rotary"))
    save(own, tmp_path / "corpus", torch.float16)
    again = load(tmp_path / "corpus")
    assert isinstance(again, CorpusGuide) and again.tokens.dtype == torch.int16
    assert torch.equal(again.tokens, own.tokens)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": 0}, "nodes and width >= 1"),
        ({"least": 2.0}, "0 <= least <= 1"),
        ({"longest": 1}, "1 <= shortest <= longest"),
        ({"draft": CorpusGuide(32, 11, 4)}, "the corpus is of 11 tokens, the model of 97"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        generate(model("rotary"), [[3, 4]], "aded", max_new_tokens=4, **wrong)
