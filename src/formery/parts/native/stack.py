"""A stack of layers, run by the kernels where they can, by the layers' own `forward` where they cannot."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.embed import Output, TiedOutput
from formery.parts.linear import Linear
from formery.parts.native.lower import Piece, lower, row_by_row
from formery.parts.native.mode import enabled
from formery.parts.native.program import PLAIN, Pass, Program, Step, Unfit
from formery.parts.native.writer import Writer, plain, store

_DTYPES = (torch.float32, torch.bfloat16)


def pieces(layers: nn.ModuleList, norm: nn.Module | None, width: int) -> list[Piece] | None:
    """The stack as programs, written anew from what the layers are now; None where no kernels are used."""
    library = enabled()
    if library is None or layers.training:
        return None
    return lower(library, list(layers), norm, width)


def exact(known: Sequence[Piece] | None) -> bool:
    """Whether a token's vector has the same bits however many tokens and rows are computed together."""
    return known is not None and all(row_by_row(piece) for piece in known)


def row_by_row_out(part: nn.Module) -> bool:
    """Whether logits have the same bits however many tokens are computed together: all maps are the kernels'."""
    try:
        plain(part, Output, TiedOutput)
        if isinstance(part, Output):
            plain(part.map, Linear)
            weights: list[Any] = [part.map.weight]
        else:
            assert isinstance(part, TiedOutput)
            weights = [part.embedding.weight]
            if part.lower is not None:
                plain(part.lower, Linear)
                weights.append(part.lower.weight)
        for weight in weights:
            store(weight)
    except Unfit:
        return False
    return True


def run(
    layers: nn.ModuleList,
    norm: nn.Module | None,
    hidden: Float[Tensor, "batch time width"],
    context: Context,
    known: Sequence[Piece] | None,
) -> Float[Tensor, "batch time width"]:
    """The normed vectors behind all layers. known: the pieces, where they were made before."""
    usable = enabled(hidden) is not None and hidden.dtype in _DTYPES
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
    hidden: Float[Tensor, "... inputs"], outputs: int, write: Callable[[Writer], None]
) -> Float[Tensor, "... outputs"] | None:
    """What a few steps make of vectors: from register 0 to register 1.

    None where the kernels are not used, or do not know what is to be written.
    """
    library = enabled(hidden)
    if library is None or hidden.dtype not in _DTYPES:
        return None
    writer = Writer(library, hidden.shape[-1])
    writer.program.widths.append(outputs)
    try:
        write(writer)
    except Unfit:
        return None
    program, source = writer.program, hidden.float().contiguous()
    rows = source.numel() // program.widths[0]
    result = torch.empty(*hidden.shape[:-1], outputs, **PLAIN)
    if rows:
        others = [torch.empty(rows * width, **PLAIN) for width in program.widths[2:]]
        steps = (Step * len(program.steps))(*program.steps)
        room = torch.empty(library.formery_room(rows, program.narrowest), dtype=torch.uint8, device="cpu")
        addresses = [one.data_ptr() for one in (source, result, *others)]
        registers = ctypes.cast((ctypes.c_void_p * len(addresses))(*addresses), ctypes.c_void_p)
        one = Pass(rows, 1, torch.get_num_threads(), None, None, registers, room.data_ptr())
        library.formery_run(steps, len(steps), ctypes.byref(one))
    return result.to(hidden.dtype)
