"""How a training is laid out on the machines, or only looked at: nothing here changes what is learnt."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import nn

from formery.errors import FormeryError
from formery.train.objective import Batches, Objective
from formery.train.plan import Plan


@dataclass(frozen=True)
class Layout:
    """recompute: a layer's activations are computed again for its gradient, and not kept.

    tensor_parallel: how many processes share the heads and hidden units of each layer; the others share the rows.
    """

    recompute: bool = False
    tensor_parallel: int = 1

    def check(self, processes: int) -> None:
        """Raises FormeryError where that many processes cannot be laid out so."""
        if self.tensor_parallel < 1 or processes % self.tensor_parallel:
            raise FormeryError(
                f"{processes} processes cannot be put into groups of {self.tensor_parallel} that share each layer."
            )


_layout: ContextVar[Layout] = ContextVar("layout", default=Layout())  # noqa: B039 - it is frozen


def layout() -> Layout:
    """The layout that is in force."""
    return _layout.get()


@contextmanager
def laid_out(chosen: Layout) -> Iterator[None]:
    """Trainings that begin in the block are laid out so."""
    token = _layout.set(chosen)
    try:
        yield
    finally:
        _layout.reset(token)


@dataclass(frozen=True)
class Training:
    """What a training would be made of."""

    model: nn.Module
    objective: Objective
    batches: Batches
    plan: Plan


_looking: ContextVar[list[Training] | None] = ContextVar("looking", default=None)


def looked_at(training: Training) -> bool:
    """Whether somebody only wants to see what trainings there would be; they have then seen this one."""
    seen = _looking.get()
    if seen is not None:
        seen.append(training)
    return seen is not None


@contextmanager
def looking() -> Iterator[list[Training]]:
    """Trainings in the block do not take place: they are listed."""
    seen: list[Training] = []
    token = _looking.set(seen)
    try:
        yield seen
    finally:
        _looking.reset(token)
