"""The training loop: any model, any objective, exact to resume."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formery.errors import FormeryError
from formery.files import atomic_write
from formery.train.alone import Alone, newest
from formery.train.best import Best, Scores
from formery.train.interrupt import interrupts
from formery.train.layout import Training, looked_at
from formery.train.log import COLUMNS, Log, draw_curve
from formery.train.objective import Batch, Batches, Objective, target_count
from formery.train.plan import Plan
from formery.train.progress import Reporter
from formery.train.world import said_plainly, world

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
    if looked_at(Training(model, objective, batches, plan)):
        return Result(last, math.nan, 0.0)
    with running(model, objective, plan) as run:
        optimizer = adamw(run.module, plan)
        done, seconds, loss = begin(run, optimizer, out, resume)
        run.module.train()
        if run.world.leads:
            best, log = Best(out / "best.safetensors", better, fresh=done == 0), Log(out, done)
        reporter = Reporter(plan.label, done, last, quiet=not (progress and run.world.leads))
        with reporter, interrupts() as caught:
            for step in range(done + 1, last + 1):
                started = time.perf_counter()
                parts = [batches.batch((step - 1) * plan.accumulate + i) for i in range(plan.accumulate)]
                loss = update(run, parts, optimizer, step)
                taken = time.perf_counter() - started
                seconds += taken
                speed = sum(map(target_count, parts)) / taken
                row = dict(zip(COLUMNS, (step, loss, plan.learning_rate_at(step), speed, seconds), strict=True))
                reporter.step(step, loss, speed)
                due = step % plan.evaluate_every == 0 or step == last
                if evaluate is not None and due:
                    with run.whole() as whole:
                        if whole is not None:
                            scores = evaluated_scores(whole, evaluate)
                            row |= {f"evaluation/{name}": value for name, value in scores.items()}
                            reporter.evaluation(step, scores, best.offer(whole, step, scores))
                if run.world.leads:
                    log.append(row)
                stopping = run.world.summed(len(caught))[0] > 0
                if step % plan.checkpoint_every == 0 or step == last or stopping:
                    run.save(out, optimizer, kept(run, step, seconds, loss))
                if due and run.world.leads:
                    draw_curve(log.rows(), out / "curve.png", plan.label)
                if stopping:
                    run.finish()
                    if run.world.leads:
                        how = "the same command with --resume (resume=True in Python) goes on from there."
                        print(f"stopped after step {step} of {last}, kept in {out}; {how}", file=sys.stderr)
                    raise KeyboardInterrupt
        run.finish()
        found = (best.step, best.scores, best.path if best.step else None) if run.world.leads else None
        return Result(max(done, last), loss, seconds, *run.world.from_leader(found))


def running(model: nn.Module, objective: Objective, plan: Plan) -> Alone:
    """The run of a model in this process, or together with the others that `torchrun` has started."""
    if world().size == 1:
        return Alone(model, objective, plan)
    from formery.train.together import Together  # its machinery takes a while to import

    return Together(model, objective, plan)


def kept(run: Alone, step: int, seconds: float, loss: float) -> dict[str, Any]:
    """The data of a checkpoint."""
    data = {"plan": run.plan.describe(), "step": step, "seconds": seconds, "loss": loss}
    return data if run.world.size == 1 else data | {"processes": run.world.size}


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


def begin(run: Alone, optimizer: torch.optim.Optimizer, out: Path, resume: bool) -> tuple[int, float, float]:
    """Starts or resumes the run in `out`: the steps done, the seconds spent on them, and the last loss.

    Where `torchrun` has begun the processes again, the run goes on as with `resume`.
    """
    if run.world.leads:
        for unfinished in out.glob(".*.part"):  # what a killed run was writing
            unfinished.unlink()
    held = run.world.from_leader(newest(out) is not None if run.world.leads else None)
    if not held:
        torch.manual_seed(run.seed)
        if run.world.leads:
            with atomic_write(out / "plan.json") as temporary:
                temporary.write_text(json.dumps(run.plan.describe(), indent=2) + "\n")
        return 0, 0.0, math.nan
    if not resume and not run.world.restarts:
        raise FormeryError(
            f"{out} already holds a training run; resume it with --resume, or choose another folder."
        )
    data = run.restore(out, optimizer)
    assert data is not None
    return data["step"], data["seconds"], data["loss"]


def update(run: Alone, parts: list[Batch], optimizer: torch.optim.Optimizer, step: int) -> float:
    """One step: the clipped gradient of the mean loss over all targets of the `parts`, and one move.

    Gives the loss; raises FormeryError, the weights untouched, when it or its gradient is not finite.
    """
    plan, device = run.plan, next(run.module.parameters()).device
    targets = sum(map(target_count, parts))
    total = torch.zeros((), device=device)
    with said_plainly():
        for batch in parts:
            mine, share = run.rows(batch, targets)
            here = {name: tensor.to(device, non_blocking=True) for name, tensor in mine.items()}
            with torch.autocast(device.type, torch.bfloat16, enabled=plan.precision == "bfloat16"):
                loss = run.loss(here) * share
            loss.backward()
            total += loss.detach()
        norm = run.clip(math.inf if plan.clip is None else plan.clip)
    mean = run.world.summed(float(total))[0] / run.world.size
    for name, value in (("loss", mean), ("gradient", norm)):
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
    return mean


def evaluated_scores(model: nn.Module, evaluate: Evaluate) -> Scores:
    """The scores of the model in evaluation mode; its random draws leave those of the training alone."""
    model.eval()
    with torch.random.fork_rng(), torch.no_grad():
        scores = {name: float(value) for name, value in evaluate(model).items()}
    model.train()
    return scores
