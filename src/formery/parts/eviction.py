"""Rules of eviction: which keys and values stay where a head may keep no more than its budget.

A rule gives each slot a score; those with the highest stay, of equal ones the later. It may look at the position of
each slot's token and at its note, which sums the attention that the slot has been paid:

    note = forget · note + weights        (for each query in turn; weights are means over the query heads of a group)
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.parts.part import Described


@dataclass(frozen=True)
class Held:
    """What a rule sees, of one layer.

    positions: of the tokens in the slots, -1: empty; one row for all heads where the rule chooses for all alike.
    notes: of the slots, in the same shape. now: how many tokens each row has read. budget: slots that may stay.
    rows: which of the batch they are.
    """

    positions: Int[Tensor, "batch group slot"]
    notes: Float[Tensor, "batch group slot"]
    now: Int[Tensor, "batch"]
    budget: int
    rows: Int[Tensor, "batch"]

    @property
    def age(self) -> Int[Tensor, "batch group slot"]:
        """How many tokens ago each slot's token was read; 0: the latest."""
        return self.now[:, None, None] - 1 - self.positions


class Eviction(Described):
    """Which slots stay. forget: of the notes, None where they are not needed. apart: each head chooses for itself."""

    forget: ClassVar[float | None] = None
    apart: ClassVar[bool] = False

    @abstractmethod
    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        """The higher, the rather it stays."""

    @property
    def memory(self) -> float | None:
        """What of a note is left after one query; None: no notes are taken."""
        return self.forget


@dataclass(frozen=True)
class Latest(Eviction):
    """The latest tokens stay: a window."""

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return held.positions.float()


@dataclass(frozen=True)
class Sinks(Eviction):
    """The first `first` tokens and the latest ones stay (StreamingLLM: Xiao et al., 2023)."""

    first: int = 4

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return held.positions.float().masked_fill(held.positions < self.first, torch.inf)


@dataclass(frozen=True)
class Anything(Eviction):
    """Tokens drawn at random stay, each set of them equally likely: a fixed draw for each position decides.

    seed: of the draws.
    """

    seed: int = 0

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        # A multiplicative hash: what a row keeps depends on nothing but the positions.
        mixed = (held.positions + 1) * 2654435761 + (self.seed + 1) * 40503
        mixed = ((mixed ^ (mixed >> 15)) * 2246822519) & 0xFFFFFFFF
        mixed = ((mixed ^ (mixed >> 13)) * 3266489917) & 0xFFFFFFFF
        return (mixed >> 9).float()


@dataclass(frozen=True)
class HeavyHitters(Eviction):
    """Half of the budget is the latest tokens, the rest those that were paid most attention (H2O: Zhang et al., 2023).

    recent: that share of the budget.
    """

    recent: float = 0.5
    forget: ClassVar[float | None] = 1.0
    apart: ClassVar[bool] = True

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        return held.notes.masked_fill(held.age < round(self.recent * held.budget), torch.inf)
