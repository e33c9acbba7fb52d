"""What one pass over a model knows besides the hidden vectors: positions, who is visible, the decode state."""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from formery.parts.mask import Causal, Everything, Mask

if TYPE_CHECKING:
    from formery.parts.state import LayerState, Remembering, State

Value = TypeVar("Value")


@dataclass(frozen=True)
class Visibility:
    """Which keys each query of this pass may look at.

    allowed: the full answer as a tensor, or None where a kernel needs no tensor because the answer is
    `causal` (a square lower triangle) or everything.
    """

    allowed: Bool[Tensor, "#batch #head time slot"] | None = None
    causal: bool = False

    def tensor(self, time: int, slots: int, device: torch.device) -> Bool[Tensor, "#batch #head time slot"]:
        """The answer as a tensor in any case."""
        if self.allowed is not None:
            return self.allowed
        full = torch.ones(1, 1, time, slots, dtype=torch.bool, device=device)
        return full.tril() if self.causal else full


class Context:
    """One pass over tokens; what its parts work out once is shared by all of them.

    positions: of each token; -1 marks padding, which nobody sees.
    key_positions: of each slot that keys may lie in; the same as `positions` without a state.
    visible: further restriction by index (packed segments, the ancestors in a tree of drafts).
    even: every row holds the same positions 0, 1, 2, … without gaps, so one row stands for all.
    full: no slot is padding (as where the rows are even).
    memory, memory_positions: what cross-attention reads.
    types: which of several texts each token is of, for models that ask.
    """

    def __init__(
        self,
        positions: Int[Tensor, "batch time"],
        key_positions: Int[Tensor, "batch slot"] | None = None,
        visible: Bool[Tensor, "batch time slot"] | None = None,
        even: bool = False,
        full: bool = False,
        state: "State | None" = None,
        memory: "Context | None" = None,
        memory_hidden: Tensor | None = None,
        types: Int[Tensor, "batch time"] | None = None,
    ):
        self.positions = positions
        self.key_positions = positions if key_positions is None else key_positions
        self.visible, self.even, self.state = visible, even and visible is None, state
        self.full = (even or full) and visible is None
        self.memory, self.memory_hidden, self.types = memory, memory_hidden, types
        self._known: dict[Hashable, Any] = {}
        self.turns: Counter[Any] = Counter()  # how often each part that remembers ran in this pass

    def once(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """`make()` at the first call with that key, the same value at later ones."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def remembered(self, part: "Remembering") -> "LayerState | None":
        """What `part` remembers of earlier passes, for as many times as it runs in each; None without a state."""
        if self.state is None:
            return None
        self.turns[part] += 1
        return self.state.of(part, self.turns[part] - 1)

    def visibility(self, mask: Mask, heads: int) -> Visibility:
        """Who sees whom under `mask`, in each of so many heads, in this pass."""
        return self.once((mask, heads), lambda: self._visibility(mask, heads))

    def _visibility(self, mask: Mask, heads: int) -> Visibility:
        (rows, time), slots, device = self.positions.shape, self.key_positions.shape[1], self.positions.device
        if self.full and isinstance(mask, Everything):
            return Visibility()
        if self.even and isinstance(mask, Causal) and time in (1, slots):
            return Visibility(causal=time > 1)
        distinct = slice(0, 1) if self.even else slice(None)
        query, key = self.positions[distinct][:, None, :, None], self.key_positions[distinct][:, None, None, :]
        batch = torch.arange(rows, device=device)[:, None, None, None]
        head = torch.arange(heads, device=device)[:, None, None]
        allowed = mask(batch, head, query, key)
        if not self.even:
            allowed = allowed & (key >= 0)
            if self.visible is not None:
                allowed = allowed & self.visible[:, None]
        # Seeing nothing would give 0/0: a token then sees itself; what padding gets is never read.
        allowed = allowed | ~allowed.any(-1, keepdim=True) & ((key == query) | (query < 0))
        return Visibility(allowed)
