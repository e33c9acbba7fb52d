"""What a plan says that a training needs: by definition, in small, and against what real processes take."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import together_runs as together
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from formery.errors import FormeryError
from formery.models.compose import language_model
from formery.parts import Layer
from formery.train import next_token
from formery.train.estimate import Need, largest, need, state_bytes, trainings
from formery.train.layout import Layout, Training, looking
from formery.train.loop import train
from formery.train.recipe import RECIPES, Recipe, Trained
from formery.web.needs import memory
from formery.web.needs import needs as shown

ROOT = Path(__file__).parents[1]


def training(model: nn.Module | None = None) -> Training:
    return Training(model or together.decoder(), next_token, together.texts(), together.PLAN)


def counted(model: nn.Module) -> tuple[int, int]:
    """Parameters of a model's layers, and all others."""
    inner = sum(one.numel() for layer in model.modules() if isinstance(layer, Layer) for one in layer.parameters())
    return inner, sum(one.numel() for one in model.parameters()) - inner


def test_one_process_has_everything() -> None:
    found = need(training(), 1, Layout())
    inner, others = counted(together.decoder())
    assert found.parameters == inner + others and found.rows == 8
    assert found.held["parameters"] == 4 * found.parameters
    tensors = len(list(together.decoder().parameters()))
    assert found.held["optimiser"] == 8 * found.parameters + 4 * tensors  # and how many steps each has made
    assert found.total == sum(found.held.values()) and found.sent == found.held["gathered"] == 0


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_have_their_part(processes: int) -> None:
    one, many = need(training(), 1, Layout()), need(training(), processes, Layout())
    assert many.held["parameters"] == pytest.approx(one.held["parameters"] / processes, rel=0.05)
    assert many.held["optimiser"] == pytest.approx(one.held["optimiser"] / processes, rel=0.05)
    assert many.rows == 8 // processes and many.held["activations"] < 0.7 * one.held["activations"]
    inner, others = counted(together.decoder())
    batches = together.PLAN.accumulate
    assert many.sent == round(batches * 4 * (processes - 1) / processes * (3 * inner + 2 * others))


def test_layers_that_are_shared() -> None:
    found = need(training(), 2, Layout(tensor_parallel=2))
    assert found.rows == 8 and found.sent > 0
    assert found.held["parameters"] < need(training(), 1, Layout()).held["parameters"]
    more = need(training(), 2, Layout(recompute=True, tensor_parallel=2))
    assert more.sent == pytest.approx(1.5 * found.sent)


def test_recomputing_keeps_less() -> None:
    deep = [language_model(97, 32, 8, 4, 2, 64, 64) for _ in range(2)]
    kept, again = need(training(deep[0]), 1, Layout()), need(training(deep[1]), 1, Layout(recompute=True))
    assert again.held["activations"] < 0.5 * kept.held["activations"]
    assert again.rows_within(10**8) > kept.rows_within(10**8) > 8 and kept.rows_within(0) == 0


def test_the_state_of_a_token() -> None:
    model = language_model(97, 32, 2, 4, 2, 64, 1024)
    token, text = state_bytes(model)
    for capacity in (100, 700):
        assert model.start(1, capacity).nbytes == text + token * capacity
    assert token >= 2 * 2 * 2 * 8 * 4 and state_bytes(nn.Linear(2, 2)) == (0, 0)


def test_a_process_takes_what_was_planned() -> None:
    asked = ["decoder", "float32", True, 1, 3, 1, 4]
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "bench.scale_step", json.dumps(asked)], cwd=ROOT, check=True, capture_output=True,
        text=True, env={**os.environ, **environment},
    )  # fmt: skip
    peak = json.loads(ran.stdout)["peak"]
    code = (
        "from bench.scale_step import training\nfrom formery.train.estimate import need\n"
        "from formery.train.layout import Layout\n"
        "print(need(training('decoder', 'float32', 4), 1, Layout(recompute=True)).total)"
    )
    planned = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert int(planned.stdout) == pytest.approx(peak, rel=0.15)


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> str:
    def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
        model = together.decoder()
        result = train(model, next_token, together.texts(), together.PLAN, out)
        return Trained(model, result, together.PLAN.steps, (together.PLAN,), "code", "none")

    monkeypatch.setitem(RECIPES, "of-a-test", Recipe("of-a-test", "", run))
    monkeypatch.setitem(RECIPES, "idle", Recipe("idle", "", lambda out, most, resume: None))  # type: ignore[arg-type, return-value]
    return "of-a-test"


def test_a_recipe_is_looked_at_and_not_run(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [seen] = trainings(recipe)
    assert seen.plan == together.PLAN and not list(tmp_path.iterdir())
    assert largest([seen, Training(seen.model, next_token, together.pairs(), together.PLAN)]) is seen
    with pytest.raises(FormeryError, match="idle trains nothing"):
        trainings("idle")
    with looking() as outer:
        trainings(recipe)
    assert outer == []


def test_the_command(recipe: str, run: Callable[..., Any]) -> None:
    ran = run("plan", recipe, "--gpus", "2", "--memory", "1MB")
    assert ran.code == 0 and "2 processes, 4 rows of a batch in each" in ran.out
    assert "fits 977 KiB" in ran.out and "recomputed" in ran.out and "Decoding keeps" in ran.out
    told = json.loads(run("plan", recipe, "--memory", "1MiB", "--json").out)
    assert told["memory"] == 2**20 and [one["layout"]["recompute"] for one in told["needs"]] == [False, True]
    for options, said in (
        (("--memory", "lots"), "'lots' is no amount of memory"),
        (("--gpus", "0"), "at least 1 process"),
        (("--gpus", "3", "--tensor-parallel", "2"), "3 processes cannot be put into groups of 2"),
    ):
        ran = run("plan", recipe, *options)
        assert ran.code == 2 and said in ran.err


@given(st.integers(1, 10**6), st.sampled_from([("", 1), ("K", 10**3), ("MiB", 2**20), ("gb", 10**9), (" TB", 10**12)]))
def test_amounts_of_memory(number: int, unit: tuple[str, int]) -> None:
    assert memory(f"{number}{unit[0]}") == number * unit[1]


def test_a_plan_without_an_amount_says_nothing_of_fitting() -> None:
    from rich.console import Console

    held = dict.fromkeys(("parameters", "gathered", "gradients", "optimiser", "activations"), 2**20)
    console = Console(width=80, record=True, file=StringIO())
    console.print(shown([Need("a", 1, Layout(), 7, 1, held, 5 * 2**20, 0, (0, 0))], None))
    text = console.export_text()
    assert "1 row of a batch" in text and "fits" not in text and "Decoding" not in text
