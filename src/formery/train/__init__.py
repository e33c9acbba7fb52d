"""One training loop for every model and objective, its checkpoints, and the recipes of the shipped models."""

from formery.train.checkpoint import load_weights
from formery.train.loop import Result, train
from formery.train.objective import mean_loss, next_token, translate
from formery.train.plan import Plan
from formery.train.recipe import recipes, run_recipe

__all__ = [
    "Plan", "Result", "load_weights", "mean_loss", "next_token", "recipes", "run_recipe", "train",
    "translate",
]  # fmt: skip
