"""Keeping the weights that evaluated best."""

import math
from pathlib import Path

from torch import nn

from formery.errors import FormeryError
from formery.train import checkpoint

Scores = dict[str, float]


class Best:
    """The weights that evaluated best so far, in a file that knows its own step and scores."""

    def __init__(self, path: Path, better: str, fresh: bool) -> None:
        self.path = path
        self.step: int | None = None
        self.scores: Scores = {}
        self.direction, _, self.name = better.partition(" ")
        if self.direction not in ("lower", "higher") or not self.name:
            raise FormeryError(
                f"better must be 'lower' or 'higher' and a score's name, as 'lower loss', not {better!r}."
            )
        if fresh:
            path.unlink(missing_ok=True)
        elif path.exists():
            data = checkpoint.read(path)[1]
            self.step, self.scores = data["step"], data["scores"]

    def offer(self, model: nn.Module, step: int, scores: Scores) -> bool:
        """Keeps the weights if their score beats the best; raises FormeryError when `scores` lacks it."""
        if self.name not in scores:
            raise FormeryError(
                f"evaluation gave no {self.name!r} to choose the best by, only {', '.join(scores)}."
            )
        new, sign = scores[self.name], 1 if self.direction == "higher" else -1
        if not math.isfinite(new) or (self.step is not None and sign * new <= sign * self.scores[self.name]):
            return False
        checkpoint.save_weights(self.path, model, {"step": step, "scores": scores})
        self.step, self.scores = step, scores
        return True
