"""Whether the compiled kernels are used: as asked for, where they are built, and never where gradients are wanted."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.native import build

Compile = bool | Literal["auto"]
WORTH_WAITING = 2e10  # multiplications for which building the kernels first pays: some seconds of plain work
_mode: ContextVar[Compile] = ContextVar("compile", default="auto")


@contextmanager
def using(mode: Compile) -> Iterator[None]:
    """Within this block: True builds the kernels if need be, False never uses them, "auto" does as around the block.

    Around all blocks they are used where they are built.
    """
    token = _mode.set(_mode.get() if mode == "auto" else mode)
    try:
        yield
    finally:
        _mode.reset(token)


def checked(mode: object) -> Compile:
    """The mode, if it is one."""
    if mode not in (True, False, "auto"):
        raise FormeryError(f"compile must be True, False or 'auto', not {mode!r}.")
    return "auto" if mode == "auto" else bool(mode)


def prepare(mode: Compile, work: float) -> None:
    """Builds the kernels now where `work` (multiplications to come) is worth it, otherwise beside what is done."""
    if mode is False or build.target().is_file():
        return
    if mode is True:
        build.build()
    elif build.compiler() is not None:
        if work >= WORTH_WAITING:
            try:
                build.build()
            except FormeryError:
                return
        else:
            build.begin()


def enabled(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernels, if they may be used here and now on these tensors."""
    # Gradients first: torch.compile, which trains, cannot follow a context variable.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    mode = _mode.get()
    if mode is False:
        return None
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return None
    return build.library(wait=mode is True)
