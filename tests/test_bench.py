"""The benchmark's arithmetic and manners; what it measures is never asserted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import cases as works
from bench import drafting
from bench.__main__ import main
from bench.limits import BUFFER, SIDE, least_seconds
from bench.race import Entrant, order, race
from bench.rows import Row, first_difference, rows_of
from bench.systems import KNOWN, OURS, REFERENCE
from formery.generate import Event, Generation

CASE = works.cases("decode", ["float32"], ["gpt2-tiny"], quick=True)[0]
seconds = st.floats(1e-3, 1e3)


@given(st.integers(1, 9), st.integers(0, 30))
def test_everyone_runs_once_a_round_and_begins_in_turn(entrants: int, number: int) -> None:
    assert sorted(order(entrants, number)) == list(range(entrants))
    assert order(entrants, number)[0] == number % entrants


def test_laps_are_interleaved_and_prepared() -> None:
    seen: list[str] = []
    entrants = [
        Entrant(name, lambda name=name: seen.append(name), lambda: seen.append("-"), repeats=2)  # type: ignore[misc]
        for name in "abc"
    ]
    laps = race(entrants, 4, lambda done, total, what: None, pause=0)
    assert [len(one) for one in laps] == [4, 4, 4]
    assert "".join(seen) == "".join(f"-{one}-{one}" for one in "abcbcacababc")


def rows(timed: dict[str, list[float]], outputs: dict[str, Any] | None = None, width: int | None = None) -> list[Row]:
    entrants = [Entrant(name, list, width=width, output=(outputs or {}).get(name, [[1, 2]])) for name in timed]
    rounds = len(next(iter(timed.values())))
    return rows_of(CASE, entrants, list(timed.values()), [1.0] * rounds, [1.0] * rounds)


@given(st.lists(st.tuples(seconds, seconds, seconds), min_size=1, max_size=7))
def test_ratios_are_taken_within_rounds(laps: list[tuple[float, float, float]]) -> None:
    ours, theirs, other = (list(one) for one in zip(*laps, strict=True))
    mine, reference, third = rows({OURS: ours, REFERENCE: theirs, "llama.cpp": other})
    best = reference if reference.best_peer == REFERENCE else third
    assert mine.best_peer == reference.best_peer == third.best_peer != OURS
    assert reference.ratio_to_transformers == 1 and best.ratio_to_best_peer == 1
    assert mine.ratio_to_best_peer is not None and mine.ratio_to_best_peer_spread is not None
    low, high = mine.ratio_to_best_peer_spread
    assert low <= mine.ratio_to_best_peer <= high
    assert mine.spread[0] <= mine.tokens_per_second <= mine.spread[1]


@given(st.lists(seconds, min_size=1, max_size=5), st.floats(0.1, 10))
def test_twice_as_long_is_half_as_fast(laps: list[float], factor: float) -> None:
    mine, reference = rows({OURS: laps, REFERENCE: [factor * one for one in laps]})
    assert mine.ratio_to_transformers == pytest.approx(factor, rel=1e-4)
    assert reference.tokens_per_second == pytest.approx(mine.tokens_per_second / factor, rel=1e-3)


def test_without_peers_there_are_no_ratios() -> None:
    [mine] = rows({OURS: [1.0, 2.0]})
    assert mine.best_peer is mine.ratio_to_best_peer is mine.ratio_to_transformers is mine.agrees is None
    assert mine.ratio_to_limit > 0


def test_the_first_difference_is_told() -> None:
    outputs = {OURS: [[1, 2], [3, 4]], REFERENCE: [[1, 2], [3, 5]]}
    mine, reference = rows({OURS: [1.0], REFERENCE: [1.0]}, outputs)
    assert mine.first_difference == {"row": 1, "place": 1, "token": 4, "reference": 5} and mine.agrees is False
    assert reference.agrees is True
    training = works.cases("train", ["float32"], None, quick=True)[0]
    assert first_difference(training, 2.0, 2.00001) is None and first_difference(training, 2.0, 2.1) is not None


@pytest.mark.parametrize(("dtype", "size"), works.BYTES.items())
def test_the_limit_is_reading_for_a_token_and_arithmetic_for_many(dtype: str, size: float) -> None:
    one = least_seconds([works.Pass(1000, 1)], dtype, reading=1.0, product=1e-9)
    assert one == pytest.approx(1000 * size / BUFFER)
    many = least_seconds([works.Pass(1000, 10**9, 3)], dtype, reading=1e-9, product=1.0)
    assert many == pytest.approx(3 * 2 * 1000 * 10**9 / (2 * SIDE**3))


@pytest.mark.parametrize("work", works.WORKS)
def test_every_case_has_prompts_and_a_cost(work: str) -> None:
    for case in works.cases(work, None, None, quick=False):
        prompts = case.prompts()
        assert prompts == case.prompts() and len(prompts) == case.batch
        assert all(0 < token < case.shape.vocabulary - 1 for prompt in prompts for token in prompt)
        for width in case.widths or (None,):
            assert case.tokens(width) > 0 and all(one.weights > 0 for one in case.passes(width))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "decode|batch"),
        (["dekode"], "dekode"),
        (["decode", "--rounds", "none"], "--rounds"),
        (["decode", "--rounds", "0"], "--rounds"),
        (["decode", "--systems", "formery,lama.cpp"], "llama.cpp"),
        (["decode", "--systems", ","], "--systems"),
        (["decode", "--dtype", "float23"], "float32"),
        (["train", "--dtype", "int8"], "int8"),
        (["decode", "--models", "gpt3"], "gpt2-124m"),
        (["plot", "no-such-file.json"], "no-such-file.json"),
        (["plot", __file__, "--out", "speed.png"], "holds no results"),
        (["plot", "a.json", "--out", "speed.txt"], "speed.txt"),
    ],
)
def test_a_mistake_is_one_sentence(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench: ") and error.count("\n") == 1 and said in error


def test_from_weights_to_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORMERY_BENCH", str(tmp_path / "weights"))
    monkeypatch.setattr("bench.limits.BUFFER", 2**20)
    monkeypatch.setattr("bench.limits.SIDE", 64)
    missing = KNOWN["llama.cpp"].__class__("missing", "nowhere:Nothing", "no_such_package", "no-such-package")
    monkeypatch.setitem(KNOWN, "missing", missing)
    results = tmp_path / "out" / "result.json"
    options = ["--quick", "--rounds", "2", "--systems", "formery,transformers,missing", "--models", "llama-tiny"]
    assert main(["decode", *options, "--dtype", "float32", "--json", str(results)]) == 0
    told = capsys.readouterr()
    assert "pip install no-such-package" in told.err
    assert max(map(len, told.out.splitlines())) <= 80
    data = json.loads(results.read_text())
    assert {"processor", "cores", "memory_gib", "versions"} <= data["machine"].keys()
    assert {"torch", "transformers", "formery"} <= data["machine"]["versions"].keys()
    assert [row["system"] for row in data["rows"]] == ["formery", "transformers"]
    for row in data["rows"]:
        assert row.keys() == Row.__dataclass_fields__.keys()
        assert row["agrees"] is True and len(row["seconds"]) == 2 and row["best_peer"] == "transformers"
    assert [one["system"] for one in data["skipped"]] == ["missing"]
    assert main(["plot", str(results), "--out", str(tmp_path / "speed.svg")]) == 0
    assert "<svg" in (tmp_path / "speed.svg").read_text()
    assert not list(tmp_path.rglob("*.part"))


def written(*calls: tuple[list[int], list[int], list[int]]) -> Generation:
    """What calls wrote: the guesses of each, the places of those that stand, and the tokens that it added."""
    made = Generation([1])
    for drafted, path, emitted in calls:
        made.add(Event(0, drafted, path=path, emitted=emitted, draft_seconds=0.25, verify_seconds=0.5))
    return made


def test_figures_of_drafting_come_from_the_trace() -> None:
    one = written(([5, 6, 7], [0, 1], [5, 6, 9]), ([4, 4], [], [8]), ([3], [0], [3, 2]))
    plain = written(*(([], [], [token]) for token in (5, 6, 9, 8, 3, 1)))
    case = drafting.Case("code", 1, 6, 1)
    row = drafting.row(case, "medusa", drafting.Laid([one], [3.0], [2.0]), drafting.Laid([plain], [6.0], [1.0]))
    assert row.identical == 0
    assert (row.calls_per_token, row.accepted_per_call) == (0.5, 1.0)
    assert row.by_depth == [2 / 3, 1.0, 0.0]
    assert (row.drafting, row.verifying, row.besides) == (0.25, 0.5, 0.25)
    assert row.speedup == (2.0, 2.0, 2.0) and row.error is None
    row.predicted = 3.0
    assert row.error == pytest.approx(0.5)


def test_works_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drafting", "--models", "poems"]) == 2
    assert "there are code and translate" in capsys.readouterr().err
