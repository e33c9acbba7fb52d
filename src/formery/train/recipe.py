"""Recipes: how each shipped model was trained, one short file each in `train/recipes/`, read top to bottom.

A recipe's module defines `NAME`, `DESCRIPTION` and `run(out, max_steps, resume)`. It trains into the folder
`out`; `max_steps` stops early on the recipe's own schedule: a short run is a prefix of the whole one. Papers that train
something of their own register a recipe in their file.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formery.errors import FormeryError, unknown
from formery.models import Guide, Model
from formery.train.loop import Result
from formery.train.plan import Plan


@dataclass(frozen=True)
class Trained:
    """What a recipe made: the model or guide with its last weights, how the run ended, and the work that it is for.

    steps: of the whole recipe. plans: of its stages, none where it was gathered and not trained. licence: of the text
    that it was trained on.
    """

    model: Model | Guide
    result: Result
    steps: int
    plans: tuple[Plan, ...]
    work: str
    licence: str

    @property
    def finished(self) -> bool:
        """Whether the whole recipe was run."""
        return self.result.step >= self.steps


@dataclass(frozen=True)
class Recipe:
    """A recipe by its name; run(out, max_steps, resume) trains.

    parts: functions of a paper's file that it is made of.
    """

    name: str
    description: str
    run: Callable[[Path, int | None, bool], Trained]
    parts: tuple[Callable[..., Any], ...] = ()


RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Makes a paper's recipe known by its name."""
    RECIPES[recipe.name] = recipe
    return recipe


def recipes() -> dict[str, Recipe]:
    """Every recipe by its name: those of the shipped models, then those of papers."""
    package = importlib.import_module("formery.train.recipes")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    importlib.import_module("formery.methods").discover()  # papers lie above this room, and register here
    return {module.NAME: Recipe(module.NAME, module.DESCRIPTION, module.run) for module in modules} | RECIPES


def run_recipe(name: str, out: str | Path, max_steps: int | None = None, resume: bool = False) -> Trained:
    """Runs a recipe into `out`; raises FormeryError for an unknown name or a step limit below 1."""
    known = recipes()
    if name not in known:
        raise unknown("recipe", name, known)
    if max_steps is not None and max_steps < 1:
        raise FormeryError(f"the number of steps must be at least 1, not {max_steps}.")
    return known[name].run(Path(out), max_steps, resume)
