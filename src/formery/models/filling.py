"""Puts stored tensors in the places of a model's weights, with as little memory as that takes.

Where all tensors of a file are wanted as they are stored, they stay in the mapped file. Otherwise they are copied one
by one, and the file is mapped anew every so often, so that its pages do not add up beside the copies.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formery.models.weights import FLOATS, WHOLE, Entry, opened

Shape = tuple[int, ...]
AT_ONCE = 32_000_000  # bytes copied before a file is mapped anew


class Layout:
    """How several of our weights make up one stored tensor; `split` undoes `join`.

    moves: whether numbers that lie side by side in one do not in the other, so that a split is a copy.
    """

    moves = False

    @abstractmethod
    def shape(self, parts: Sequence[Shape]) -> Shape:
        """The shape of the stored tensor (reckoned, since PyTorch's tensors without memory are slow to start)."""

    @abstractmethod
    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The stored tensor."""

    @abstractmethod
    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        """Our tensors, of the shapes of `parts`; views where that can be."""


@dataclass(frozen=True)
class Same(Layout):
    """One of ours, as it is."""

    def shape(self, parts: Sequence[Shape]) -> Shape:
        return parts[0]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def split(self, whole: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
        return [whole]


SAME = Same()


@dataclass(frozen=True)
class Group:
    """A stored tensor, and those of ours that it is made of, in order."""

    stored: str
    ours: tuple[str, ...]
    layout: Layout = SAME

    def shape(self, weights: Mapping[str, Tensor]) -> Shape:
        """The shape that the stored tensor must have."""
        return self.layout.shape([tuple(weights[name].shape) for name in self.ours])


class Places:
    """Where a model keeps each of its weights, also where several parts share one."""

    def __init__(self, model: nn.Module):
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for part in model.modules():
            for key, parameter in part._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((part, key))
        self.weights = dict(model.named_parameters())

    def put(self, name: str, tensor: Tensor) -> None:
        """The weight of that name becomes this tensor."""
        new = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for part, key in self.owners[id(self.weights[name])]:
            part._parameters[key] = new


def fill(
    model: nn.Module,
    groups: Sequence[Group],
    found: Mapping[str, Entry],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Puts the stored tensors in their places; dtype: of the weights that are no codes, None for as they are stored."""
    places = Places(model)
    for path in dict.fromkeys(found[one.stored].path for one in groups):
        own = [one for one in groups if found[one.stored].path == path]
        kinds = {FLOATS[kind] for one in own if (kind := found[one.stored].dtype) not in WHOLE}
        kept = torch.device(device).type == "cpu" and not any(one.layout.moves for one in own)
        kept = kept and (dtype is None or kinds <= {dtype})
        for run in [own] if kept else _runs(own, found):
            with opened(path) as file:
                for one in run:
                    whole = file.get_tensor(found[one.stored].name)
                    parts = one.layout.split(whole, [places.weights[name] for name in one.ours])
                    for name, part in zip(one.ours, parts, strict=True):
                        places.put(name, part if kept else _copy(part, dtype, device))


def _copy(part: Tensor, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    """The tensor in memory of its own, in one step."""
    kind = dtype if dtype is not None and part.is_floating_point() else part.dtype
    return torch.empty(part.shape, dtype=kind, device=device).copy_(part)


def _runs(groups: Sequence[Group], found: Mapping[str, Entry]) -> Iterator[list[Group]]:
    """The groups in runs of so many bytes as may be copied at once."""
    run: list[Group] = []
    size = 0
    for one in groups:
        run.append(one)
        size += found[one.stored].bytes
        if size >= AT_ONCE:
            yield run
            run, size = [], 0
    if run:
        yield run
