"""What a training run is: plain data, and the learning rate schedule that follows from it."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from formery.errors import FormeryError


@dataclass(frozen=True)
class Plan:
    """The settings of a run; two runs with equal plans, models and batches end in equal weights.

    One step is one update of the weights, from `accumulate` batches. The learning rate climbs linearly over
    the first `warmup` steps and falls on a cosine to `final_learning_rate_ratio` of its peak at the last step
    (Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without restarts).
    `precision` "bfloat16" computes under autocast; the weights themselves stay float32. `compile` has PyTorch
    generate code for the whole step: a minute at the start, less for each step after it.
    """

    steps: int
    learning_rate: float
    warmup: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float | None = 1.0
    final_learning_rate_ratio: float = 0.1
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    evaluate_every: int = 250
    checkpoint_every: int = 100
    seed: int = 0
    label: str = "training"

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise FormeryError(f"a plan's {name} must be at least 1, not {getattr(self, name)}.")
        if not 0 <= self.warmup <= self.steps:
            raise FormeryError(
                f"a plan's warmup must lie between 0 and its {self.steps} steps, not {self.warmup}."
            )
        if not 0 < self.learning_rate < math.inf:
            raise FormeryError(
                f"a plan's learning_rate must be positive and finite, not {self.learning_rate}."
            )
        if self.clip is not None and not self.clip > 0:
            raise FormeryError(f"a plan's clip must be positive, or None for no clipping, not {self.clip}.")
        if self.precision not in ("float32", "bfloat16"):
            raise FormeryError(f"a plan's precision must be float32 or bfloat16, not {self.precision!r}.")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the `step`-th update, counted from 1 to `steps`."""
        if step < self.warmup:
            return self.learning_rate * step / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        final = self.learning_rate * self.final_learning_rate_ratio
        return final + (self.learning_rate - final) * cosine

    def describe(self) -> dict[str, Any]:
        """The plan as JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return data

    def refuse_change_from(self, before: dict[str, Any]) -> None:
        """Raises FormeryError when the run that is to be resumed was begun with another plan, `before`."""
        now = self.describe()
        before = {"compile": False, **before}  # runs begun before there was a choice
        changed = [name for name in sorted(now.keys() | before.keys()) if now.get(name) != before.get(name)]
        if not changed:
            return
        changes = ", ".join(
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in changed
        )
        advice = "resume with the plan that it was begun with, or start anew in another folder"
        if "steps" in changed:
            advice += "; the learning rate depends on steps: to stop early, keep the plan and give stop_after"
        raise FormeryError(f"this run cannot be resumed with another plan: {changes}; {advice}.")
