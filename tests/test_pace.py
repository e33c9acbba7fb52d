"""The length of drafts is the one that pays by the costs and the acceptance that were seen."""

import pytest
from generation import model, noisy
from hypothesis import given
from hypothesis import strategies as st

from formery.generate import Draft, generate
from formery.generate.draft import Verdict
from formery.generate.pace import DEEPEST, EXPLORE, Line, Pace


def taught(pace: Pace, stands: list[int], first: float, each: float, guess: float, rounds: int = 300) -> None:
    """Shows it drafts of all lengths; stands: for each round, how many guesses of a long draft would stand."""
    for number in range(rounds):
        length = number % DEEPEST
        accepted = min(stands[number % len(stands)], length)
        draft, verdict = Draft(list(range(length))), Verdict(accepted, [0] * (accepted + 1), [])
        pace.observe([draft], [verdict], guess * length, first + each * (1 + length))


@given(st.floats(0.5, 2), st.floats(0, 0.5), st.floats(0, 20))
def test_a_line_through_points_is_found(base: float, each: float, beyond: float) -> None:
    line = Line(steep=0.05)
    for number in range(400):
        n = number % 9
        line.add(n, base + each * n)
    assert line(beyond) == pytest.approx(base + each * beyond, rel=0.1, abs=0.1)


@pytest.mark.parametrize(
    ("stands", "first", "each", "guess"),
    [
        ([9], 1.0, 0.0, 0.0),  # all stands and is free: as deep as can be
        ([0], 1.0, 0.1, 0.5),  # nothing stands
        ([1, 2, 3], 1.0, 0.1, 0.05),
        ([0, 4], 1.0, 0.3, 0.1),
        ([0, 1, 1, 6], 2.0, 0.05, 0.3),
    ],
)
def test_the_length_is_the_one_of_most_tokens_a_second(
    stands: list[int], first: float, each: float, guess: float
) -> None:
    pace = Pace(named=True)
    taught(pace, stands, first, each, guess)
    rates = {
        length: sum(1 + min(one, length) for one in stands)
        / len(stands)
        / (first + each * (1 + length) + guess * length)
        for length in range(1, DEEPEST + 1)
    }
    pace.steps = 1
    [found] = pace.rooms([100])
    assert rates[found] > 0.97 * max(rates.values())
    assert pace.rooms([2, 100])[0] == min(2, found)


def test_now_and_then_a_draft_may_be_as_deep_as_there_is_room() -> None:
    pace = Pace(named=True)
    taught(pace, [0], 1.0, 0.5, 0.5)
    found = [pace.rooms([50])[0] for _ in range(2 * EXPLORE)]
    assert found.count(50) == 2 and set(found) == {1, 50}


def test_the_guesses_that_cost_more_than_they_bring_are_cut() -> None:
    pace = Pace(named=True)
    taught(pace, [3], 1.0, 0.2, 0.0)
    pace.steps = 2
    tree = Draft([5, 6, 7, 8, 9], None, [-1, 0, -1, 1, 2], [0.9, 0.9, 0.05, 0.9, 0.9])
    [kept] = pace.trim([tree])
    # The likely line stays; the unlikely one goes with all that hangs on it.
    assert kept.tokens == [5, 6, 8] and kept.parents == [-1, 0, 1]
    drawn = Pace(named=False)
    drawn.steps = 2
    assert drawn.trim([tree]) == [tree]  # what was drawn stays: cutting by its chance would favour tokens


def test_what_never_stands_is_soon_drafted_in_ones() -> None:
    target, other = model("rotary"), model("rotary", seed=5)
    asked = {"max_new_tokens": 90, "length": 6}
    [fixed] = generate(target, [[5, 6]], "speculative-sampling", draft=other, **asked)
    [found] = generate(target, [[5, 6]], "speculative-sampling", draft=other, adapt=True, **asked)
    assert found.tokens == fixed.tokens and found.drafted < fixed.drafted / 2
    [same] = generate(target, [[5, 6]], "speculative-sampling", draft=noisy(target, 0.0), adapt=True, **asked)
    assert same.tokens == fixed.tokens and same.accepted == same.drafted
