"""Which kernel computes attention: chosen by what is asked for, or named by the caller."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import unknown
from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager
from formery.parts.kernels.sdpa import sdpa

KERNELS = ("auto", "eager", "sdpa", "flex")
_chosen: ContextVar[str] = ContextVar("kernel", default="auto")


@contextmanager
def kernel(name: str) -> Iterator[None]:
    """Within this block attention is computed by that kernel (auto, eager, sdpa, flex)."""
    if name not in KERNELS:
        raise unknown("kernel", name, KERNELS)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def attend(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    visibility: Visibility,
    bias: Float[Tensor, "#batch head time slot"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch head time value"]:
    """Attention by the chosen kernel; `scale` is 1 / sqrt(key width) unless given.

    SDPA has no soft cap and flex no dropout: what a kernel cannot do, the eager reference does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    name = "auto" if torch.compiler.is_compiling() else _chosen.get()
    if name == "flex" and not dropout:
        from formery.parts.kernels.flex import flex

        return flex(query, key, value, visibility, bias, scale, soft_cap)
    if name == "eager" or soft_cap is not None:
        return eager(query, key, value, visibility, bias, scale, soft_cap, dropout)[0]
    return sdpa(query, key, value, visibility, bias, scale, dropout)
