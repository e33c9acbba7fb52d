"""Where each of our weights lies in a published checkpoint: names with `*` for numbers, and layouts.

A family's table goes from our modules to theirs: `{"layers.*.sublayers.0.norm": "model.layers.*.input_layernorm"}`.
Below a module `weight` is `weight` and our `shift` is their `bias`; a weight that is named otherwise is listed whole.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.filling import SAME, Group, Layout, Shape


@dataclass(frozen=True)
class Shaped(Layout):
    """The same numbers in the same order, in their shape (-1: whatever is left)."""

    sizes: tuple[int, ...]

    def shape(self, parts: Sequence[Shape]) -> Shape:
        known = -math.prod(self.sizes) if -1 in self.sizes else 1
        return tuple(math.prod(parts[0]) // known if size == -1 else size for size in self.sizes)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(self.sizes)

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return [whole.reshape(parts[0].shape)]


@dataclass(frozen=True)
class Stacked(Layout):
    """Rows of one under rows of the next."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return sum(part[0] for part in parts), *parts[0][1:]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts))

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return list(whole.split([len(part) for part in parts]))


@dataclass(frozen=True)
class ByHead(Layout):
    """Of each head in turn: its rows of the first, of the second, …."""

    moves = True
    heads: int

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return sum(part[0] for part in parts), *parts[0][1:]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        by_head = [part.reshape(self.heads, -1, *part.shape[1:]) for part in parts]
        return torch.cat(by_head, 1).reshape(-1, *parts[0].shape[1:])

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        rows = [len(part) // self.heads for part in parts]
        by_head = whole.reshape(self.heads, -1, *whole.shape[1:]).split(rows, 1)
        return [one.reshape(part.shape) for one, part in zip(by_head, parts, strict=True)]


@dataclass(frozen=True)
class Transposed(Layout):
    """Inputs before outputs."""

    moves = True
    inner: Layout = SAME

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return self.inner.shape(parts)[::-1]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        whole = self.inner.join(parts)
        return whole.T if whole.ndim == 2 else whole

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return self.inner.split(whole.T if whole.ndim == 2 else whole, parts)


@dataclass(frozen=True)
class Where:
    """A place in a published checkpoint: the tensor (or module), which part of it, and how it is laid out."""

    name: str
    layout: Layout = SAME
    part: int = 0


Names = dict[str, "str | Where"]


class NoPlace(FormeryError):
    """A weight that checkpoints of a family have no place for."""

    def __init__(self, weight: str):
        super().__init__(f"{weight} has no place in a checkpoint of this family.")
        self.weight = weight


def within(ours: str, theirs: str, **names: str) -> dict[str, str | Where]:
    """The same names below two modules: `within("a", "b", query="q_proj")` is `{"a.query": "b.q_proj"}`."""
    return {f"{ours}.{one}": f"{theirs}.{other}" for one, other in names.items()}


def fused(ours: str, theirs: str, layout: Layout, *parts: str) -> dict[str, str | Where]:
    """Parts of ours that are one module of theirs."""
    return {f"{ours}.{one}": Where(theirs, layout, place) for place, one in enumerate(parts)}


def groups(model: nn.Module, names: Names) -> list[Group]:
    """Their tensors, for every weight of the model; raises NoPlace for a weight that has none there."""
    patterns = [(re.compile(re.escape(ours).replace(r"\*", r"(\d+)")), where) for ours, where in names.items()]
    found: dict[str, list[tuple[int, str, Layout]]] = {}
    for name, _ in model.named_parameters():
        where = _find(name, patterns)
        if where is None:
            raise NoPlace(name)
        found.setdefault(where.name, []).append((where.part, name, where.layout))
    return [
        Group(theirs, tuple(name for _, name, _ in sorted(parts, key=lambda one: one[0])), parts[0][2])
        for theirs, parts in found.items()
    ]


def _numbered(pattern: str, numbers: Sequence[str]) -> str:
    """The name with its stars replaced, one after the other."""
    for number in numbers:
        pattern = pattern.replace("*", number, 1)
    return pattern


def _find(name: str, patterns: Sequence[tuple[re.Pattern[str], Any]]) -> Where | None:
    module, _, own = name.rpartition(".")
    for candidate, ending in ((name, ""), (module, {"weight": ".weight", "shift": ".bias"}.get(own))):
        for pattern, where in patterns:
            match = pattern.fullmatch(candidate)
            if match and ending is not None:
                at = where if isinstance(where, Where) else Where(where)
                return Where(_numbered(at.name, match.groups()) + ending, at.layout, at.part)
    return None
