"""What a training needs of each process: found by one step of it, in which the other processes are stand-ins.

The step is the one that would be made, with the rows that the process would have, so that any recipe, objective and
layout can be asked about; PyTorch's own trackers say what its tensors take at their most. What is sent is counted on
paper (`docs/scale.md`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from formery.errors import FormeryError
from formery.train import checkpoint
from formery.train.alone import Alone, layers
from formery.train.layout import Layout, Training, laid_out, looking
from formery.train.loop import adamw, running
from formery.train.objective import target_count
from formery.train.recipe import run_recipe
from formery.train.world import pretended

HELD = {
    "parameters": ("Parameter", "Sharded Param"),
    "gathered": ("Unsharded Param", "All Gather", "Unsharded Grad", "Reduce Scatter"),
    "gradients": ("Gradient", "Sharded Grad"),
    "optimiser": ("OptState", "Optstate"),
}


@dataclass(frozen=True)
class Need:
    """What each process needs, in bytes.

    held: at the moment when it is most, by what it is; what is in no other group are activations. total: their sum.
    rows: of a batch, in the process with most. sent: received from others for a step. state: that decoding keeps of a
    token, and of a text whatever its length; 0 where the trained thing does not decode.
    """

    label: str
    processes: int
    layout: Layout
    parameters: int
    rows: int
    held: dict[str, int]
    total: int
    sent: int
    state: tuple[int, int]

    def rows_within(self, memory: int) -> int:
        """How many rows of such a batch a process with that much memory could have."""
        activations = self.held["activations"]
        left = memory - (self.total - activations)
        return max(0, left * self.rows // activations) if activations else self.rows


def trainings(recipe: str) -> list[Training]:
    """What a recipe would train, stage by stage; nothing is trained."""
    with looking() as seen:
        run_recipe(recipe, Path("nowhere"))
    if not seen:
        raise FormeryError(f"{recipe} trains nothing, so there is nothing to plan.")
    return seen


def largest(seen: Sequence[Training]) -> Training:
    """The stage with the most tokens in a batch, and of those the one with the longest rows."""

    def size(one: Training) -> tuple[int, int]:
        batch = one.batches.batch(0)
        return target_count(batch), max(tensor.shape[1] for tensor in batch.values() if tensor.dim() > 1)

    return max(seen, key=size)


def need(training: Training, processes: int, layout: Layout) -> Need:
    """What a training by so many processes needs of each; the model of `training` is used up.

    Raises FormeryError where they cannot be laid out so.
    """
    layout.check(processes)
    model, plan = training.model, training.plan
    parameters = sum(one.numel() for one in model.parameters())
    state = state_bytes(model)
    with pretended(processes), laid_out(layout), running(model, training.objective, plan) as run:
        run.module.train()
        optimizer = adamw(run.module, plan)
        checkpoint.begin_moments(optimizer)
        sent = received(run, training, processes, layout)
        held, rows = _most(run, optimizer, training)
    return Need(plan.label, processes, layout, parameters, rows, held, sum(held.values()), sent, state)


def _most(run: Alone, optimizer: torch.optim.Optimizer, training: Training) -> tuple[dict[str, int], int]:
    """What the tensors of a process take in a step at their most, by what they are; and its rows."""
    tracker = _tracker(run, optimizer)
    plan = training.plan
    rows = 0
    with tracker:
        # A second batch meets the gradients of the first; more of them change nothing.
        for index in range(min(plan.accumulate, 2)):
            batch = training.batches.batch(index)
            mine, share = run.rows(batch, target_count(batch))
            rows = max(rows, max(len(tensor) for tensor in mine.values() if tensor.dim()))
            with torch.autocast("cpu", torch.bfloat16, enabled=plan.precision == "bfloat16"):
                loss = run.loss(mine) * share
            loss.backward()
            tracker.reset_mod_stats()  # what it keeps of each module; it refuses to be passed again with them
        run.clip(math.inf if plan.clip is None else plan.clip)
        optimizer.step()
    found: dict[str, int] = dict.fromkeys((*HELD, "activations"), 0)
    for name, count in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items():
        kind = getattr(name, "value", str(name))
        if kind != "Total":
            found[next((one for one, names in HELD.items() if kind in names), "activations")] += count
    return found, rows


def _tracker(run: Alone, optimizer: torch.optim.Optimizer) -> Any:
    step = getattr(run, "step", None)
    if step is None:
        tracker = MemTracker()
        tracker.track_external(run.module, optimizer)
        return tracker
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    return FSDPMemTracker(step, optimizer)


def received(run: Alone, training: Training, processes: int, layout: Layout) -> int:
    """The bytes that a process receives in a step, on paper.

    Of each batch the parameters of layers are gathered twice, for the pass and for its gradient, all others once, and
    every gradient is summed once; each time all but the process's own part comes from others. Processes that share a
    layer sum its output twice in the pass, twice for the gradient, and twice more where activations are recomputed.
    """
    groups = processes // layout.tensor_parallel
    inner = sum(_bytes(layer) for layer in layers(run.module))
    others = _bytes(run.module) - inner
    gathered = (groups - 1) / groups * (3 * inner + 2 * others)
    summed = 0.0
    if layout.tensor_parallel > 1:
        batch = training.batches.batch(0)
        tokens = math.ceil(batch["tokens"].numel() / groups) if "tokens" in batch else 0
        width = int(getattr(getattr(run.module, "embedding", None), "width", 0))
        size = 2 if training.plan.precision == "bfloat16" else 4
        times = (6 if layout.recompute else 4) * len(layers(run.module))
        summed = 2 * (layout.tensor_parallel - 1) / layout.tensor_parallel * times * tokens * width * size
    return round(training.plan.accumulate * (gathered + summed))


def _bytes(module: nn.Module) -> int:
    """Of its parameters, as far as they lie in the processes that share its layers with this one's part."""
    return sum(_whole(one) * one.element_size() for one in module.parameters())


def _whole(parameter: torch.Tensor) -> int:
    """Entries of a parameter, those counted once that other processes of a tensor-parallel group have."""
    mesh = getattr(parameter, "device_mesh", None)
    shared = mesh is not None and "heads" in (mesh.mesh_dim_names or ()) and mesh.ndim > 1
    return parameter.numel() // (mesh["heads"].size() if shared and mesh is not None else 1)


def state_bytes(model: nn.Module) -> tuple[int, int]:
    """The bytes that decoding keeps of each token of a text, and of a text of none."""
    start = getattr(getattr(model, "decoder", model), "start", None)
    if start is None:
        return 0, 0
    with torch.no_grad():
        few, many = (start(1, capacity).nbytes for capacity in (256, 512))
    return (many - few) // 256, max(0, 2 * few - many)
