"""A stack of layers, run by the kernels where they can, by the layers' own `forward` where they cannot."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.native.lower import Piece, lower, row_by_row, way_out
from formery.parts.native.mode import Library, enabled
from formery.parts.native.program import Program, Unfit
from formery.parts.native.writer import Writer

DTYPES = (torch.float32, torch.bfloat16)


def pieces(layers: nn.ModuleList, norm: nn.Module | None, width: int) -> list[Piece] | None:
    """The stack as programs, written anew from what the layers are now; None where no kernels are used."""
    library = enabled(*islice(layers.parameters(), 1))
    if library is None or layers.training:
        return None
    return lower(library, list(layers), norm, width)


def exact(known: Sequence[Piece] | None) -> bool:
    """Whether a token's vector has the same bits however many tokens and rows are computed together."""
    return known is not None and all(row_by_row(piece) for piece in known)


def out(part: nn.Module, width: int) -> Program | None:
    """The way from vectors of that width to logits as a program; None where the kernels do not do all of it."""
    library = enabled(*islice(part.parameters(), 1))
    return None if library is None else way_out(part, library, width)


def logits(
    part: nn.Module, hidden: Float[Tensor, "batch time width"], known: Program | None
) -> Float[Tensor, "batch time vocabulary"]:
    """What the output makes of vectors. known: the way out, where it was made before."""
    if enabled(hidden) is not None and hidden.dtype in DTYPES:
        program = known or out(part, hidden.shape[-1])
        if program is not None:
            return program.map(hidden)
    return cast(Tensor, part(hidden))


def run(
    layers: nn.ModuleList,
    norm: nn.Module | None,
    hidden: Float[Tensor, "batch time width"],
    context: Context,
    known: Sequence[Piece] | None,
) -> Float[Tensor, "batch time width"]:
    """The normed vectors behind all layers. known: the pieces, where they were made before."""
    usable = enabled(hidden) is not None and hidden.dtype in DTYPES
    if usable and known is None:
        known = pieces(layers, norm, hidden.shape[-1])
    if not usable or known is None:
        return plainly(layers, norm, hidden, context)
    for piece in known:
        try:
            if isinstance(piece, Program):
                hidden = piece.run(hidden, context)
            else:
                hidden = piece(hidden) if piece is norm else piece(hidden, context)
        except Unfit:
            assert isinstance(piece, Program)
            normed = norm is not None and piece.origin[-1] is norm
            hidden = plainly(piece.origin[: -1 if normed else None], norm if normed else None, hidden, context)
    return hidden


def plainly(
    layers: Iterable[nn.Module], norm: nn.Module | None, hidden: Tensor, context: Context
) -> Float[Tensor, "batch time width"]:
    """The layers one after the other by their own `forward`, and the norm."""
    for layer in layers:
        hidden = layer(hidden, context)
    return hidden if norm is None else norm(hidden)


def alone(
    library: Library, hidden: Float[Tensor, "... inputs"], outputs: int, write: Callable[[Writer], None]
) -> Float[Tensor, "... outputs"] | None:
    """What a few steps make of vectors: from register 0 to register 1; None where the kernels do not know them."""
    if hidden.dtype not in DTYPES:
        return None
    writer = Writer(library, hidden.shape[-1])
    writer.program.result = writer.register("result", outputs)
    try:
        write(writer)
    except Unfit:
        return None
    return writer.program.map(hidden)
