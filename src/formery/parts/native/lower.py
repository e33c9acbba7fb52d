"""From parts to steps: what each kind of part is for the kernels. A kind that is not here runs by its own `forward`."""

from collections.abc import Iterator, Sequence

from torch import nn

from formery.parts.attention import Attention, CrossAttention
from formery.parts.codes import Codes
from formery.parts.embed import Output, TiedOutput
from formery.parts.experts import Experts
from formery.parts.feedforward import MLP, GatedMLP
from formery.parts.linear import Linear
from formery.parts.native.mode import Library
from formery.parts.native.program import ADD, APPEND, CAP, SCALE, Program, Unfit
from formery.parts.native.writer import PLUS, SET, TIMES, Writer, plain, untouched
from formery.parts.nested import Nested
from formery.parts.norm import LayerNorm, RMSNorm
from formery.parts.residual import Layer, Parallel, PostNorm, PreNorm, Sandwich


def sublayer(part: nn.Module, writer: Writer, source: int, target: int, into: int) -> None:
    """What an attention or a feed-forward makes of `source`."""
    if isinstance(part, Attention):
        _attention(part, writer, source, target, into)
    elif isinstance(part, CrossAttention):
        plain(part, CrossAttention)
        query, mixed = (writer.register(name, part.heads * part.dim) for name in ("query", "mixed"))
        writer.label = "attention"
        writer.linear(part.query, source, query)
        writer.attend(part, query, mixed, None)
        writer.linear(part.output, mixed, target, into)
    elif isinstance(part, GatedMLP):
        plain(part, GatedMLP)
        writer.label = "feed-forward"
        inner = writer.register("inner", part.hidden)
        writer.linear(part.gate, source, inner, SET, part.activation)
        writer.linear(part.up, source, inner, TIMES)
        writer.linear(part.down, inner, target, into)
    elif isinstance(part, Nested):
        plain(part, Nested)
        sublayer(part.alone(), writer, source, target, into)
    else:
        plain(part, MLP)
        assert isinstance(part, MLP)
        writer.label = "feed-forward"
        inner = writer.register("inner", part.hidden)
        writer.linear(part.up, source, inner, SET, part.activation)
        writer.linear(part.down, inner, target, into)


def _attention(part: Attention, writer: Writer, source: int, target: int, into: int) -> None:
    plain(part, Attention)
    writer.label = "attention"
    query, mixed = (writer.register(name, part.heads * part.dim) for name in ("query", "mixed"))
    key, value = (writer.register(name, part.groups * part.dim) for name in ("key", "value"))
    for linear, register in ((part.query, query), (part.key, key), (part.value, value)):
        writer.linear(linear, source, register)
    writer.head_norm(part.query_norm, query, part.heads, part.dim)
    writer.head_norm(part.key_norm, key, part.groups, part.dim)
    writer.rotate(part.position, query, part.heads, part.dim)
    writer.rotate(part.position, key, part.groups, part.dim)
    writer.step(APPEND, key, value, a=part.groups, b=part.dim, c=len(writer.program.attentions))
    writer.attend(part, query, mixed, part.position)
    writer.linear(part.output, mixed, target, into)


def layer(part: nn.Module, writer: Writer) -> None:
    """What a layer, or a residual sub-layer, does to the stream."""
    width, began = writer.program.widths[0], len(writer.program.steps)
    normed, update = writer.register("normed", width), writer.register("update", width)
    if isinstance(part, Layer):
        plain(part, Layer)
        for one in part.sublayers:
            layer(one, writer)
    elif isinstance(part, PreNorm):
        plain(part, PreNorm)
        _norm(part.norm, writer, 0, normed)
        sublayer(part.inner, writer, normed, 0, PLUS)
    elif isinstance(part, PostNorm):
        plain(part, PostNorm)
        sublayer(part.inner, writer, 0, 0, PLUS)
        _norm(part.norm, writer, 0, 0)
    elif isinstance(part, Sandwich):
        plain(part, Sandwich)
        _norm(part.before, writer, 0, normed)
        sublayer(part.inner, writer, normed, update, SET)
        _norm(part.after, writer, update, update)
        writer.step(ADD, update, 0, a=width)
    else:
        plain(part, Parallel)
        assert isinstance(part, Parallel)
        registers = [writer.register(f"normed {number}", width) for number in range(len(part.norms))]
        for norm, register in zip(part.norms, registers, strict=True):
            _norm(norm, writer, 0, register)
        for number, inner in enumerate(part.inners):
            sublayer(inner, writer, registers[number % len(registers)], 0, PLUS)
    writer.program.spans[id(part)] = began, len(writer.program.steps)


def _norm(part: nn.Module, writer: Writer, source: int, target: int) -> None:
    writer.label = "norm"
    writer.norm(part, source, target)


def way_out(part: nn.Module, library: Library, width: int, table: Codes | None = None) -> Program | None:
    """The way from hidden vectors to logits as a program, where the kernels know all of it.

    table: codes that stand in the place of the weights that make the logits.
    """
    writer = Writer(library, width)
    writer.label = "output"
    try:
        plain(part, Output, TiedOutput)
        assert isinstance(part, Output | TiedOutput)
        vocabulary = part.vocabulary if isinstance(part, Output) else part.embedding.vocabulary
        logits = writer.register("logits", vocabulary)
        if isinstance(part, TiedOutput):
            _tied(part, writer, logits, table)
        elif table is None:
            writer.linear(part.map, 0, logits)
        else:
            plain(part.map, Linear)
            writer.product(table, part.map.shift, 0, logits)
        if part.soft_cap is not None:
            writer.step(CAP, logits, logits, a=vocabulary, e=part.soft_cap)
    except Unfit:
        return None
    writer.program.result = logits
    return writer.program


def _tied(part: TiedOutput, writer: Writer, logits: int, table: Codes | None) -> None:
    source, width = 0, part.embedding.weight.shape[1]
    if part.lower is not None:
        source = writer.register("lowered", width)
        writer.linear(part.lower, 0, source)
    if part.scale != 1.0:
        scaled = writer.register("scaled", width)
        writer.step(SCALE, source, scaled, a=width, e=part.scale)
        source = scaled
    writer.product(part.embedding.weight if table is None else table, part.shift, source, logits)


def way_in(
    library: Library,
    layers: Sequence[nn.Module],
    norm: nn.Module | None,
    width: int,
    fuse: Linear,
    first: Linear | None,
    coding: bool,
) -> Program | None:
    """`fuse [x, y]`, or `fuse [x, silu(first y)]`, then layers and norm; x comes in, and y beside it.

    coding: all weights are copied into codes of 8 bits. None where the kernels do not know all of it.
    """
    writer = Writer(library, width)
    writer.coding = coding
    if type(writer.program) is not Program or isinstance(fuse.weight, Codes):
        return None
    read = writer.register("beside", fuse.inputs - width if first is None else first.inputs)
    writer.program.beside.append(read)
    joined = writer.register("joined", width)
    try:
        if first is not None:
            inner = writer.register("first", first.outputs)
            writer.linear(first, read, inner, SET, "silu")
            read = inner
        plain(fuse, Linear)
        writer.product(fuse.weight[:, :width].contiguous(), fuse.shift, 0, joined)
        writer.product(fuse.weight[:, width:].contiguous(), None, read, joined, PLUS)
        writer.step(SCALE, joined, 0, a=width, e=1.0)
        for part in layers:
            layer(part, writer)
        if norm is not None:
            _norm(norm, writer, 0, 0)
    except Unfit:
        return None
    return writer.program


Piece = Program | nn.Module


def lower(library: Library, layers: Sequence[nn.Module], norm: nn.Module | None, width: int) -> list[Piece]:
    """Layers, and the norm behind them, as programs that are as long as can be; what cannot be one stands by itself."""
    pieces: list[Piece] = []
    writer = Writer(library, width)
    for part in _units(layers, library, width):
        if _fits(part, library, width):
            layer(part, writer)
            writer.program.origin.append(part)
            continue
        if writer.program.steps:
            pieces.append(writer.program)
        pieces.append(part)
        writer = Writer(library, width)
    if norm is not None:
        began = len(writer.program.steps)
        try:
            _norm(norm, writer, 0, 0)
            writer.program.origin.append(norm)
            writer.program.spans[id(norm)] = began, len(writer.program.steps)
        except Unfit:
            return [*pieces, *([writer.program] if writer.program.steps else []), norm]
    return [*pieces, *([writer.program] if writer.program.steps else [])]


def _fits(part: nn.Module, library: Library, width: int) -> bool:
    """Whether the kernels know all of it."""
    try:
        layer(part, Writer(library, width))
    except Unfit:
        return False
    return True


def _units(layers: Sequence[nn.Module], library: Library, width: int) -> Iterator[nn.Module]:
    """The layers; of one that the kernels know in part only, its sub-layers."""
    for part in layers:
        if type(part) is Layer and untouched(part) and not _fits(part, library, width):
            yield from part.sublayers
        else:
            yield part


def row_by_row(piece: Piece) -> bool:
    """Whether a token's vector has the same bits however many are computed together.

    So it is in a program, and in a sub-layer of experts, whose norms and products are the kernels' too.
    """
    if isinstance(piece, Program):
        return True
    if type(piece) is not PreNorm or type(piece.inner) is not Experts or type(piece.norm) not in (LayerNorm, RMSNorm):
        return False
    inside = [piece, piece.norm, piece.inner, piece.inner.router, *piece.inner.experts]
    known = (Linear, MLP, GatedMLP)
    return all(untouched(part) for part in inside) and all(type(part) in known for part in inside[3:])
