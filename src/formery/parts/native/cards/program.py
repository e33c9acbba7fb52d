"""A program on a graphics card: its steps are launched one by one, and where they come again, played back at once."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from formery.parts.native.cards import attention, kernels
from formery.parts.native.program import (
    ADD,
    APPEND,
    ATTEND,
    CAP,
    FILLED,
    LINEAR,
    NARROW,
    NORM,
    ROTATE,
    SCALE,
    Occasion,
    Program,
    Step,
    strides,
)
from formery.parts.native.writer import BRAIN, BYTE, FULL

ROOM = 2**24  # numbers: what the shares of attention may take at a time
PLAYED = 16  # shapes of passes that are kept to be played back
TILE, SHARE = kernels.ROWS.value, kernels.SHARE.value  # rows, and slots, that belong together
PRODUCTS = kernels.product, kernels.product, kernels.product8, kernels.product4
Operands = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Card:
    """One graphics card."""

    device: torch.device

    @property
    def graphs(self) -> bool:
        """Whether launches can be recorded: not where the processor carries them out."""
        return self.device.type == "cuda"

    def program(self, width: int) -> "CardProgram":
        """A program without steps."""
        return CardProgram(self, [width])


class CardProgram(Program):
    """Vectors lie in registers of 32 bits on the card; launches of one shape are recorded when they come again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._recorded: dict[Hashable, Any] = {}
        self._read: list[Any] = []
        self._shares = torch.empty(0)

    def _carry_out(self, hidden: Tensor, one: Occasion) -> Tensor:
        rows, outputs = one.batch * one.time, self.widths[self.result]
        if rows == 0:
            return hidden.new_empty(*hidden.shape[:-1], outputs)
        self._reserve(rows)
        self._registers[0][: hidden.numel()].copy_(hidden.reshape(-1))
        if one.positions is not None:
            self._told[:rows].copy_(one.positions.reshape(-1))
            behind = torch.tensor([*one.starts, one.filled], dtype=torch.int64)
            self._told[rows : rows + one.batch + 1].copy_(behind, non_blocking=True)
        if self.library.graphs and all(seeing.allowed is None and seeing.bias is None for seeing in one.seeing):
            self._play(one)
        else:
            self._launch(one, False)
        result = self._registers[self.result][: rows * outputs].view(*hidden.shape[:-1], outputs)
        return result.to(hidden.dtype, copy=True)

    def _reserve(self, rows: int) -> None:
        if len(self._read) != len(self._known) or any(a is not b for a, b in zip(self._read, self._known, strict=True)):
            self._read = list(self._known)  # the tensors that recorded launches read are others now
            self._recorded.clear()
        if rows > self._rows:
            self._rows = rows
            self._recorded.clear()
            device = self.library.device
            self._registers = [torch.empty(rows * width, dtype=torch.float32, device=device) for width in self.widths]
            self._told = torch.empty(2 * rows + 1, dtype=torch.int64, device=device)
            told = zip(self.steps, self.operands, strict=True)
            self._groups = grouped([one for one in told if one[0].kind != NARROW])  # products narrow by themselves

    def _play(self, one: Occasion) -> None:
        key = one.batch, one.time, tuple((seeing.kind, seeing.window) for seeing in one.seeing)
        known = self._recorded.get(key)
        if known is None:
            if len(self._recorded) >= PLAYED:
                self._recorded.pop(next(iter(self._recorded)))
            self._recorded[key] = False
            self._launch(one, True)  # compiles what is not compiled yet
            return
        if known is False:
            known = torch.cuda.CUDAGraph()
            with torch.cuda.graph(known):
                self._launch(one, True)
            self._recorded[key] = known
        known.replay()

    def _launch(self, one: Occasion, recorded: bool) -> None:
        self._rest = one.batch * one.time
        for group in self._groups:
            kind = group[0][0].kind
            if kind == LINEAR:
                self._linear(group)
            elif kind == ATTEND:
                self._attend(group[0][0], one, recorded)
            elif kind == NORM:
                self._norm(*group[0])
            elif kind == ROTATE and len(group) == 3:
                self._place(group, one)
            elif kind == ROTATE:
                self._rotate(*group[0])
            elif kind == APPEND:
                self._append(group[0][0], one)
            else:
                self._elementwise(group[0][0])

    def _elementwise(self, step: Step) -> None:
        count = self._rest * step.a
        kind = {SCALE: 0, ADD: 1, CAP: 2}[step.kind]
        source, target = self._registers[step.source], self._registers[step.target]
        kernels.elementwise[(triton.cdiv(count, 1024),)](source, target, count, step.e, KIND=kind, B=1024)

    def _norm(self, step: Step, operands: Operands) -> None:
        weight, shift, _ = operands
        source, target = self._registers[step.source], self._registers[step.target]
        kernels.norm[(self._rest * step.b,)](
            source, target, weight, weight if shift is None else shift, step.a, step.b, step.e, step.f,
            RMS=bool(step.c), SHIFT=shift is not None, B=triton.next_power_of_2(step.a),
        )  # fmt: skip

    def _linear(self, group: list[tuple[Step, Operands]]) -> None:
        (first, operands), rows = group[0], self._rest
        source, tiles = self._registers[first.source], triton.cdiv(rows, TILE)
        targets: list[Any] = [self._registers[step.target] for step, _ in group]
        biased = operands[2] is not None
        weights, biases = [_words(each) for _, each in group], [each[2] if biased else source for _, each in group]
        outputs = [step.b for step, _ in group]
        ends: dict[str, Any] = {"ACTIVATION": first.d, "BIAS": biased}
        shape = _shape(first.c, max(outputs), first.a)
        wide = shape["N"]
        if len(group) == 2:
            kernels.gated[(triton.cdiv(first.b, wide), tiles)](
                source, *weights, *biases, targets[0], first.b, rows, first.a, FULL=first.c == FULL, **ends, **shape,
            )  # fmt: skip
            return
        counts = [triton.cdiv(one, wide) for one in outputs]
        more = 3 - len(group)
        scales = [] if first.c in (FULL, BRAIN) else [[_scales(step, each) for step, each in group]]
        lists: list[list[Any]] = [weights, *scales, biases, targets, outputs]
        pointers = [each for one in lists for each in (*one, *one[:1] * more)]
        if first.c in (FULL, BRAIN):
            ends["FULL"] = first.c == FULL
        PRODUCTS[first.c][(sum(counts), tiles)](
            source, *pointers, counts[0], counts[1] if more == 0 else 0, rows, first.a, INTO=first.extra,
            MAPS=len(group), **ends, **shape,
        )  # fmt: skip

    def _place(self, group: list[tuple[Step, Operands]], one: Occasion) -> None:
        (query, (frequencies, *_)), (key, _), (step, _) = group
        known = self._known[step.c]
        assert known is not None
        keys, values = known
        row, slot, head, _ = keys.stride()
        registers, half = self._registers, query.c // 2
        kernels.place[(self._rest, query.a + 2 * step.a)](
            registers[query.source], registers[key.source], registers[step.target], keys, values, self._told,
            self._told[self._rest :], frequencies, one.time, query.a, step.a, step.b, half, query.e, row, head, slot,
            PAIRS=bool(query.d), HALF=triton.next_power_of_2(max(1, half)), B=triton.next_power_of_2(step.b),
            num_warps=1,
        )  # fmt: skip

    def _rotate(self, step: Step, operands: Operands) -> None:
        half = step.c // 2
        kernels.rotate[(self._rest, step.a)](
            self._registers[step.source], self._told, operands[0], step.a, step.b, half, step.e,
            PAIRS=bool(step.d), B=triton.next_power_of_2(max(1, half)), num_warps=1,
        )  # fmt: skip

    def _append(self, step: Step, one: Occasion) -> None:
        known = self._known[step.c]
        assert known is not None
        keys, values = known
        row, slot, head, _ = keys.stride()
        kernels.append[(self._rest, step.a)](
            self._registers[step.source], self._registers[step.target], keys, values, self._told[self._rest :],
            one.time, step.a, step.b, row, head, slot, B=triton.next_power_of_2(step.b), num_warps=1,
        )  # fmt: skip

    def _attend(self, step: Step, one: Occasion, recorded: bool) -> None:
        known, seeing, rows = self._known[step.c], one.seeing[step.extra], self._rest
        assert known is not None
        keys, values = known
        groups, shared, dim = step.b, step.a // step.b, step.d
        row, first, second, _ = keys.stride()
        crossing = self._caches[step.c].slots != FILLED
        head, slot = (first, second) if crossing else (second, first)
        slots = keys.shape[2] if crossing else FILLED
        most = keys.shape[2] if crossing else keys.shape[1] if recorded else one.filled
        width, shares = max(16, triton.next_power_of_2(dim)), triton.cdiv(most, SHARE)
        tiles, share = triton.cdiv(one.time * shared, TILE), one.batch * groups * shares * TILE * (width + 2)
        at_once = min(tiles, max(1, ROOM // share))
        if self._shares.numel() < at_once * share:
            self._shares = torch.empty(at_once * share, device=self.library.device)
            self._recorded.clear()
        lines = at_once * share // (width + 2)
        found, tops, totals = self._shares[: at_once * share].split([lines * width, lines, lines])
        query, result = self._registers[step.source], self._registers[step.target]
        filled = self._told[rows + one.batch :]
        allowed, bias = seeing.allowed, seeing.bias
        by = [0, 0, 0] if allowed is None else strides(allowed)
        bias_by = [0, 0, 0] if bias is None else strides(bias)
        for begin in range(0, tiles, at_once):
            count = min(at_once, tiles - begin)
            attention.share[(count, one.batch * groups, shares)](
                query, keys, values, self._told, filled, slots, found, tops, totals,
                query if allowed is None else allowed, query if bias is None else bias, one.time, groups, shared, dim,
                row, head, slot, *by, *bias_by, seeing.window, step.e, step.f, begin, count,
                FULL=keys.dtype == torch.float32, SIGHT=seeing.kind, BIAS=bias is not None, CAP=step.f > 0, B=width,
            )  # fmt: skip
            attention.together[(count * TILE, one.batch * groups)](
                result, found, tops, totals, filled, slots, one.time, groups, shared, dim, begin, count, shares,
                B=width, num_warps=1,
            )  # fmt: skip


def grouped(steps: list[tuple[Step, Operands]]) -> list[list[tuple[Step, Operands]]]:
    """Steps that are launched together: three maps of the same vectors, or the two of a gated feed-forward."""
    groups: list[list[tuple[Step, Operands]]] = []
    while steps:
        count = 3 if _alike(steps[:3]) or _placed(steps[:3]) else 2 if _gated(steps[:2]) else 1
        groups.append(steps[:count])
        steps = steps[count:]
    return groups


def _alike(steps: list[tuple[Step, Operands]]) -> bool:
    told = {(one.kind, one.source, one.extra, one.a, one.c, one.d, each[2] is None) for one, each in steps}
    return len(steps) == 3 and len(told) == 1 and (steps[0][0].kind, steps[0][0].extra) == (LINEAR, 0)


def _gated(steps: list[tuple[Step, Operands]]) -> bool:
    told = {(one.kind, one.source, one.target, one.a, one.b, one.c, each[2] is None) for one, each in steps}
    into = [one.extra for one, _ in steps]
    return len(told) == 1 and into == [0, 2] and steps[0][0].kind == LINEAR and steps[0][0].c in (FULL, BRAIN)


def _placed(steps: list[tuple[Step, Operands]]) -> bool:
    told = {(one.b, one.c, one.d, one.e) for one, _ in steps[:2]}
    kinds = [one.kind for one, _ in steps]
    return kinds == [ROTATE, ROTATE, APPEND] and len(told) == 1 and steps[1][0].target == steps[2][0].source


def _shape(store: int, outputs: int, inputs: int) -> dict[str, int]:
    """How a product is cut: as was fastest on an H100. It depends on nothing but the weights."""
    if store == FULL:
        return {"N": 16 if outputs <= 4096 else 32, "K": 64, "num_warps": 4, "num_stages": 4}
    if store == BRAIN:
        if outputs <= 4096:
            return {"N": 16, "K": 256, "num_warps": 2, "num_stages": 5}
        return {"N": 32 if outputs <= 16384 else 64, "K": 128, "num_warps": 2, "num_stages": 3}
    return {"N": 16 if outputs <= 4096 else 32, "K": 64 if store == BYTE else 32, "num_warps": 2, "num_stages": 3}


def _words(operands: Operands) -> Tensor:
    weight = operands[0]
    assert weight is not None
    return weight.view(-1).view(torch.int32) if weight.dtype == torch.uint8 else weight


def _scales(step: Step, operands: Operands) -> Tensor:
    scales = operands[1]
    assert scales is not None
    return scales.view(torch.float32 if step.c == BYTE else torch.float16)
