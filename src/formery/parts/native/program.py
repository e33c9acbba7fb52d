"""A stack of layers as a list of steps that one call carries out."""

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from itertools import groupby
from time import perf_counter
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Context
from formery.parts.mask import Both, Causal, Everything, Mask, Window
from formery.parts.position import Position
from formery.parts.spans import watching
from formery.parts.state import KeyValues, Memory

SCALE, ADD, NORM, NARROW, LINEAR, ROTATE, APPEND, ATTEND, CAP = range(9)
EVERYTHING, CAUSAL, WINDOW, TABLE = range(4)
FILLED = -1  # as many slots as there are tokens
PLAIN: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever PyTorch makes by default
_LONG, _POINTER = ctypes.c_int64, ctypes.c_void_p


class Step(ctypes.Structure):
    """As in program.cpp, which tells what the letters mean in each kind of step."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "source", "target", "extra")),
        *((name, _LONG) for name in "abcd"),
        *((name, ctypes.c_double) for name in "ef"),
        *((name, _POINTER) for name in "pqr"),
    ]


class Cache(ctypes.Structure):
    """Where one layer's keys and values lie."""

    _fields_ = [
        *((name, _POINTER) for name in ("keys", "values")),
        *((name, _LONG) for name in ("row", "head", "slot", "slots", "narrow")),
    ]


class Seen(ctypes.Structure):
    """Who sees whom, and what is added to the scores."""

    _fields_ = [
        ("kind", _LONG), ("window", _LONG), ("allowed", _POINTER), ("row", _LONG), ("head", _LONG), ("query", _LONG),
        ("bias", _POINTER), ("bias_row", _LONG), ("bias_head", _LONG), ("bias_query", _LONG),
    ]  # fmt: skip


class Pass(ctypes.Structure):
    """One run of a program."""

    _fields_ = [
        ("batch", _LONG), ("time", _LONG), ("threads", _LONG), ("filled", _LONG), ("positions", _POINTER),
        ("starts", _POINTER), ("registers", _POINTER), ("room", _POINTER), ("caches", _POINTER), ("sights", _POINTER),
        ("seconds", _POINTER),
    ]  # fmt: skip


class Unfit(Exception):
    """A part, or a state, that the kernels do not know; it is then computed by its own `forward`."""


@dataclass(frozen=True)
class Remembered:
    """An attention whose keys and values are looked up for each pass.

    crossing: whether they are those of another text.
    """

    part: Any
    crossing: bool


@dataclass(frozen=True)
class Sight:
    """What an attention is allowed to see, and the position scheme that biases its scores."""

    mask: Mask
    heads: int
    position: Position | None
    crossing: bool


@dataclass(frozen=True)
class Seeing:
    """Who sees whom in one pass: of which kind, in which window, by which table, and what is added to the scores."""

    kind: int
    window: int
    allowed: Tensor | None
    bias: Tensor | None


@dataclass
class Occasion:
    """What one run of a program knows besides the vectors.

    filled: slots in use. starts: the slot of each row's first token. positions: of each token. beside: what comes in
    for the program's registers of that name.
    """

    batch: int
    time: int
    filled: int = 0
    starts: list[int] = field(default_factory=list)
    positions: Tensor | None = None
    seeing: list[Seeing] = field(default_factory=list)
    beside: list[Tensor] = field(default_factory=list)


@dataclass
class Program:
    """The steps, and what they need; register 0 holds the vectors that come in.

    operands: the tensors that the steps point to. labels: what each step is for (attention, feed-forward, norm).
    origin: the parts that it stands for. result: the register of what comes out; where it is 0, the steps change the
    stream of hidden vectors, otherwise they leave what came in as it is. beside: registers that hold further vectors
    that come in.
    """

    library: Any
    widths: list[int]
    steps: list[Step] = field(default_factory=list)
    operands: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    attentions: list[Remembered] = field(default_factory=list)
    sights: list[Sight] = field(default_factory=list)
    origin: list[Any] = field(default_factory=list)
    result: int = 0
    narrowest: int = 0  # the widest input of a weight that is not in 32 bits
    spans: dict[int, tuple[int, int]] = field(default_factory=dict)  # where the steps of a part lie, by its id
    beside: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rows = -1
        self._caches = (Cache * 1)()
        self._known: list[tuple[Tensor, Tensor] | None] = []

    def run(
        self, hidden: Float[Tensor, "batch time width"], context: Context, *beside: Float[Tensor, "batch time other"]
    ) -> Float[Tensor, "batch time outputs"]:
        """The vectors after all steps. Raises Unfit, and changes nothing, where a layer's memory is of another kind."""
        if hidden.numel() == 0:
            raise Unfit
        batch, time, _ = hidden.shape
        held: list[Any] = []
        self._look_up(context, held)
        context.turns.update(one.part for one in self.attentions if not one.crossing)
        one = Occasion(batch, time, time, [0] * batch, context.positions.to(torch.int64).contiguous())
        if context.state is not None:
            one.filled, one.starts = context.state.slots.filled, context.state.slots.start
        one.seeing = [_seeing(sight, context) for sight in self.sights]
        one.beside = [tensor.to(torch.float32).contiguous() for tensor in beside]
        return self._carry_out(hidden, one)

    def map(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... outputs"]:
        """The vectors after all steps, where these look at nothing else."""
        return self._carry_out(hidden, Occasion(hidden.numel() // self.widths[0], 1))

    def _carry_out(self, hidden: Tensor, one: Occasion) -> Tensor:
        rows, outputs = one.batch * one.time, self.widths[self.result]
        self._reserve(rows)
        stream = hidden.to(torch.float32, copy=self.result == 0).contiguous()
        result = stream if self.result == 0 else torch.empty(*hidden.shape[:-1], outputs, **PLAIN)
        self._addresses[0], self._addresses[self.result] = stream.data_ptr(), result.data_ptr()
        for register, tensor in zip(self.beside, one.beside, strict=True):
            self._addresses[register] = tensor.data_ptr()
        spans, started = watching(), perf_counter()
        seconds = None if spans is None else (ctypes.c_double * len(self.steps))()
        starts, sights = (_LONG * len(one.starts))(*one.starts), (Seen * len(one.seeing))(*map(_seen, one.seeing))
        lists = (starts, self._addresses, self._caches, sights, seconds)
        begins, registers, caches, seen, clock = (one if one is None else ctypes.cast(one, _POINTER) for one in lists)
        positions = None if one.positions is None else one.positions.data_ptr()
        if rows:
            self.library.formery_run(
                self._array, len(self.steps),
                ctypes.byref(Pass(
                    one.batch, one.time, torch.get_num_threads(), one.filled, positions, begins, registers,
                    self._room.data_ptr(), caches, seen, clock,
                )),
            )  # fmt: skip
        if spans is not None and seconds is not None:
            for label, steps in groupby(zip(self.labels, seconds, strict=True), lambda pair: pair[0]):
                spent = sum(second for _, second in steps)
                if label is not None:
                    spans.add(label, started, spent)
                started += spent
        return result.to(hidden.dtype)

    def _reserve(self, rows: int) -> None:
        if rows <= self._rows:
            return
        self._rows = rows
        # The first and the last vectors lie in tensors of each pass.
        outside = {0, self.result, *self.beside}
        sizes = [0 if number in outside else rows * width for number, width in enumerate(self.widths)]
        self._registers = [torch.empty(size, **PLAIN) for size in sizes]
        self._addresses = (_POINTER * len(sizes))(*(one.data_ptr() for one in self._registers))
        self._room = torch.empty(self.library.formery_room(rows, self.narrowest), dtype=torch.uint8, device="cpu")
        self._array = (Step * len(self.steps))(*self.steps)

    def _look_up(self, context: Context, held: list[Any]) -> None:
        """Where the keys and values of all attentions lie; told anew only where they are other tensors than before."""
        if len(self._known) != len(self.attentions):
            self._caches, self._known = (Cache * len(self.attentions))(), [None] * len(self.attentions)
        turns: Counter[Any] = Counter()
        for number, one in enumerate(self.attentions):
            part, state = one.part, context.state
            if one.crossing:
                own: Any = part.read(context.memory_hidden) if state is None else state.layers[part, 0]
            elif state is None:
                own = _for_one_pass(part, context, held)
            else:
                own = state.of(part, context.turns[part] + turns[part])
                turns[part] += 1
            if type(own) is not (Memory if one.crossing else KeyValues):
                raise Unfit
            known = self._known[number]
            if known is None or own.keys is not known[0] or own.values is not known[1]:
                held.append(own)
                self._caches[number] = _cache(own.keys, own.values, one.crossing)
                self._known[number] = own.keys, own.values


def _seeing(one: Sight, context: Context) -> Seeing:
    """Who sees whom in this pass."""
    reading = context.memory if one.crossing else context
    assert reading is not None
    kind, window = _range(one.mask, reading)
    allowed = bias = None
    if kind == TABLE:
        visibility = reading.visibility(one.mask, one.heads)
        if visibility.allowed is None:
            kind = CAUSAL if visibility.causal else EVERYTHING
        else:
            allowed = visibility.allowed.contiguous()
    if one.position is not None and (found := one.position.bias(one.heads, context)) is not None:
        bias = found.float().contiguous()
    return Seeing(kind, window, allowed, bias)


def _seen(one: Seeing) -> Seen:
    seen = Seen(one.kind, one.window)
    if one.allowed is not None:
        seen.allowed = one.allowed.data_ptr()
        seen.row, seen.head, seen.query = strides(one.allowed)
    if one.bias is not None:
        seen.bias = one.bias.data_ptr()
        seen.bias_row, seen.bias_head, seen.bias_query = strides(one.bias)
    return seen


def _cache(keys: Tensor, values: Tensor, crossing: bool) -> Cache:
    """Where keys and values lie; those of another text are laid out by heads, and all of them are seen."""
    whole = keys.is_contiguous() and values.is_contiguous() and keys.shape == values.shape
    if not whole or keys.dtype not in (torch.float32, torch.bfloat16):
        raise Unfit
    row, first, second, _ = keys.stride()
    head, slot = (first, second) if crossing else (second, first)
    slots = keys.shape[2] if crossing else FILLED
    return Cache(keys.data_ptr(), values.data_ptr(), row, head, slot, slots, keys.dtype == torch.bfloat16)


class _OnePass:
    """The slots of a pass without a state."""

    def __init__(self, context: Context):
        self.positions, self.filled = context.positions, context.positions.shape[1]


def _for_one_pass(part: Any, context: Context, held: list[Any]) -> KeyValues:
    """Room for the keys and values of a pass without a state; layers of one shape use it in turn."""
    dtype = part.key.dtype
    own = context.once(
        ("keys and values", part.groups, part.dim, dtype),
        lambda: KeyValues(cast(Any, _OnePass(context)), part.groups, part.dim, part.dim, dtype),
    )
    held.append(own)
    return own


def _range(mask: Mask, context: Context) -> tuple[int, int]:
    """How a mask is told without a table, and its window; TABLE where it takes one."""
    if context.visible is not None:
        return TABLE, 0
    if type(mask) is Everything:
        return (EVERYTHING if context.full else TABLE), 0
    ordered = context.even if context.state is None else context.state.slots.ordered
    if not ordered:
        return TABLE, 0
    if type(mask) is Causal:
        return CAUSAL, 0
    if type(mask) is Both:
        for first, second in ((mask.left, mask.right), (mask.right, mask.left)):
            if type(first) is Causal and type(second) is Window and second.size > 0:
                return WINDOW, second.size
    return TABLE, 0


def strides(table: Tensor) -> list[int]:
    """The steps of a table [#row, #head, #query, slot] that stands for all rows, heads or queries where it has one."""
    return [0 if size == 1 else step for size, step in zip(table.shape[:3], table.stride()[:3], strict=True)]
