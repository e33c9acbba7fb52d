"""Processes of a group that go wrong, for the tests of how the others learn of it."""

import os
import signal

import torch
import torch.distributed as dist

from formery.errors import FormeryError
from formery.parts.messages import Messages


def dying() -> str:
    """The second process is killed while the first waits for it; what the first then says."""
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    Messages().receive([torch.zeros(1)], 1)
    return "nothing"


def failing(why: str) -> None:
    raise (FormeryError if why == "a mistake" else ValueError)(why)
