"""The most bytes that tensors take at once while something runs, counted from their storage."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Follows the storage of every tensor that is made in this thread within the block, until it is given back.

    peak: the most bytes at once, those of `known` (what is there already) counted from the beginning. What a kernel
    takes and gives back by itself is not seen.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.alive: dict[StorageWeakRef, int] = {}
        self.peak = 0
        self._look(known)

    def _look(self, made: Any) -> None:
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                storage = one.untyped_storage()
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.alive.values()))

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: dict[str, Any] | None = None
    ) -> Any:
        made = function(*arguments, **(options or {}))
        self._look(made)
        return made


def most_held(run: Callable[[], Any], known: Sequence[Tensor]) -> int:
    """The most bytes that tensors take at once while `run` runs, with those of `known`."""
    with torch.no_grad(), Held(known) as held:
        run()
    return held.peak
