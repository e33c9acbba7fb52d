"""Whether the compiled kernels are used: as asked for, where they are built, and never where gradients are wanted."""

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.native import build

if TYPE_CHECKING:
    from formery.parts.native.cards.program import Card

Library: TypeAlias = "ctypes.CDLL | Card"
Compile = bool | Literal["auto"]
OLDEST = (8, 0)  # of graphics cards: those that multiply numbers of 16 bits of this kind
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


@functools.cache
def card(device: torch.device) -> "Card | None":
    """A graphics card with kernels for it; None where it is too old, or what compiles them is not installed."""
    if importlib.util.find_spec("triton") is None or build.compiler() is None:
        return None
    if torch.cuda.get_device_capability(device) < OLDEST:
        return None
    from formery.parts.native.cards.program import Card

    return Card(device)


def enabled(*tensors: Tensor) -> "Library | None":
    """The kernels, if they may be used here and now on these tensors: a processor's, or a graphics card's."""
    # Gradients first: torch.compile, which trains, cannot follow a context variable.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    mode = _mode.get()
    if mode is False:
        return None
    devices = {tensor.device for tensor in tensors} or {torch.device("cpu")}
    if len(devices) > 1:
        return None
    [device] = devices
    if device.type == "cuda":
        return card(device)
    if device.type != "cpu":
        return None
    return build.library(wait=mode is True)
