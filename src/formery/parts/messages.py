"""What the processes of a group send each other directly, and a wrapper that counts it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

from formery.errors import FormeryError


class Messages:
    """The line of this process to the others of a group; alone, where no processes have met.

    group: of torch.distributed, all processes unless given. rank: which of `size` processes this one is. Tensors that
    are sent must be contiguous; those that are received are written over. Raises FormeryError when another process has
    died.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        together = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if together else (0, 1)
        if self.rank < 0:
            raise FormeryError("this process is not one of the group that it should share keys and values with.")

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        """Hands these to another process, as one message."""
        self._run([dist.P2POp(dist.isend, one, group=self.group, group_peer=to) for one in tensors])

    def receive(self, into: Sequence[Tensor], source: int) -> None:
        """Takes what another process sends."""
        self._run([dist.P2POp(dist.irecv, one, group=self.group, group_peer=source) for one in into])

    def exchange(self, tensors: Sequence[Tensor], to: int, into: Sequence[Tensor], source: int) -> None:
        """Sends to one process while it receives from one, which may be the same."""
        sending = [dist.P2POp(dist.isend, one, group=self.group, group_peer=to) for one in tensors]
        self._run([*sending, *(dist.P2POp(dist.irecv, one, group=self.group, group_peer=source) for one in into)])

    def _run(self, operations: list[dist.P2POp]) -> None:
        try:
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
        except (dist.DistError, RuntimeError) as error:
            raise FormeryError(
                "another of the processes that share the keys and values has died, so this one stops."
            ) from error


class Counted(Messages):
    """A line that counts what is really sent through it.

    sent: bytes that this process has sent. steps: the length of the longest chain of messages, each begun after the
    last had ended, that leads here; a process sends or receives one message at a time, or one of each.

    Each message brings along how long the chain is that led to it, which is not counted in `sent`.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__(group)
        self.sent = self.steps = 0

    def send(self, tensors: Sequence[Tensor], to: int) -> None:
        super().send(tensors, to)
        self.sent += sum(one.nbytes for one in tensors)
        self.steps += 1
        super().send([torch.tensor([self.steps])], to)

    def receive(self, into: Sequence[Tensor], source: int) -> None:
        super().receive(into, source)
        chain = torch.zeros(1, dtype=torch.long)
        super().receive([chain], source)
        self.steps = max(self.steps + 1, int(chain))

    def exchange(self, tensors: Sequence[Tensor], to: int, into: Sequence[Tensor], source: int) -> None:
        super().exchange(tensors, to, into, source)
        self.sent += sum(one.nbytes for one in tensors)
        self.steps += 1
        chain = torch.zeros(1, dtype=torch.long)
        super().exchange([torch.tensor([self.steps])], to, [chain], source)
        self.steps = max(self.steps, int(chain))


_through: ContextVar[Messages | None] = ContextVar("messages", default=None)


@contextmanager
def through(messages: Messages) -> Iterator[Messages]:
    """Decode states that are begun within this block are spread over the processes of that line."""
    token = _through.set(messages)
    try:
        yield messages
    finally:
        _through.reset(token)


def line() -> Messages:
    """The line of the block around, or else one to all processes that have met."""
    return _through.get() or Messages()
