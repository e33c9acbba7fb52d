"""Keys and values of a layer, spread over the processes of a group: each holds its own share and no other."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.parts.context import Visibility
from formery.parts.kernels.partial import Partial, partial
from formery.parts.messages import Messages, line
from formery.parts.mixing import Mixing
from formery.parts.state import KeyValues, LayerState, Slots, State


class SpreadKeyValues(KeyValues):
    """The share of one process: of all slots those whose number leaves its rank when divided by how many there are.

    So the shares differ by one slot at most however long the text grows, and no slot changes hands then. What the
    slots hold is known to all processes, which make the same calls in the same order.
    """

    def __init__(self, slots: Slots, heads: int, key_width: int, value_width: int, dtype: torch.dtype, line: Messages):
        self.slots, self.line = slots, line
        shape, device = (len(slots.positions), self.share(slots.capacity)), slots.positions.device
        self.keys = torch.zeros(*shape, heads, key_width, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, heads, value_width, dtype=dtype, device=device)

    def share(self, slots: int) -> int:
        """How many of the first `slots` slots lie in this process."""
        return share_of(slots, self.line.rank, self.line.size)

    def append(
        self, keys: Float[Tensor, "batch time head key"], values: Float[Tensor, "batch time head value"]
    ) -> tuple[Float[Tensor, "batch head slot key"], Float[Tensor, "batch head slot value"]]:
        """Stores what falls to this process of the pass's keys and values; returns its whole share."""
        rank, size = self.line.rank, self.line.size
        starts = self.slots.start[:1] if self.slots.level else self.slots.start
        for row, start in enumerate(starts):
            rows = slice(None) if self.slots.level else slice(row, row + 1)
            skipped = (rank - start) % size
            for held, new in ((self.keys, keys), (self.values, values)):
                mine = new[rows, skipped::size]
                at = (start + skipped) // size
                held[rows, at : at + mine.shape[1]] = mine
        filled = self.share(self.slots.filled)
        return self.keys[:, :filled].transpose(1, 2), self.values[:, :filled].transpose(1, 2)

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        moves = [
            (row, start + old, start + new)
            for row, (start, path) in enumerate(zip(self.slots.start, paths, strict=True))
            for new, old in enumerate(path)
            if new != old
        ]
        if moves:
            self._move(*torch.tensor(moves, device=self.keys.device).unbind(1))

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        rows, new = torch.meshgrid(*(torch.arange(size, device=slots.device) for size in slots.shape), indexing="ij")
        moved = slots != new
        self._move(rows[moved], slots[moved], new[moved])

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            held = getattr(self, name)
            larger = held.new_zeros(held.shape[0], self.share(capacity), *held.shape[2:])
            larger[:, : held.shape[1]] = held
            setattr(self, name, larger)

    def _move(self, rows: Int[Tensor, "move"], old: Int[Tensor, "move"], new: Int[Tensor, "move"]) -> None:
        """Copies slot old[i] of row rows[i] to slot new[i], which may lie in another process."""
        rank, size = self.line.rank, self.line.size
        arriving = []
        for turn in range(size):  # to the process `turn` places on, from the one as many places back
            to, source = (rank + turn) % size, (rank - turn) % size
            leaving = (old % size == rank) & (new % size == to)
            coming = (old % size == source) & (new % size == rank)
            given = [held[rows[leaving], old[leaving] // size] for held in (self.keys, self.values)]
            if turn:
                taken = [held.new_empty(int(coming.sum()), *held.shape[2:]) for held in (self.keys, self.values)]
                self.line.exchange(*self._some(given, to), *self._some(taken, source))
            else:
                taken = given
            arriving.append((rows[coming], new[coming] // size, taken))
        for row, slot, taken in arriving:  # only now, since what is written over may have had to leave first
            for held, one in zip((self.keys, self.values), taken, strict=True):
                held[row, slot] = one

    @staticmethod
    def _some(tensors: list[Tensor], other: int) -> tuple[list[Tensor], int]:
        """A message that may be none, where there is nothing to tell."""
        return [one for one in tensors if one.numel()], other


def share_of(slots: int, rank: int, size: int) -> int:
    """How many of the first `slots` slots lie in the process of that rank, of `size`."""
    return (slots - rank + size - 1) // size


@dataclass(frozen=True)
class Share:
    """What one process knows of an attention over keys that all processes of `line` have among them.

    keys, values: its own, of the slots rank, rank + size, rank + 2 · size, …; all else is of all `slots` slots.
    """

    query: Float[Tensor, "batch head time key"]
    keys: Float[Tensor, "batch group own key"]
    values: Float[Tensor, "batch group own value"]
    slots: int
    line: Messages
    allowed: Bool[Tensor, "#batch #head time slot"] | None = None
    bias: Float[Tensor, "#batch #head time slot"] | None = None
    scale: float | None = None
    soft_cap: float | None = None

    def of(
        self, rank: int, keys: Float[Tensor, "batch group share key"], values: Float[Tensor, "batch group share value"]
    ) -> Partial:
        """The partial softmax over the share of the process of that rank, which is here."""
        among = slice(rank, None, self.line.size)
        allowed = None if self.allowed is None else self.allowed[..., among]
        bias = None if self.bias is None else self.bias[..., among]
        return partial(self.query, keys, values, allowed, bias, self.scale, self.soft_cap)

    def own(self) -> Partial:
        """The partial softmax over what is this process's own."""
        return self.of(self.line.rank, self.keys, self.values)


class SpreadAttention(Mixing):
    """Self-attention whose decode state is spread over the processes that have met when it is begun."""

    def start(self, state: State) -> SpreadKeyValues:
        return SpreadKeyValues(state.slots, self.groups, self.dim, self.dim, self.key.dtype, line())

    def mix(
        self,
        query: Float[Tensor, "batch head time dim"],
        key: Float[Tensor, "batch time group dim"],
        value: Float[Tensor, "batch time group dim"],
        own: LayerState,
        visibility: Visibility,
        bias: Float[Tensor, "#batch head time slot"] | None,
    ) -> Float[Tensor, "batch head time dim"]:
        assert isinstance(own, SpreadKeyValues)
        keys, values = own.append(key, value)
        time, slots, allowed = query.shape[2], own.slots.filled, None
        if visibility.causal or visibility.allowed is not None:
            allowed = visibility.tensor(time, slots, query.device)
        share = Share(query, keys, values, slots, own.line, allowed, bias, self.scale, self.soft_cap)
        return self.together(share).to(query.dtype)

    @abstractmethod
    def together(self, share: Share) -> Float[Tensor, "batch head time dim"]:
        """Attention to the keys of all processes."""
