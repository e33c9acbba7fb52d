"""Sparse Frontier: what settings look at and cost, intervals, and what the claims make of answers."""

import os
from typing import Any

import pytest
import torch
from generation import decoder

from formery.evidence.intervals import bootstrap
from formery.evidence.recalling import Due, answers, read
from formery.methods.attention import sparse_frontier as paper
from formery.methods.attention.comparing import TASKS, TEXT, due
from formery.methods.attention.sparse_frontier import FULL, PHASES, READING, SIZES, WRITING, Grid, counted, named
from formery.models import load
from formery.models.compose import language_model
from formery.parts import Rotary

LENGTH = 320
DUE = Due("recall", [(5 * i) % 97 for i in range(LENGTH)], [3, 1, 4])


def test_a_setting_looks_at_the_share_that_it_is_named_for() -> None:
    model = decoder(Rotary(), layers=2).eval()
    for method, make in READING.items():
        for times in (2, 4):
            own, counting = counted(model, make(1 / times), "reading")
            [_] = answers(own, [own], DUE)
            # Blocks are coarse at this length, and lines cross each other.
            assert 0.5 / times < counting.share < 1.1 / times, (method, times)
    for method, choose in WRITING.items():
        own, counting = counted(model, choose(160), "writing")
        [_] = answers(own, [own], DUE)
        assert 0.45 < counting.share < 0.55, method


def test_a_variant_answers_the_same_by_its_own_reading_and_by_that_of_another() -> None:
    model = decoder(Rotary(), layers=2).eval()
    reader, _ = counted(model, WRITING["window and sinks"](16), "writing")
    for choose in WRITING.values():
        own, _ = counted(model, choose(24), "writing")
        [shared], [alone] = list(answers(reader, [own], DUE)), list(answers(own, [own], DUE))
        assert shared.losses == pytest.approx(alone.losses, abs=1e-5)
    state = read(reader, DUE)
    assert state.lengths == [LENGTH - 1]


def test_an_interval_holds_the_mean_and_narrows() -> None:
    draw = torch.Generator().manual_seed(0)
    few, many = (torch.rand(n, generator=draw).tolist() for n in (20, 2000))
    assert bootstrap([0.5] * 9) == (0.5, 0.5) and bootstrap(few) == bootstrap(few)
    low, high = bootstrap(many)
    assert low < sum(many) / len(many) < high and high - low == pytest.approx(4 * 0.2887 / 2000**0.5, rel=0.15)
    assert bootstrap(few)[1] - bootstrap(few)[0] > 5 * (high - low)


def test_products_of_a_token() -> None:
    model = language_model(50, 32, 3, 4, 2, 64, 2048)
    linear = model.parameter_count()
    assert paper.products(model, "writing", 1.0) == linear + 2 * 3 * 32 * paper.LENGTH
    assert paper.products(model, "reading", 0.5) == linear + 3 * 32 * (paper.LENGTH + 1) / 2


def grid(right: dict[str, float], answered: float = 1.0, size_of: tuple[str, ...] = SIZES) -> Grid:
    """Where full attention answers that part of 40 questions and a setting loses right[its name or name|task]."""
    settings = [named(p, m, t) for p in PHASES for m in PHASES[p] for t in paper.COMPRESSIONS]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for size in size_of:
        for seed in (0, 1):
            own: dict[str, Any] = {}
            for name in [FULL, *settings]:
                for task in TASKS:
                    lost = right.get(f"{size}: {name}|{task}", right.get(f"{name}|{task}", right.get(name, 0.0)))
                    own[f"{name}|{task}"] = [float(i < 20 * answered * (1 - lost)) for i in range(20)]
                own[f"{name}|{TEXT}"] = [2.0]
                own[f"{name}|share"] = 0.1
            found[size, seed] = own
    return Grid(found, (0, 1))


def test_what_is_safe_and_best() -> None:
    lossy = {named("reading", method, t): 0.5 for method in READING for t in (4, 8, 16)}
    lossy |= {named("writing", method, 16): 0.5 for method in WRITING if method != paper.ORACLE}
    lossy |= {f"{named('writing', method, 8)}|copy": 0.4 for method in WRITING if method != "pages"}
    one = grid(lossy)
    assert (one.safe("long", "reading"), one.safe("long", "writing")) == (2, 8)
    assert one.best("long", "writing", 8, "copy") == {"pages"} and len(one.best("long", "writing", 8, "count")) == 4
    assert one.answered("long", FULL) == [1.0, 1.0]


def test_what_the_claims_make_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"long": (48, 3), "long-small": (40, 3), "small": (16, 2)}
    models = {name: language_model(50, width, layers, 4, 4, 64, 2048) for name, (width, layers) in sizes.items()}
    monkeypatch.setattr(paper, "sized", models.__getitem__)
    lossy = {named("reading", method, t): 0.5 for method in READING for t in (4, 8, 16)}
    lossy[f"long-small: {FULL}|copy"] = 0.5
    for phase, winners in (("reading", ("blocks", "window and sinks")), ("writing", ("pages", "window and sinks"))):
        for method in PHASES[phase]:
            for task, winner in (("copy", winners[0]), ("count", winners[1])):
                lossy[f"{named(phase, method, 8)}|{task}"] = 0.0 if method == winner else 0.5
    verdicts = {one.name: one.holds for one in paper.judged(grid(lossy))}
    assert verdicts == {
        "equal cost": True, "phases": True, "size": True, "no best": True, "harm": False, "law": None
    }  # fmt: skip
    weak = {one.name: one for one in paper.judged(grid(lossy, answered=0.1))}
    assert all(one.untestable for one in weak.values()) and "answers too little" in weak["size"].untestable


@pytest.mark.skipif(not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data")
def test_questions_and_text_are_of_the_length_that_is_asked_for() -> None:
    model = load("code")
    asked = due(model, 256, seed=1, number=2)
    assert [one.task for one in asked] == [task for task in (*TASKS, TEXT) for _ in range(2)]
    for one in asked:
        assert 256 - 16 <= len(one.prompt) + len(one.answer) <= 256 + 16, one.task
        assert one.written.tolist() == [[one.prompt[-1], *one.answer[:-1]]]
    again = due(model, 256, seed=1, number=2)
    assert (
        [one.prompt for one in again]
        == [one.prompt for one in asked]
        != [one.prompt for one in due(model, 256, seed=2, number=2)]
    )
