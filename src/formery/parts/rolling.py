"""The keys and values that a sliding window can still see: a decode state that does not grow with the text.

What no later query can see is dropped when room is needed, a stretch at a time, so that a step costs the same at any
place of the text. Everything is held that a query at the next position, or at one a little earlier, may look at.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.context import Context
from formery.parts.state import Slots

BACK = 16  # tokens before the latest pass that can be taken back at least


class RollingKeyValues:
    """Keys and values of the last positions, of one attention layer: `span` of them, and some to go back.

    Laid out [batch, place, head, dim]; all rows write at the same places. positions: of what lies there, -1: nothing.
    slots_of: the slot that each has in the state. floor: of each row, the position from which on all is held. All of
    the latest pass, and the `BACK` tokens before it, can be taken back; the size depends on the span and on the length
    of the latest pass only.
    """

    def __init__(self, slots: Slots, heads: int, key_width: int, value_width: int, dtype: torch.dtype, span: int):
        batch, device = len(slots.used), slots.positions.device
        shape = batch, span - 1 + 2 * BACK
        self.slots, self.span = slots, span
        self.keys = torch.zeros(*shape, heads, key_width, dtype=dtype, device=device)
        self.values = torch.zeros(*shape, heads, value_width, dtype=dtype, device=device)
        self.positions: Int[Tensor, "batch place"] = torch.full(shape, -1, device=device)
        self.slots_of: Int[Tensor, "batch place"] = torch.zeros(shape, dtype=torch.long, device=device)
        self.used, self.latest = 0, 0  # places, and those of the latest pass
        self.floor = [0] * batch

    def append(
        self,
        keys: Float[Tensor, "batch time head key"],
        values: Float[Tensor, "batch time head value"],
        positions: Int[Tensor, "batch time"],
    ) -> tuple[Float[Tensor, "batch head place key"], Float[Tensor, "batch head place value"]]:
        """Stores this pass's keys and values; returns all that is held.

        Raises FormeryError where a token stands so far back that what it would see is gone.
        """
        time = keys.shape[1]
        self._reserve(time)
        if any(self.floor):
            first = positions.masked_fill(positions < 0, max(self.slots.lengths)).amin(1).tolist()
            self._check([min(one, length) for one, length in zip(first, self.slots.lengths, strict=True)])
        here = slice(self.used, self.used + time)
        self.keys[:, here], self.values[:, here], self.positions[:, here] = keys, values, positions
        start = torch.tensor(self.slots.start, device=positions.device)[:, None]
        self.slots_of[:, here] = start + torch.arange(time, device=positions.device)
        self.used, self.latest = self.used + time, time
        return self.keys[:, : self.used].transpose(1, 2), self.values[:, : self.used].transpose(1, 2)

    def context(self, whole: Context) -> Context:
        """The pass over what is held instead of all slots."""
        held = self.positions[:, : self.used]
        visible: Bool[Tensor, "batch time place"] | None = None
        if whole.visible is not None:
            slots = self.slots_of[:, : self.used].clamp(max=whole.visible.shape[2] - 1)
            visible = whole.visible.take_along_dim(slots[:, None], 2)
        return Context(whole.positions, held, visible)

    def _reserve(self, time: int) -> None:
        """Makes room for `time` more places; where it is short, what lies below what must be held is dropped."""
        wanted, capacity = self.span - 1 + BACK + max(BACK, time), self.positions.shape[1]
        if self.used + time <= capacity <= wanted:
            return
        held = self.positions[:, : self.used]
        ends = held.amax(1).tolist() if self.used else self.floor
        self.floor = [max(old, end + 1 - BACK - self.span + 1, 0) for old, end in zip(self.floor, ends, strict=True)]
        stays = held >= torch.tensor(self.floor, device=held.device)[:, None]
        most = int(stays.sum(1).amax()) if self.used else 0
        order = (~stays).int().argsort(dim=1, stable=True)[:, :most]
        capacity = max(wanted, most + time)
        for name in ("keys", "values", "positions", "slots_of"):
            old: Tensor = getattr(self, name)
            new = old.new_full((len(old), capacity, *old.shape[2:]), -1 if name == "positions" else 0)
            new[:, :most] = old.take_along_dim(order.view(*order.shape, *[1] * (old.dim() - 2)), 1)
            setattr(self, name, new)
        self.positions[:, :most].masked_fill_(~stays.take_along_dim(order, 1), -1)
        self.used = most

    def _check(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where a token at that position would look below what is held."""
        for row, (length, floor) in enumerate(zip(lengths, self.floor, strict=True)):
            if floor and 0 < length < floor + self.span - 1:
                raise FormeryError(
                    f"row {row} cannot go on from {length} tokens: a window of {self.span} has kept only what is "
                    f"needed from {floor + self.span - 1} of its {self.slots.lengths[row]} on."
                )

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        for name in ("keys", "values", "positions", "slots_of"):
            setattr(self, name, getattr(self, name)[rows])
        self.floor = [self.floor[row] for row in rows.tolist()]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where that is too far back, and not the very beginning."""
        self._check(lengths)

    def check_keep(self, counts: Sequence[int]) -> None:
        """It can always be done."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Forgets tokens at positions from lengths[row] on."""
        self.positions.masked_fill_(self.positions >= torch.tensor(lengths, device=self.positions.device)[:, None], -1)
        self.floor = [floor if length else 0 for floor, length in zip(self.floor, lengths, strict=True)]

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """It can always be done."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Forgets what of the latest pass is not on the paths; the others stay at their places."""
        begin = self.used - self.latest
        for row, (start, path) in enumerate(zip(self.slots.start, paths, strict=True)):
            places = begin + torch.tensor(list(path), dtype=torch.long, device=self.positions.device)
            kept = self.positions[row, places]
            self.positions[row, begin : self.used] = -1
            self.positions[row, places] = kept
            self.slots_of[row, places] = start + torch.arange(len(path), device=places.device)

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Follows its tokens to their new slots; those that were dropped are dropped here."""
        if slots.shape[1] == 0:
            self.used = 0
            return
        held = self.slots_of[:, : self.used].clamp(max=slots.shape[1] - 1)
        moved = slots.argsort(1).take_along_dim(held, 1)
        self.slots_of[:, : self.used] = moved
        gone = self.slots.positions.take_along_dim(moved, 1) < 0
        self.positions[:, : self.used].masked_fill_(gone, -1)

    def grow(self, capacity: int) -> None:
        """Nothing to do: what is held does not grow with the text."""

    def tensors(self) -> list[Tensor]:
        return [self.keys, self.values, self.positions, self.slots_of]
