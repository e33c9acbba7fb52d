"""From parts to steps: what each kind of part is for the kernels. A kind that is not here runs by its own `forward`."""

import ctypes
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formery.parts.attention import Attention, CrossAttention
from formery.parts.codes import Codes
from formery.parts.experts import Experts
from formery.parts.feedforward import MLP, GatedMLP
from formery.parts.linear import Linear
from formery.parts.native.program import (
    ADD,
    APPEND,
    ATTEND,
    LINEAR,
    NARROW,
    NORM,
    ROTATE,
    Program,
    Remembered,
    Sight,
    Step,
    Unfit,
)  # fmt: skip
from formery.parts.norm import AcrossHeads, LayerNorm, RMSNorm
from formery.parts.position import Position, Rotary, Together
from formery.parts.residual import Layer, Parallel, PostNorm, PreNorm, Sandwich

ACTIVATIONS = ("identity", "relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid")
SET, PLUS, TIMES = range(3)
FULL, BRAIN, BYTE, NIBBLE = range(4)


class Writer:
    """Writes the steps of a program, part by part."""

    def __init__(self, library: ctypes.CDLL, width: int, turns: Counter[int]):
        self.program = Program(library, [width])
        self.names: dict[tuple[str, int], int] = {}
        self.turns = turns
        self.narrowed: tuple[int, int] | None = None  # the register, and the form, that lies in the room
        self.label = "other"

    def register(self, name: str, width: int) -> int:
        """A register of that width, shared by all that ask for it by that name."""
        if (name, width) not in self.names:
            self.names[name, width] = len(self.program.widths)
            self.program.widths.append(width)
        return self.names[name, width]

    def step(self, kind: int, source: int, target: int, extra: int = 0, **rest: Any) -> None:
        """Adds a step."""
        if kind != NARROW and self.narrowed is not None and target == self.narrowed[0]:
            self.narrowed = None
        pointers = {name: self.pointer(rest.pop(name)) for name in "pqr" if rest.get(name) is not None}
        self.program.steps.append(Step(kind, source, target, extra, **rest, **pointers))
        self.program.labels.append(self.label)

    def pointer(self, tensor: Tensor) -> int:
        """The address of a tensor that is kept as long as the program."""
        self.program.kept.append(tensor)
        return tensor.data_ptr()

    def linear(self, part: nn.Module, source: int, target: int, into: int = SET, activation: str = "identity") -> None:
        """target = activation(weight · source + bias), or added to it, or multiplied with it."""
        plain(part, Linear)
        assert isinstance(part, Linear)
        if activation not in ACTIVATIONS or (into != SET and activation != "identity"):
            raise Unfit
        self.product(part.weight, part.shift, source, target, into, ACTIVATIONS.index(activation))

    def product(
        self,
        weight: Tensor | Codes,
        shift: Tensor | None,
        source: int,
        target: int,
        into: int = SET,
        activation: int = 0,
    ) -> None:
        """As `linear`, of the weights themselves."""
        outputs, inputs = weight.shape
        form, address, scales = _store(weight)
        if form != FULL:
            if self.narrowed != (source, min(form, BYTE)):
                self.step(NARROW, source, source, a=inputs, c=form)
                self.narrowed = (source, min(form, BYTE))
            self.program.narrowest = max(self.program.narrowest, inputs)
        bias = None if shift is None else whole(shift)
        self.step(LINEAR, source, target, into, a=inputs, b=outputs, c=form, d=activation, p=address, q=scales, r=bias)

    def norm(self, part: nn.Module, source: int, target: int, repeat: int = 1) -> None:
        """target = the norm of source, `repeat` times in each row."""
        plain(part, LayerNorm, RMSNorm)
        rms = isinstance(part, RMSNorm)
        assert isinstance(part, LayerNorm | RMSNorm)
        shift = None if isinstance(part, RMSNorm) or part.shift is None else whole(part.shift)
        offset = part.offset if isinstance(part, RMSNorm) else 0.0
        sizes: dict[str, Any] = {"a": part.width, "b": repeat, "c": int(rms), "e": part.epsilon, "f": offset}
        self.step(NORM, source, target, **sizes, p=whole(part.weight), q=shift)

    def head_norm(self, part: nn.Module | None, register: int, heads: int, dim: int) -> None:
        """Norms queries or keys, head by head or all heads of a token together."""
        if part is None:
            return
        if isinstance(part, AcrossHeads):
            plain(part, AcrossHeads)
            part, heads, dim = part.norm, 1, heads * dim
        if getattr(part, "width", None) != dim:
            raise Unfit
        self.norm(part, register, register, heads)

    def rotate(self, position: Position | None, register: int, heads: int, dim: int) -> None:
        """Turns queries or keys where the position scheme does."""
        for one in position.parts if isinstance(position, Together) else [position]:
            if not isinstance(one, Position) or type(one).rotate is Position.rotate:
                continue
            plain(one, Rotary)
            assert isinstance(one, Rotary)
            turned = one.turned(dim)
            if turned > 2048:
                raise Unfit
            sizes: dict[str, Any] = {"a": heads, "b": dim, "c": turned, "d": int(one.interleaved), "e": one.magnitude}
            self.step(ROTATE, register, register, **sizes, p=one.frequencies(turned, torch.device("cpu")))

    def attend(self, part: Attention | CrossAttention, query: int, mixed: int, position: Position | None) -> int:
        """Adds the step of attention itself; returns which cache it reads."""
        crossing = isinstance(part, CrossAttention)
        program = self.program
        biased = position is not None and _biases(position)
        sight = Sight(part.mask, part.heads, position if biased else None, crossing)
        if sight not in program.sights:
            program.sights.append(sight)
        cache = len(program.attentions)
        program.attentions.append(Remembered(part, self.turns[id(part)], crossing))
        self.turns[id(part)] += 1
        scale = part.dim**-0.5 if part.scale is None else part.scale
        cap = part.soft_cap if isinstance(part, Attention) and part.soft_cap is not None else 0.0
        sizes: dict[str, Any] = {"a": part.heads, "b": part.groups, "c": cache, "d": part.dim, "e": scale, "f": cap}
        self.step(ATTEND, query, mixed, program.sights.index(sight), **sizes)
        return cache


def plain(part: Any, *kinds: type) -> None:
    """Unfit unless the part is of just one of these kinds, as it was made, with nobody listening to it."""
    hooks = (part._forward_hooks, part._forward_pre_hooks) if isinstance(part, nn.Module) else ()
    if type(part) not in kinds or any(hooks) or "forward" in part.__dict__ or part.training:
        raise Unfit


def whole(tensor: Tensor) -> Tensor:
    """The numbers in 32 bits."""
    if tensor.device.type != "cpu":
        raise Unfit
    return tensor.detach().float().contiguous()


def _store(weight: Tensor | Codes) -> tuple[int, Tensor, Tensor | None]:
    if isinstance(weight, Codes):
        if weight.codes.device.type != "cpu":
            raise Unfit
        return (BYTE if weight.bits == 8 else NIBBLE), weight.codes, weight.scales
    if weight.dtype not in (torch.float32, torch.bfloat16) or weight.device.type != "cpu" or not weight.is_contiguous():
        raise Unfit
    return (FULL if weight.dtype == torch.float32 else BRAIN), weight.detach(), None


def _biases(position: Position) -> bool:
    if isinstance(position, Together):
        return any(isinstance(one, Position) and _biases(one) for one in position.parts)
    return type(position).bias is not Position.bias


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
    width = writer.program.widths[0]
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


def _norm(part: nn.Module, writer: Writer, source: int, target: int) -> None:
    writer.label = "norm"
    writer.norm(part, source, target)


Piece = Program | nn.Module


def lower(library: ctypes.CDLL, layers: Sequence[nn.Module], norm: nn.Module | None, width: int) -> list[Piece]:
    """Layers, and the norm behind them, as programs that are as long as can be; what cannot be one stands by itself."""
    pieces: list[Piece] = []
    turns: Counter[int] = Counter()
    writer = Writer(library, width, turns)
    for part in _units(layers, library, width):
        if _fits(part, library, width):
            layer(part, writer)
            writer.program.origin.append(part)
            continue
        if writer.program.steps:
            pieces.append(writer.program)
        pieces.append(part)
        turns.update(id(one) for one in part.modules())
        writer = Writer(library, width, turns)
    if norm is not None:
        try:
            _norm(norm, writer, 0, 0)
            writer.program.origin.append(norm)
        except Unfit:
            return [*pieces, *([writer.program] if writer.program.steps else []), norm]
    return [*pieces, *([writer.program] if writer.program.steps else [])]


def _fits(part: nn.Module, library: ctypes.CDLL, width: int) -> bool:
    """Whether the kernels know all of it."""
    try:
        layer(part, Writer(library, width, Counter()))
    except Unfit:
        return False
    return True


def _units(layers: Sequence[nn.Module], library: ctypes.CDLL, width: int) -> Iterator[nn.Module]:
    """The layers; of one that the kernels know in part only, its sub-layers."""
    for part in layers:
        hooked = any((part._forward_hooks, part._forward_pre_hooks)) or "forward" in part.__dict__
        if type(part) is Layer and not hooked and not _fits(part, library, width):
            yield from part.sublayers
        else:
            yield part


def row_by_row(piece: Piece) -> bool:
    """Whether a token's vector has the same bits however many are computed together.

    So it is in a program, and in a sub-layer of experts, whose norms and products are the kernels' too.
    """
    if isinstance(piece, Program):
        return True
    return type(piece) is PreNorm and type(piece.inner) is Experts and type(piece.norm) in (LayerNorm, RMSNorm)
