"""The processes that train one model together, as `torchrun` starts them; a run on its own is a world of one."""

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from formery.errors import FormeryError, first_line

PATIENCE = timedelta(minutes=30)  # how long a process waits for another, which may be evaluating


@dataclass(frozen=True)
class World:
    """Which of how many processes this one is. restarts: how often `torchrun` has begun them again."""

    rank: int = 0
    size: int = 1
    restarts: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, logs and evaluates for all."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes: its own graphics card where there are any."""
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def summed(self, *values: float) -> list[float]:
        """The sums of each value over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        with said_plainly():
            dist.all_reduce(total)
        return [float(one) for one in total]

    def from_leader(self, value: Any) -> Any:
        """The value that the leading process has, in all; what the others give is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        with said_plainly():
            dist.broadcast_object_list(box, src=0)
        return box[0]


_pretended: ContextVar[World | None] = ContextVar("pretended", default=None)


def world() -> World:
    """The processes that `torchrun` says there are, met; this one alone where it says nothing.

    Raises FormeryError when what it says makes no sense, or when the others do not come.
    """
    return _pretended.get() or _met()


@contextmanager
def pretended(size: int) -> Iterator[None]:
    """A world of which this process is the first and the others never answer: what they would send is left as it is.

    For finding out what a process holds and sends, not what it computes.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    token = _pretended.set(World(0, size))
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        if size > 1:
            dist.destroy_process_group()
        _pretended.reset(token)


@cache
def _met() -> World:
    try:
        size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local, restarts = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    except ValueError as error:
        raise FormeryError(f"the environment of torchrun is not understood: {first_line(error)}.") from error
    if size == 1:
        return World(restarts=restarts)
    graphics = torch.cuda.is_available()
    if graphics:
        if local >= torch.cuda.device_count():
            raise FormeryError(
                f"process {local} of this machine has no graphics card of its own, there are "
                f"{torch.cuda.device_count()}: start as many processes with --nproc-per-node."
            )
        torch.cuda.set_device(local)
    try:
        # Gloo carries what lies in the memory of the machine, such as checkpoints being saved meanwhile.
        backend = "cpu:gloo,cuda:nccl" if graphics else "gloo"
        # Processes that were begun again must not find the addresses of those that died.
        [(store, rank, size)] = islice(dist.rendezvous("env://", timeout=PATIENCE), 1)
        store = dist.PrefixStore(f"attempt-{restarts}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise FormeryError(f"the {size} processes of this run do not meet: {first_line(error)}.") from error
    atexit.register(dist.destroy_process_group)  # else its threads may outlive what they use
    return World(rank, size, restarts)


@contextmanager
def said_plainly() -> Iterator[None]:
    """Turns a broken line to another process into a FormeryError: most often that one has died."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and not _of_a_line(error):
            raise
        raise FormeryError(
            "another process of this training has died, so this one stops; the last checkpoint is whole, and the same "
            "command with --resume goes on from there (torchrun --max-restarts does so by itself)."
        ) from error


def _of_a_line(error: BaseException) -> bool:
    """Whether an error of PyTorch's is that of a connection; gloo's have no class of their own."""
    said = str(error).lower()
    return any(word in said for word in ("gloo", "connection", "nccl", "socket", "timed out", "process group"))
