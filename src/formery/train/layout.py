"""How a training is laid out on the machines: what changes its time and memory, and nothing of what it learns."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from formery.errors import FormeryError


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
