"""A text in chunks: which tokens stand before a model at once, which are its past, and what is kept of them."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention


@dataclass(frozen=True)
class Chunks:
    """How a text is cut: chunks of `size` tokens; a token sees the rest of its own chunk and the `near - 1` before it.

    Within the first `window` tokens nothing is past: all that was read is still seen.
    """

    window: int
    size: int
    near: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.window % self.size:
            raise FormeryError(f"chunks of {self.size} tokens do not fill a window of {self.window}.")
        if not 1 <= self.near <= self.window // self.size:
            raise FormeryError(f"{self.near} chunks of {self.size} tokens do not fit into a window of {self.window}.")

    def start(self, position: int) -> int:
        """Where what the token at that position sees directly begins; all before it is past."""
        return 0 if position < self.window else (position // self.size - self.near + 1) * self.size

    def stretches(self, begin: int, end: int) -> Iterable[tuple[int, int]]:
        """The positions from `begin` to `end`, cut where `start` changes."""
        while begin < end:
            next_ = max(self.window, (begin // self.size + 1) * self.size)
            yield begin, min(next_, end)
            begin = next_


Entry = Float[Tensor, "batch slot group dim"]


@dataclass
class Kept:
    """Keys and values of each attention, in the order in which the tokens came; never changed in place."""

    entries: dict[Attention, tuple[Entry, Entry]] = field(default_factory=dict)

    def append(self, attention: Attention, keys: Entry, values: Entry) -> tuple[Entry, Entry]:
        """Adds a pass's; returns all there are."""
        if attention in self.entries:
            old = self.entries[attention]
            keys, values = torch.cat((old[0], keys), 1), torch.cat((old[1], values), 1)
        self.entries[attention] = keys, values
        return keys, values

    @property
    def length(self) -> int:
        """How many tokens there are."""
        return next((keys.shape[1] for keys, _ in self.entries.values()), 0)

    def cut(self, length: int) -> Self:
        """The first so many tokens."""
        cut = {one: (keys[:, :length], values[:, :length]) for one, (keys, values) in self.entries.items()}
        return type(self)(cut)

    def rows(self, number: int) -> Self:
        """The first so many rows."""
        return type(self)({one: (keys[:number], values[:number]) for one, (keys, values) in self.entries.items()})

    def joined(self, other: Self) -> Self:
        """Its rows, and behind them the other's."""
        made = {}
        for one, (keys, values) in self.entries.items():
            keys_, values_ = other.entries[one]
            made[one] = torch.cat((keys, keys_)), torch.cat((values, values_))
        return type(self)(made)

    def tensors(self) -> list[Tensor]:
        """Every tensor held."""
        return [one for pair in self.entries.values() for one in pair]
