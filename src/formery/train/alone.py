"""A training in one process: the model, its objective, and what of the loop depends on who else trains it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from formery.parts import Context, Layer
from formery.train import checkpoint, sharded_checkpoint
from formery.train.checkpoint import Tensors
from formery.train.layout import layout
from formery.train.objective import Batch, Objective, target_count
from formery.train.plan import Plan
from formery.train.world import world


class Alone:
    """A run whose model lies whole in this process.

    module: what holds the parameters that are moved; here it is the model.
    """

    def __init__(self, model: nn.Module, objective: Objective, plan: Plan) -> None:
        self.model, self.objective, self.plan = model, objective, plan
        self.world = world()
        self.module = model
        self.running = cast(nn.Module, torch.compile(model)) if plan.compile else model

    def __enter__(self) -> Self:
        if layout().recompute:
            recompute(self.module)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in layers(self.module):
            layer.__dict__.pop("forward", None)

    @property
    def seed(self) -> int:
        """Of the random draws that a training makes here, such as those of dropout."""
        return self.plan.seed

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The objective of a batch that lies where the model is."""
        return self.objective(self.running, batch)

    def rows(self, batch: Batch, targets: int) -> tuple[Batch, float]:
        """What of a batch is learnt from here, and the weight of its mean among so many targets of the step."""
        return batch, target_count(batch) / max(1, targets)

    def clip(self, most: float) -> float:
        """Scales the gradients down to that norm, if they have more, and gives the norm that they had."""
        return float(nn.utils.clip_grad_norm_(self.module.parameters(), most))

    @contextmanager
    def whole(self) -> Iterator[nn.Module | None]:
        """The whole model, for an evaluation; None in processes that do not lead. All have to enter."""
        yield self.model

    def save(self, out: Path, optimizer: torch.optim.Optimizer, data: dict[str, Any]) -> None:
        """Keeps all that is needed to go on from here."""
        checkpoint.save_run(out / checkpoint.LAST, self.model, optimizer, data)
        sharded_checkpoint.discard(out)

    def restore(self, out: Path, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Puts back what was kept last, by however many processes, and gives its data; None where nothing was."""
        if (kept := newest(out)) is None:
            return None
        data, read = kept
        self.plan.refuse_change_from(data["plan"])
        checkpoint.restore_run(out / checkpoint.LAST, read(), self.model, optimizer)
        return data

    def finish(self) -> None:
        """Ends a training that came to its end: the model lies whole in every process, and all files are there."""


def newest(out: Path) -> tuple[dict[str, Any], Callable[[], Tensors]] | None:
    """The data of the run's last checkpoint, of either kind, and what reads its tensors; None where there is none."""
    found: list[tuple[dict[str, Any], Callable[[], Tensors]]] = []
    if (single := out / checkpoint.LAST).exists():
        found.append((checkpoint.read_data(single), lambda: checkpoint.read(single)[0]))
    if (data := sharded_checkpoint.read_data(out)) is not None:
        found.append((data, lambda: sharded_checkpoint.read(out)))
    return max(found, key=lambda one: int(one[0]["step"]), default=None)


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, in order; each but once, and none that lies in another."""
    found: list[Layer] = []
    inner: set[int] = set()
    for part in model.modules():
        if isinstance(part, Layer) and id(part) not in inner:
            found.append(part)
            inner.update(map(id, part.modules()))
    return found


def recompute(model: nn.Module) -> None:
    """Has each layer compute its activations again for its gradient, where it writes no state meanwhile."""
    for layer in layers(model):
        layer.__dict__["forward"] = _thrifty(layer.forward)


def _thrifty(forward: Callable[[Tensor, Context], Tensor]) -> Callable[[Tensor, Context], Tensor]:
    def run(hidden: Tensor, context: Context) -> Tensor:
        if context.state is not None or not torch.is_grad_enabled():
            return forward(hidden, context)
        meanwhile = copy_context()  # such as the kernel that an objective has chosen

        def again(hidden: Tensor, context: Context) -> Tensor:
            return meanwhile.copy().run(forward, hidden, context)

        return cast(Tensor, recomputed(again, hidden, context, use_reentrant=False))

    return run
