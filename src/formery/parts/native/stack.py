"""A stack of layers, run by the kernels where they can, by the layers' own `forward` where they cannot."""

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from threading import local
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from formery.parts.codes import Codes
from formery.parts.context import Context
from formery.parts.embed import Output, TiedOutput
from formery.parts.linear import Linear
from formery.parts.native.lower import Piece, lower, row_by_row, way_in, way_out
from formery.parts.native.mode import Library, enabled
from formery.parts.native.program import APPEND, ATTEND, Program, Step, Unfit
from formery.parts.native.writer import Writer
from formery.parts.part import activation

DTYPES = (torch.float32, torch.bfloat16)
MANY = 500_000  # weights from which a copy of them in 8 bits is made for guesses


def pieces(layers: nn.ModuleList, norm: nn.Module | None, width: int) -> list[Piece] | None:
    """The stack as programs, written anew from what the layers are now; None where no kernels are used."""
    library = enabled(*islice(layers.parameters(), 1))
    if library is None or layers.training:
        return None
    return lower(library, list(layers), norm, width)


def entry(
    layers: nn.ModuleList, norm: nn.Module | None, width: int, fuse: Linear, first: Linear | None
) -> Program | None:
    """As `pieces`, with the way into the layers of two kinds of vectors, as in `way_in`, all one program.

    For guesses: where the weights are many, it is made once, and reads a copy of them in 8 bits.
    """
    library = enabled(*islice(layers.parameters(), 1))
    if library is None or layers.training:
        return None
    weights = [one for part in (layers, fuse, first, norm) if part is not None for one in part.parameters()]
    many = sum(one.numel() for one in weights) >= MANY

    def write() -> Program | None:
        return way_in(library, list(layers), norm, width, fuse, first, many)

    return _once(layers, library, weights, write) if many else write()


def _once(
    part: nn.Module, library: Library, weights: Iterable[Tensor], write: Callable[[], Program | None]
) -> Program | None:
    """What was written for this part before, as long as its weights are the same, or else is written now."""
    state = (id(library), *((one.data_ptr(), one._version) for one in weights))
    known = _products.coded.get(part)
    if known is None or known[0] != state:
        known = _products.coded[part] = state, write()
    return known[1]


def activated(part: Linear, hidden: Float[Tensor, "... inputs"], name: str) -> Float[Tensor, "... outputs"]:
    """The activation of that name of `part(x)`, for guesses: by codes of 8 bits where the weights are many."""
    library = enabled(hidden)
    if isinstance(library, ctypes.CDLL) and hidden.dtype in DTYPES and part.inputs * part.outputs >= MANY // 4:

        def write() -> Program | None:
            writer = Writer(library, part.inputs)
            writer.coding, writer.program.result = True, writer.register("result", part.outputs)
            try:
                writer.linear(part, 0, 1, activation=name)
            except Unfit:
                return None
            return writer.program

        program = _once(part, library, part.parameters(), write)
        if program is not None:
            return program.map(hidden)
    return activation(name)(part(hidden))


def chosen(
    known: Sequence[Piece] | None, parts: nn.ModuleList, norm: nn.Module | None, width: int
) -> list[Piece] | None:
    """As `pieces`, of some parts of a stack of which `known` are the pieces; what is written there is used again."""
    if known is not None and len(known) == 1 and isinstance(known[0], Program):
        try:
            return [only(known[0], [*parts, *([] if norm is None else [norm])])]
        except Unfit:
            pass
    return pieces(parts, norm, width)


def only(program: Program, parts: Sequence[nn.Module]) -> Program:
    """The steps of these residual parts alone, in this order.

    Raises Unfit where the program does not hold one of them, or reads weights in fewer bits: inputs that were narrowed
    for one part may be read by the next.
    """
    if program.narrowest or any(id(part) not in program.spans for part in parts):
        raise Unfit
    places = [place for part in parts for place in range(*program.spans[id(part)])]
    steps = [Step.from_buffer_copy(program.steps[place]) for place in places]
    remembering = [step for step in steps if step.kind in (APPEND, ATTEND)]
    caches = sorted({step.c for step in remembering})
    for step in remembering:
        step.c = caches.index(step.c)
    return replace(
        program,
        steps=steps,
        operands=[program.operands[place] for place in places],
        labels=[program.labels[place] for place in places],
        attentions=[program.attentions[cache] for cache in caches],
        origin=list(parts),
        spans={},
    )


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


def guessed(
    part: nn.Module, hidden: Float[Tensor, "batch time width"], known: Program | None
) -> Float[Tensor, "batch time vocabulary"]:
    """As `logits`, for guesses: by codes of 8 bits where the weights are many, since reading these is what it costs."""
    library = enabled(hidden)
    if isinstance(library, ctypes.CDLL) and hidden.dtype in DTYPES:
        program = _coded_out(part, library, hidden.shape[-1])
        if program is not None:
            return program.map(hidden)
    return logits(part, hidden, known)


def _coded_out(part: nn.Module, library: Library, width: int) -> Program | None:
    """The way out by codes that are made once for these weights; None where they would not pay."""
    if not isinstance(part, Output | TiedOutput):
        return None
    weight = part.map.weight if isinstance(part, Output) else part.embedding.weight
    if isinstance(weight, Codes) or weight.numel() < MANY:
        return None
    return _once(part, library, [weight], lambda: way_out(part, library, width, Codes.of(weight)))


def usable(hidden: Tensor) -> bool:
    """Whether the kernels may be used here and now, and know vectors of this type."""
    return enabled(hidden) is not None and hidden.dtype in DTYPES


def run(
    layers: nn.ModuleList,
    norm: nn.Module | None,
    hidden: Float[Tensor, "batch time width"],
    context: Context,
    known: Sequence[Piece] | None,
) -> Float[Tensor, "batch time width"]:
    """The normed vectors behind all layers. known: the pieces, where they were made before."""
    fit = usable(hidden)
    if fit and known is None:
        known = pieces(layers, norm, hidden.shape[-1])
    if not fit or known is None:
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


class _Products(local):
    """The programs of single products, of each thread apart: one program runs in one thread at a time."""

    def __init__(self) -> None:
        self.known = WeakTensorKeyDictionary()
        self.coded = WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], Program | None]]()


_products = _Products()


def multiplied(
    library: Library, hidden: Float[Tensor, "... inputs"], weight: Tensor, shift: Tensor | None
) -> Float[Tensor, "... outputs"] | None:
    """`hidden · weightᵀ + shift` by a program that is written once for this weight; None as in `alone`."""
    if hidden.dtype not in DTYPES or (shift is not None and shift.dtype != torch.float32):
        return alone(library, hidden, weight.shape[0], lambda writer: writer.product(weight, shift, 0, 1))
    # The program reads what lies at these places when it runs.
    places = (id(library), weight.data_ptr(), None if shift is None else shift.data_ptr())
    known = _products.known.get(weight)
    if known is None or known[0] != places:
        writer = Writer(library, hidden.shape[-1])
        writer.program.result = writer.register("result", weight.shape[0])
        try:
            writer.product(weight, shift, 0, 1)
        except Unfit:
            return None
        known = _products.known[weight] = places, writer.program
    found: Tensor = known[1].map(hidden)
    return found


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
