"""Training in stages: each goes on with the weights that the one before it ended with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from formery.train.log import draw_curve, read_rows
from formery.train.loop import Evaluate, Result, train
from formery.train.objective import Batches, Objective
from formery.train.plan import Plan
from formery.train.world import world


@dataclass(frozen=True)
class Stage:
    """One stage of a training: a plan, what it learns from, and the step of the plan at which it is left."""

    plan: Plan
    batches: Batches
    until: int

    @property
    def folder(self) -> str:
        """Where its checkpoints lie, beside those of the other stages."""
        return self.plan.label


def train_in_stages(
    model: nn.Module,
    objective: Objective,
    stages: Sequence[Stage],
    out: Path,
    evaluate: Evaluate,
    max_steps: int | None = None,
    resume: bool = False,
) -> Result:
    """Trains through all stages, `max_steps` of them all together at most; gives the last one's result.

    Steps in the result, and in the loss curve `out`/curve.png, are counted through all stages. What is
    raised, and what `resume` does, is as in `train`.
    """
    before, seconds = 0, 0.0
    rows: list[dict[str, str]] = []
    result = Result(0, math.nan, 0.0)
    best: int | None = None
    for stage in stages:
        left = stage.until if max_steps is None else min(stage.until, max_steps - before)
        folder = out / stage.folder
        result = train(
            model, objective, stage.batches, stage.plan, folder, evaluate, stop_after=left, resume=resume
        )
        rows += [{**row, "step": str(int(row["step"]) + before)} for row in read_rows(folder / "log.csv")]
        best = None if result.best_step is None else result.best_step + before
        before += result.step
        seconds += result.seconds
        if left < stage.until or before == max_steps:
            break
    if rows and world().leads:
        draw_curve(rows, out / "curve.png", stages[0].plan.label)
    return replace(result, step=before, best_step=best, seconds=seconds)
