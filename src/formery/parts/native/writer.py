"""Writes the steps of a program: products, norms, rotary positions, attention."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from formery.parts.attention import Attention, CrossAttention
from formery.parts.codes import Codes
from formery.parts.linear import Linear
from formery.parts.native import program as kinds
from formery.parts.native.mode import Library
from formery.parts.native.program import Program, Remembered, Sight, Step, Unfit
from formery.parts.norm import AcrossHeads, LayerNorm, RMSNorm
from formery.parts.position import Position, Rotary, Together

ACTIVATIONS = ("identity", "relu", "relu2", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh", "sigmoid")
SET, PLUS, TIMES = range(3)
FULL, BRAIN, BYTE, NIBBLE = range(4)


class Writer:
    """Writes the steps of a program, part by part."""

    def __init__(self, library: Library, width: int):
        self.device = torch.device("cpu") if isinstance(library, ctypes.CDLL) else library.device
        self.program = Program(library, [width]) if isinstance(library, ctypes.CDLL) else library.program(width)
        self.names: dict[tuple[str, int], int] = {}
        self.narrowed: tuple[int, int] | None = None  # the register, and the form, that lies in the room
        self.label: str | None = None  # what the next steps are for, if it is to be told
        self.coding = False  # whether the next weights are copied into codes of 8 bits

    def register(self, name: str, width: int) -> int:
        """A register of that width, shared by all that ask for it by that name."""
        if (name, width) not in self.names:
            self.names[name, width] = len(self.program.widths)
            self.program.widths.append(width)
        return self.names[name, width]

    def step(self, kind: int, source: int, target: int, extra: int = 0, **rest: Any) -> None:
        """Adds a step."""
        if kind != kinds.NARROW and self.narrowed is not None and target == self.narrowed[0]:
            self.narrowed = None
        operands = {name: rest.pop(name, None) for name in "pqr"}
        pointers = {name: tensor.data_ptr() for name, tensor in operands.items() if tensor is not None}
        self.program.steps.append(Step(kind, source, target, extra, **rest, **pointers))
        self.program.operands.append(tuple(operands.values()))
        self.program.labels.append(self.label)

    def fits(self, register: int, width: int) -> None:
        """Unfit where vectors of a register are not of that width: the kernels would read or write beside them."""
        if self.program.widths[register] != width:
            raise Unfit

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
        self.fits(source, inputs)
        self.fits(target, outputs)
        if shift is not None and shift.shape != (outputs,):
            raise Unfit
        coded = Codes.of(weight) if self.coding and isinstance(weight, Tensor) else weight
        form, address, scales = store(coded, self.device)
        if form != FULL:
            if self.narrowed != (source, min(form, BYTE)):
                self.step(kinds.NARROW, source, source, a=inputs, c=form)
                self.narrowed = (source, min(form, BYTE))
            self.program.narrowest = max(self.program.narrowest, inputs)
        bias = None if shift is None else whole(shift, self.device)
        stored: dict[str, Any] = {"c": form, "p": address, "q": scales, "r": bias}
        self.step(kinds.LINEAR, source, target, into, a=inputs, b=outputs, d=activation, **stored)

    def norm(self, part: nn.Module, source: int, target: int, repeat: int = 1) -> None:
        """target = the norm of source, `repeat` times in each row."""
        plain(part, LayerNorm, RMSNorm)
        rms = isinstance(part, RMSNorm)
        assert isinstance(part, LayerNorm | RMSNorm)
        self.fits(source, part.width * repeat)
        self.fits(target, part.width * repeat)
        if part.weight.shape != (part.width,):
            raise Unfit
        shift = None if isinstance(part, RMSNorm) or part.shift is None else whole(part.shift, self.device)
        offset = part.offset if isinstance(part, RMSNorm) else 0.0
        sizes: dict[str, Any] = {"a": part.width, "b": repeat, "c": int(rms), "e": part.epsilon, "f": offset}
        self.step(kinds.NORM, source, target, **sizes, p=whole(part.weight, self.device), q=shift)

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
            self.step(kinds.ROTATE, register, register, **sizes, p=one.frequencies(turned, self.device))

    def attend(self, part: Attention | CrossAttention, query: int, mixed: int, position: Position | None) -> None:
        """Adds the step of attention itself."""
        crossing = isinstance(part, CrossAttention)
        program = self.program
        biased = position is not None and _biases(position)
        sight = Sight(part.mask, part.heads, position if biased else None, crossing)
        if sight not in program.sights:
            program.sights.append(sight)
        cache = len(program.attentions)
        program.attentions.append(Remembered(part, crossing))
        scale = part.dim**-0.5 if part.scale is None else part.scale
        cap = part.soft_cap if isinstance(part, Attention) and part.soft_cap is not None else 0.0
        sizes: dict[str, Any] = {"a": part.heads, "b": part.groups, "c": cache, "d": part.dim, "e": scale, "f": cap}
        self.step(kinds.ATTEND, query, mixed, program.sights.index(sight), **sizes)


def plain(part: Any, *types: type) -> None:
    """Unfit unless the part is of just one of these types, as it was made, with nobody listening to it."""
    if type(part) not in types or not untouched(part):
        raise Unfit


def untouched(part: nn.Module) -> bool:
    """Whether a part computes what its class says, with nobody listening to it."""
    hooks = (part._forward_hooks, part._forward_pre_hooks)
    return not any(hooks) and "forward" not in part.__dict__ and not part.training


def whole(tensor: Tensor, device: torch.device) -> Tensor:
    """The numbers in 32 bits."""
    if tensor.device != device:
        raise Unfit
    return tensor.detach().float().contiguous()


def store(weight: Tensor | Codes, device: torch.device) -> tuple[int, Tensor, Tensor | None]:
    """How weights are stored, where, and their scales; Unfit where the kernels cannot read them."""
    if weight.device != device:
        raise Unfit
    if isinstance(weight, Codes):
        return (BYTE if weight.bits == 8 else NIBBLE), weight.codes, weight.scales
    if weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise Unfit
    return (FULL if weight.dtype == torch.float32 else BRAIN), weight.detach(), None


def _biases(position: Position) -> bool:
    if isinstance(position, Together):
        return any(isinstance(one, Position) and _biases(one) for one in position.parts)
    return type(position).bias is not Position.bias
