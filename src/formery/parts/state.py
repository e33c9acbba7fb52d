"""Decode state as a value that can be taken back: what a model remembers of the tokens it has read.

Each row of a batch has its own length. Tokens lie in numbered *slots*; a slot knows the position of its token
(-1: empty), so rows may be ragged, padded on either side, thinned out (`keep`) or cut back (`rollback`).
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError


class LayerState(Protocol):
    """What one layer remembers; all layers of a state share its slots."""

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keeps these rows of the batch, in this order (rows may repeat)."""

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where `rollback` could not be done; changes nothing."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where it cannot be left with counts[row] of its tokens, any of them; changes nothing."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets tokens at positions from lengths[row] on."""

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Raises FormeryError where `settle` could not be done; changes nothing."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the latest pass, keeps the tokens at the places paths[row], moved up to its first places."""

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Moves slot slots[row, j] to slot j."""

    def grow(self, capacity: int) -> None:
        """Makes room for that many slots."""

    def tensors(self) -> list[Tensor]:
        """Every tensor held, for accounting."""


class Remembering(Protocol):
    """A part that remembers something while decoding."""

    def start(self, state: "State") -> LayerState:
        """What it remembers before the first token."""


class Slots:
    """Where the tokens of each row lie, and at which positions."""

    def __init__(self, batch: int, capacity: int, device: torch.device | None = None):
        self.positions: Int[Tensor, "batch capacity"] = torch.full((batch, capacity), -1, device=device)
        self.used = [0] * batch
        self.lengths = [0] * batch
        self.ordered = True  # slot j holds position j in every row, but for padding behind the last token
        self.start = [0] * batch  # where the tokens of the pass under way begin
        self.before = True  # whether it was `ordered` before that pass

    @property
    def capacity(self) -> int:
        """How many slots there is room for."""
        return self.positions.shape[1]

    @property
    def filled(self) -> int:
        """How many slots the fullest row uses."""
        return max(self.used, default=0)

    @property
    def level(self) -> bool:
        """Whether the pass under way writes at the same slots in every row."""
        return min(self.start, default=0) == max(self.start, default=0)

    @property
    def even(self) -> bool:
        """Whether every row holds just the positions 0, 1, 2, … up to the same length."""
        return self.ordered and self.used == self.lengths and min(self.used) == max(self.used)

    def extend(self, positions: Int[Tensor, "batch time"] | None, time: int) -> Int[Tensor, "batch time"]:
        """Takes the next `time` slots of each row; returns the positions of the tokens in them."""
        self.start, self.before = list(self.used), self.ordered and self.used == self.lengths
        device = self.positions.device
        # Padding left in the middle (used > lengths) puts all later tokens out of order.
        self.ordered = self.ordered and self.used == self.lengths and (positions is None or self._continues(positions))
        if positions is None:
            if min(self.lengths, default=0) == max(self.lengths, default=0):
                first = max(self.lengths, default=0)
                next_ = torch.arange(first, first + time, device=device).expand(len(self.lengths), time)
            else:
                next_ = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(time, device=device)
            self.lengths = [length + time for length in self.lengths]
        else:
            next_ = positions
            tops = positions.amax(1).tolist()
            self.lengths = [max(length, top + 1) for length, top in zip(self.lengths, tops, strict=True)]
        self.write(self.positions, next_)
        self.used = [used + time for used in self.used]
        return next_

    def write(self, buffer: Tensor, new: Tensor) -> None:
        """Puts `new` [batch, time, …] into the slots of the pass under way of `buffer` [batch, capacity, …]."""
        time = new.shape[1]
        if self.level:
            start = self.start[0] if self.start else 0
            buffer[:, start : start + time] = new
        else:
            rows = torch.arange(len(self.start), device=buffer.device)[:, None]
            slots = torch.tensor(self.start, device=buffer.device)[:, None] + torch.arange(time, device=buffer.device)
            buffer[rows, slots] = new

    def rollback(self, lengths: Sequence[int]) -> None:
        """Empties the slots of positions from lengths[row] on (and trailing padding)."""
        if self.ordered:
            kept = [min(used, length) for used, length in zip(self.used, lengths, strict=True)]
            for row, (used, keep) in enumerate(zip(self.used, kept, strict=True)):
                if keep < used:
                    self.positions[row, keep:used] = -1
            self.used = kept
        else:
            bound = torch.tensor(lengths, device=self.positions.device)[:, None]
            self.positions.masked_fill_(self.positions >= bound, -1)
            slot = torch.arange(1, self.capacity + 1, device=self.positions.device)
            self.used = (slot * (self.positions >= 0)).amax(1).tolist()
        self.lengths = [min(old, new) for old, new in zip(self.lengths, lengths, strict=True)]
        self.ordered = self.ordered or self._in_order()

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Empties the slots of the latest pass but those at the places paths[row], which move up to its first ones."""
        lengths = []
        for row, (start, path) in enumerate(zip(self.start, paths, strict=True)):
            own, kept = self.positions[row], start + len(path)
            if kept < self.used[row]:
                if not self.before:
                    own[start:kept] = own[[start + place for place in path]]
                elif path and path[-1] >= len(path):  # some move up
                    own[start:kept] = torch.arange(start, kept, device=own.device)
                own[kept : self.used[row]] = -1
                self.used[row] = kept
            # Where all was in order, so is a path, which goes on from there.
            lengths.append(kept if self.before else int(own[:kept].amax()) + 1)
        self.lengths, self.ordered = lengths, self.before

    def keep(self, slots: Bool[Tensor, "batch slot"]) -> Int[Tensor, "batch filled"]:
        """Empties the slots that are False and moves the others up; returns the slots in their new order."""
        filled = self.filled
        positions, kept = self.positions[:, :filled], self.kept(slots)
        order = (~kept).int().argsort(dim=1, stable=True)
        counts = kept.sum(1)
        behind = torch.arange(filled, device=slots.device) >= counts[:, None]
        self.positions[:, :filled] = positions.gather(1, order).masked_fill(behind, -1)
        self.used = counts.tolist()
        self.ordered = self._in_order()
        return order

    def kept(self, slots: Bool[Tensor, "batch slot"]) -> Bool[Tensor, "batch filled"]:
        """Which of the filled slots hold a token and are True."""
        return slots[:, : self.filled].bool() & (self.positions[:, : self.filled] >= 0)

    def _in_order(self) -> bool:
        """Whether slot j of each row holds position j, from the first to the last."""
        used, slot = (torch.tensor(one, device=self.positions.device) for one in (self.used, range(self.filled)))
        inside = slot < used[:, None]
        return self.used == self.lengths and bool(((self.positions[:, : self.filled] == slot) | ~inside).all())

    def _continues(self, positions: Int[Tensor, "batch time"]) -> bool:
        """Whether these positions are the next ones of each row, padding only behind them."""
        time = positions.shape[1]
        expected = torch.tensor(self.used, device=positions.device)[:, None] + torch.arange(
            time, device=positions.device
        )
        real = positions >= 0
        trailing = bool((real.int().diff(dim=1) <= 0).all()) if time > 1 else True
        return trailing and bool(((positions == expected) | ~real).all())


class KeyValues:
    """The keys and values of one attention layer, preallocated.

    Laid out [batch, capacity, head, dim] so that a token's entry is contiguous; read as [batch, head, slot, dim].
    """

    def __init__(self, slots: Slots, heads: int, key_width: int, value_width: int, dtype: torch.dtype):
        shape, device = slots.positions.shape, slots.positions.device
        self.slots = slots
        self.keys = torch.zeros(*shape, heads, key_width, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, heads, value_width, dtype=dtype, device=device)

    def append(
        self, keys: Float[Tensor, "batch time head key"], values: Float[Tensor, "batch time head value"]
    ) -> tuple[Float[Tensor, "batch head slot key"], Float[Tensor, "batch head slot value"]]:
        """Stores this pass's keys and values; returns all there are, over the filled slots."""
        self.slots.write(self.keys, keys)
        self.slots.write(self.values, values)
        filled = self.slots.filled
        return self.keys[:, :filled].transpose(1, 2), self.values[:, :filled].transpose(1, 2)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can always be done."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """It can always be done."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Nothing to do: an emptied slot is not seen, and is written over."""

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """It can always be done."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        for row, (start, path) in enumerate(zip(self.slots.start, paths, strict=True)):
            first = next((place for place, old in enumerate(path) if old != place), len(path))
            if first < len(path):
                old = [start + place for place in path[first:]]
                for one in (self.keys, self.values):
                    one[row, start + first : start + len(path)] = one[row, old]

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.keys[:, : slots.shape[1]] = self.keys[rows, slots]
        self.values[:, : slots.shape[1]] = self.values[rows, slots]

    def grow(self, capacity: int) -> None:
        self.keys, self.values = _grown(self.keys, capacity), _grown(self.values, capacity)

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


class Memory:
    """Keys and values of a text that cross-attention reads; it stays as it is while tokens come and go."""

    def __init__(self, keys: Float[Tensor, "batch head slot key"], values: Float[Tensor, "batch head slot value"]):
        self.keys, self.values = keys, values

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can always be done."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """It can always be done."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Nothing to do: the memory does not depend on the tokens."""

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """It can always be done."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Nothing to do: the memory does not depend on the tokens."""

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to do: the memory has no token slots."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: the memory has no token slots."""

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values]


class State:
    """All that a model remembers of a batch of sequences while it decodes them."""

    def __init__(self, batch: int, capacity: int, device: torch.device | None = None):
        self.slots = Slots(batch, max(1, capacity), device)
        self.layers: dict[tuple[object, int], LayerState] = {}
        self.memory_positions: Int[Tensor, "batch source"] | None = None
        # What an encoder made, where it was asked for: no layer of the model itself reads it again.
        self.encoded: Float[Tensor, "batch source width"] | None = None
        # The layers, and the way to logits, as the compiled kernels run them, where they do.
        self.pieces: Sequence[Any] | None = None
        self.out: Any = None
        # The way into the layers and they themselves, where vectors of two kinds come in and the kernels run it all.
        self.entry: Any = None
        self._vouched: dict[tuple[object, int], LayerState] | None = None

    @property
    def exact(self) -> bool:
        """Whether a token's logits have the same bits however many tokens and rows are computed together."""
        return self._vouched == self.layers

    def vouch(self, exact: bool = True) -> None:
        """Says whether it is exact, for as long as its layers remember as they do now."""
        self._vouched = dict(self.layers) if exact else None

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return len(self.slots.used)

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has read: the position of its next one."""
        return list(self.slots.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all storage held, measured, a storage that is shared counted once."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer.tensors()]
        tensors += [one for one in (self.slots.positions, self.memory_positions, self.encoded) if one is not None]
        storages = [tensor.untyped_storage() for tensor in tensors]
        # An address would not do: on the meta device, where a state can be measured too, all are 0.
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def of(self, part: Remembering, turn: int = 0) -> LayerState:
        """What `part` remembers of its first run (turn 0) in a pass, its second, …: weights may be shared in depth."""
        if (part, turn) not in self.layers:
            self.layers[part, turn] = part.start(self)
        return self.layers[part, turn]

    def reserve(self, time: int) -> None:
        """Makes sure that each row has room for `time` more tokens, at least doubling what is too small."""
        needed = self.slots.filled + time
        if needed > self.slots.capacity:
            capacity = max(needed, 2 * self.slots.capacity)
            self.slots.positions = _grown(self.slots.positions, capacity, -1)
            for layer in self.layers.values():
                layer.grow(capacity)

    def rollback(self, lengths: Sequence[int]) -> None:
        """Takes tokens back: row i keeps those at positions below lengths[i].

        Raises FormeryError, and changes nothing, where a row has fewer tokens than it is asked to keep, or a layer
        cannot go back that far.
        """
        if len(lengths) != self.batch or any(a > b or a < 0 for a, b in zip(lengths, self.slots.lengths, strict=True)):
            raise FormeryError(f"cannot roll a state of lengths {self.lengths} back to {list(lengths)}.")
        for layer in self.layers.values():
            layer.check_rollback(lengths)
        self.slots.rollback(lengths)
        for layer in self.layers.values():
            layer.rollback(lengths)

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Of the latest pass, row i keeps the tokens at the places paths[i] and forgets the others.

        A path goes down a tree of drafts, each token at the position after the last. Raises FormeryError, and changes
        nothing, where a layer cannot.
        """
        if all(list(path) == list(range(used - start)) for path, start, used in self._latest(paths)):
            return
        for layer in self.layers.values():
            layer.check_settle(paths)
        for layer in self.layers.values():
            layer.settle(paths)
        self.slots.settle(paths)

    def _latest(self, paths: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], int, int]]:
        """Each path, and between which slots the latest pass of its row lies."""
        return zip(paths, self.slots.start, self.slots.used, strict=True)

    def select(self, rows: Sequence[int]) -> None:
        """Keeps these rows of the batch, in this order; a row may be taken several times."""
        if list(rows) == list(range(self.batch)):
            return
        index = torch.tensor(list(rows), dtype=torch.long, device=self.slots.positions.device)
        slots = self.slots
        slots.positions = slots.positions[index]
        slots.used, slots.lengths = [slots.used[row] for row in rows], [slots.lengths[row] for row in rows]
        slots.start = [slots.start[row] for row in rows]
        if self.memory_positions is not None:
            self.memory_positions = self.memory_positions[index]
        if self.encoded is not None:
            self.encoded = self.encoded[index]
        for layer in self.layers.values():
            layer.select(index)

    def keep(self, slots: Bool[Tensor, "batch slot"]) -> None:
        """Drops the slots that are False; the others move up, with the positions they had.

        Later tokens do not see what was dropped; positions go on counting as if it were still there. Raises
        FormeryError, and changes nothing, where a layer cannot do without a single token.
        """
        counts = self.slots.kept(slots).sum(1).tolist()
        for layer in self.layers.values():
            layer.check_keep(counts)
        order = self.slots.keep(slots)
        for layer in self.layers.values():
            layer.gather(order)


def _grown(tensor: Tensor, capacity: int, fill: int = 0) -> Tensor:
    larger = tensor.new_full((tensor.shape[0], capacity, *tensor.shape[2:]), fill)
    larger[:, : tensor.shape[1]] = tensor
    return larger
