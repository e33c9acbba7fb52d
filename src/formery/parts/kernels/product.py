"""Products with a weight matrix: PyTorch's own, or oneDNN's on a copy of the weights that is laid out for it.

On a CPU the plain product of a few rows costs nearly as much a row as of one alone; oneDNN's costs little more than one
row in all, which is what makes checking a draft of several tokens pay.
"""

import functools
from contextvars import ContextVar, Token
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from formery.parts.codes import Codes
from formery.parts.native.mode import enabled

ALONE = 500_000  # entries below which a single row is multiplied faster without the copy
HINT = 8  # rows that the layout is chosen for


class Packing:
    """Copies of weights for oneDNN, made when first used within `with packing:`; they go when the packing goes.

    The copies take as much memory as the weights, and do not follow them when they change: a packing is for one
    decoding, in which nobody trains.
    """

    def __init__(self) -> None:
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}
        self.tokens: list[Token[Packing | None]] = []

    def __enter__(self) -> Self:
        self.tokens.append(_active.set(self))
        return self

    def __exit__(self, *error: object) -> None:
        _active.reset(self.tokens.pop())

    def of(self, weight: Float[Tensor, "outputs inputs"]) -> Tensor:
        """The copy of this weight."""
        if id(weight) not in self.copies:
            copy = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), HINT)
            self.copies[id(weight)] = (weight, copy)
        return self.copies[id(weight)][1]


_active: ContextVar[Packing | None] = ContextVar("packing", default=None)


def product(
    hidden: Float[Tensor, "... inputs"],
    weight: Float[Tensor, "outputs inputs"] | Codes,
    shift: Float[Tensor, "outputs"] | None = None,
) -> Float[Tensor, "... outputs"]:
    """`hidden · weightᵀ + shift`: by the compiled kernels where they are used.

    Otherwise, within a packing, in float32 on a CPU, by oneDNN where that is faster, and else by PyTorch.
    """
    library = enabled(hidden)
    if library is not None:
        from formery.parts.native.stack import alone, multiplied

        if isinstance(weight, Codes):
            found = alone(library, hidden, weight.shape[0], lambda writer: writer.product(weight, shift, 0, 1))
        else:
            found = multiplied(library, hidden, weight, shift)
        if found is not None:
            return found
    if isinstance(weight, Codes):
        return torch.nn.functional.linear(hidden, weight.weights().to(hidden.dtype), shift)
    packing = None if torch.is_grad_enabled() else _active.get()
    if (
        packing is None
        or hidden.dtype != torch.float32
        or weight.dtype != torch.float32
        or hidden.device.type != "cpu"
        or (hidden.numel() == hidden.shape[-1] and weight.numel() < ALONE)
        or not available()
    ):
        return torch.nn.functional.linear(hidden, weight, shift)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, packing.of(weight), shift, "none", [], "")
    return result


@functools.cache
def available() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    try:
        weight, hidden = torch.ones(16, 16), torch.ones(2, 16)
        result = torch.ops.mkldnn._linear_pointwise(hidden, Packing().of(weight), None, "none", [], "")
        return bool(torch.equal(result, torch.full((2, 16), 16.0)))
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
