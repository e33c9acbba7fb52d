"""The training loop: any model, any objective, exact to resume."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn

from formery.errors import FormeryError
from formery.files import atomic_write
from formery.train import checkpoint
from formery.train.best import Best, Scores
from formery.train.interrupt import interrupts
from formery.train.log import COLUMNS, Log, draw_curve
from formery.train.objective import Batch, Batches, Objective, target_count
from formery.train.plan import Plan
from formery.train.progress import Reporter

Evaluate = Callable[[nn.Module], Scores]


@dataclass
class Result:
    """How a run ended: its last step and loss; the step, scores and weights file of its best evaluation."""

    step: int
    loss: float
    seconds: float
    best_step: int | None = None
    best_scores: Scores = field(default_factory=dict)
    best_weights: Path | None = None


def train(
    model: nn.Module,
    objective: Objective,
    batches: Batches,
    plan: Plan,
    out: str | Path,
    evaluate: Evaluate | None = None,
    better: str = "lower loss",
    stop_after: int | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Result:
    """Trains `model` in place after `plan` and keeps checkpoints, log and loss curve in the folder `out`.

    Step s (from 0) learns from `batches.batch(s * plan.accumulate + i)` for each i below `plan.accumulate`,
    weighted by their numbers of targets, so that many small batches equal one big one. `evaluate(model)`
    gives named scores every `plan.evaluate_every` steps and at the end; `better` ("lower loss", "higher
    bleu") says which weights are kept as the best. `stop_after` ends the run after that many steps of the
    unchanged plan: a prefix of the whole run. With `resume`, a run that stopped anywhere goes on from its
    last checkpoint and ends in the very weights it would have had; without one it starts at the beginning.

    Ctrl-C and SIGTERM finish the step, write the checkpoint and raise KeyboardInterrupt; a second one stops
    at once. Raises FormeryError when `out` holds a run and `resume` is off, when the run to resume had
    another plan or model, when the loss is no longer finite, and when the disk refuses; the last checkpoint
    is then still good.
    """
    out = Path(out)
    last = min(plan.steps, plan.steps if stop_after is None else stop_after)
    optimizer = adamw(model, plan)
    done, seconds, loss = begin(model, optimizer, plan, out, resume)
    best = Best(out / "best.safetensors", better, fresh=done == 0)
    log = Log(out, done)
    model.train()
    running = compiled(model, plan)
    with Reporter(plan.label, done, last, quiet=not progress) as reporter, interrupts() as caught:
        for step in range(done + 1, last + 1):
            started = time.perf_counter()
            parts = [batches.batch((step - 1) * plan.accumulate + i) for i in range(plan.accumulate)]
            loss = update(running, objective, parts, plan, optimizer, step)
            taken = time.perf_counter() - started
            seconds += taken
            speed = sum(map(target_count, parts)) / taken
            row = dict(zip(COLUMNS, (step, loss, plan.learning_rate_at(step), speed, seconds), strict=True))
            reporter.step(step, loss, speed)
            due = step % plan.evaluate_every == 0 or step == last
            if evaluate is not None and due:
                scores = evaluated_scores(model, evaluate)
                row |= {f"evaluation/{name}": value for name, value in scores.items()}
                reporter.evaluation(step, scores, best.offer(model, step, scores))
            log.append(row)
            if step % plan.checkpoint_every == 0 or step == last or caught:
                data = {"plan": plan.describe(), "step": step, "seconds": seconds, "loss": loss}
                checkpoint.save_run(out / "last.safetensors", model, optimizer, data)
            if due:
                draw_curve(log.rows(), out / "curve.png", plan.label)
            if caught:
                how = "the same command with --resume (resume=True in Python) goes on from there."
                print(f"stopped after step {step} of {last}, kept in {out}; {how}", file=sys.stderr)
                raise KeyboardInterrupt
    return Result(max(done, last), loss, seconds, best.step, best.scores, best.path if best.step else None)


def compiled(model: nn.Module, plan: Plan) -> nn.Module:
    """The model as its plan has it run; the compiled one shares the weights."""
    return cast(nn.Module, torch.compile(model)) if plan.compile else model


def adamw(model: nn.Module, plan: Plan) -> torch.optim.AdamW:
    """AdamW ("Decoupled Weight Decay Regularization", 2019); no decay of biases and scales."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, fused=True)


def begin(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, out: Path, resume: bool
) -> tuple[int, float, float]:
    """Starts or resumes the run in `out`: the steps done, the seconds spent on them, and the last loss."""
    last = out / "last.safetensors"
    for unfinished in out.glob(".*.part"):  # what a killed run was writing
        unfinished.unlink()
    if not last.exists():
        torch.manual_seed(plan.seed)
        with atomic_write(out / "plan.json") as temporary:
            temporary.write_text(json.dumps(plan.describe(), indent=2) + "\n")
        return 0, 0.0, math.nan
    if not resume:
        raise FormeryError(
            f"{out} already holds a training run; resume it with --resume, or choose another folder."
        )
    tensors, data = checkpoint.read(last)
    plan.refuse_change_from(data["plan"])
    checkpoint.restore_run(last, tensors, model, optimizer)
    return data["step"], data["seconds"], data["loss"]


def update(
    model: nn.Module,
    objective: Objective,
    parts: list[Batch],
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> float:
    """One step: the clipped gradient of the mean loss over all targets of the `parts`, and one move.

    Gives the loss; raises FormeryError, the weights untouched, when it or its gradient is not finite.
    """
    device = next(model.parameters()).device
    counts = [target_count(batch) for batch in parts]
    total = torch.zeros((), device=device)
    for batch, count in zip(parts, counts, strict=True):
        here = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
            loss = objective(model, here) * (count / max(1, sum(counts)))
        loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if plan.clip is None else plan.clip)
    for name, value in (("loss", float(total)), ("gradient", float(norm))):
        if not math.isfinite(value):
            rate = plan.learning_rate_at(step)
            raise FormeryError(
                f"the {name} of {plan.label!r} is {value} at step {step} (learning rate {rate:.3g}), so "
                "training stopped and its last checkpoint stays; check this step's data, or begin anew with "
                "a lower learning rate."
            )
    for group in optimizer.param_groups:
        group["lr"] = plan.learning_rate_at(step)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(total)


def evaluated_scores(model: nn.Module, evaluate: Evaluate) -> Scores:
    """The scores of the model in evaluation mode; its random draws leave those of the training alone."""
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        scores = {name: float(value) for name, value in evaluate(model).items()}
    model.train()
    return scores
