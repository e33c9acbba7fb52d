"""Masks: functions `mask(batch, head, query, key) -> bool` of positions, combined with `&`, `|` and `~`.

`query` and `key` are positions in the sequence (not slots of a cache), so that a mask means the same in training,
with padding and while decoding. All four arguments are integer tensors that broadcast against each other.
"""

from abc import abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Int
from torch import Tensor

from formery.parts.part import Described


class Mask(Described):
    """Who may look at whom."""

    @abstractmethod
    def __call__(
        self, batch: Int[Tensor, "..."], head: Int[Tensor, "..."], query: Int[Tensor, "..."], key: Int[Tensor, "..."]
    ) -> Bool[Tensor, "..."]:
        """True where the query at that position sees the key at that position."""

    def __and__(self, other: "Mask") -> "Mask":
        return Both(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Either(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclass(frozen=True)
class Both(Mask):
    """Where both masks allow it."""

    left: Mask
    right: Mask

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left(batch, head, query, key) & self.right(batch, head, query, key)


@dataclass(frozen=True)
class Either(Mask):
    """Where at least one of the masks allows it."""

    left: Mask
    right: Mask

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.left(batch, head, query, key) | self.right(batch, head, query, key)


@dataclass(frozen=True)
class Not(Mask):
    """Where the mask forbids it."""

    mask: Mask

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ~self.mask(batch, head, query, key)


@dataclass(frozen=True)
class Everything(Mask):
    """All see all."""

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query == query) & (key == key)


@dataclass(frozen=True)
class Causal(Mask):
    """Itself and what came before: `key <= query`."""

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query


@dataclass(frozen=True)
class Window(Mask):
    """At most `size - 1` positions away, on either side: `|query - key| < size`."""

    size: int

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.size


@dataclass(frozen=True)
class Dilated(Mask):
    """Every `step`-th position, counted from the query: `(query - key) mod step = 0`."""

    step: int

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key) % self.step == 0


@dataclass(frozen=True)
class Prefix(Mask):
    """The first `length` positions, for everyone (a prefix read in both directions, or attention sinks)."""

    length: int

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.length) & (query == query)


@dataclass(frozen=True)
class BlockCausal(Mask):
    """Its own block of `size` positions, in both directions, and the blocks before it."""

    size: int

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key // self.size <= query // self.size


everything = Everything()
causal = Causal()
window = Window
dilated = Dilated
prefix = Prefix
block_causal = BlockCausal
