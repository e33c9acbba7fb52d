"""The keys and values of some heads of a layer, of which no more than a budget stay.

What is kept does not depend on how the tokens are divided into passes: a row that has read a multiple of `block` tokens
keeps `budget` slots of those it has, and reads on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.parts.eviction import Eviction, Held

LONGEST = 256  # queries that are looked at together where their weights are needed


@dataclass
class Pass:
    """The tokens of a pass, for some heads: -1 in positions is padding."""

    query: Float[Tensor, "batch head time key"]
    key: Float[Tensor, "batch time group key"]
    value: Float[Tensor, "batch time group value"]
    positions: Int[Tensor, "batch time"]


# (query, its positions, keys, their positions, values) -> what is read and, where asked for, the weights.
Reading = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass
class Buffers:
    """What a band holds: filled slots come first, in the order of their positions.

    notes: None where the rule takes none. used: filled slots of each row. read: tokens that each row has read.
    """

    keys: Float[Tensor, "batch group slot key"]
    values: Float[Tensor, "batch group slot value"]
    positions: Int[Tensor, "batch choice slot"]
    notes: Float[Tensor, "batch choice slot"] | None
    used: list[int] = field(default_factory=list)
    read: list[int] = field(default_factory=list)

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [one for one in (self.keys, self.values, self.positions, self.notes) if one is not None]

    def map(self, change: Callable[[Tensor], Tensor]) -> "Buffers":
        """New buffers, each tensor changed."""
        notes = None if self.notes is None else change(self.notes)
        keys, values, positions = change(self.keys), change(self.values), change(self.positions)
        return Buffers(keys, values, positions, notes, list(self.used), list(self.read))


class Band:
    """Heads of a layer with one budget.

    groups: how many key and value heads. capacity: slots to begin with. block: as in `Bounded`.
    """

    def __init__(
        self, batch: int, groups: int, width: int, capacity: int, budget: int, block: int, rule: Eviction, like: Tensor
    ):
        self.most = budget + block
        slots, choices = min(capacity, self.most), groups if rule.apart else 1
        self.rule, self.budget, self.block = rule, budget, block
        self.held = Buffers(
            like.new_zeros(batch, groups, slots, width),
            like.new_zeros(batch, groups, slots, width),
            torch.full((batch, choices, slots), -1, device=like.device, dtype=torch.int32),
            None if rule.memory is None else like.new_zeros(batch, choices, slots, dtype=torch.float32),
            [0] * batch,
            [0] * batch,
        )

    def take(self, new: Pass, reading: Reading) -> Float[Tensor, "batch head time value"]:
        """Reads the tokens of a pass; gives what each query reads."""
        real = (new.positions >= 0).tolist()
        mixed, first, time = [], 0, new.positions.shape[1]
        while first < time:
            end = self._until(real, first, time)
            mixed.append(self._segment(new, slice(first, end), reading))
            self._evict([any(row[first:end]) for row in real])
            first = end
        return torch.cat(mixed, 2) if len(mixed) > 1 else mixed[0]

    def _until(self, real: list[list[bool]], first: int, time: int) -> int:
        """Where the next segment ends: no row gives up slots within it, nor gets more than there is room for."""
        end = time if self.rule.memory is None else min(time, first + LONGEST)
        for row, used, read in zip(real, self.held.used, self.held.read, strict=True):
            for place in range(first, end):
                used, read = used + row[place], read + row[place]
                if row[place] and read % self.block == 0 and used > self.budget:
                    end = place + 1
                    break
        return end

    def _segment(self, new: Pass, part: slice, reading: Reading) -> Float[Tensor, "batch head time value"]:
        positions = new.positions[:, part]
        self._append(new.key[:, part], new.value[:, part], positions)
        held, most = self.held, max(self.held.used)
        # A segment in which all is padding reads an empty slot; nobody looks at what it gets.
        most = max(1, most)
        keys, values, places = held.keys[:, :, :most], held.values[:, :, :most], held.positions[:, :, :most]
        mixed, weights = reading(new.query[:, :, part], positions, keys, places, values)
        if held.notes is not None:
            assert weights is not None and self.rule.memory is not None
            self._note(held.notes[:, :, :most], weights, positions >= 0, self.rule.memory)
        return mixed

    def _append(self, key: Tensor, value: Tensor, positions: Int[Tensor, "batch time"]) -> None:
        held, time = self.held, positions.shape[1]
        counts = (positions >= 0).sum(1).tolist()
        if len(set(held.used)) == 1 and counts == [time] * len(counts):
            place = slice(held.used[0], held.used[0] + time)
            held.keys[:, :, place], held.values[:, :, place] = key.transpose(1, 2), value.transpose(1, 2)
            held.positions[:, :, place] = positions[:, None]
            if held.notes is not None:
                held.notes[:, :, place] = 0
        else:
            real = positions >= 0
            at = torch.tensor(held.used, device=key.device)[:, None] + real.cumsum(1) - 1
            row, column = real.nonzero(as_tuple=True)
            slot = at[row, column]
            held.keys[row, :, slot], held.values[row, :, slot] = key[row, column], value[row, column]
            held.positions[row, :, slot] = positions[row, column][:, None].int()
            if held.notes is not None:
                held.notes[row, :, slot] = 0
        held.used = [used + count for used, count in zip(held.used, counts, strict=True)]
        held.read = [read + count for read, count in zip(held.read, counts, strict=True)]

    def _note(self, notes: Tensor, weights: Tensor, real: Bool[Tensor, "batch time"], forget: float) -> None:
        """`note = forget · note + weights`, for each real query in turn."""
        choices, groups = notes.shape[1], self.held.keys.shape[1]
        batch, heads, time, slots = weights.shape
        means = weights.float().reshape(batch, choices, heads // choices, time, slots).mean(2)
        assert heads % groups == 0
        later = real.int().sum(1, keepdim=True) - real.int().cumsum(1)  # real queries behind each one
        shares = torch.where(real, torch.full_like(later, 1, dtype=torch.float32) * forget**later, 0.0)
        notes.mul_((forget ** real.int().sum(1)).float()[:, None, None])
        notes.add_(torch.einsum("bt,bcts->bcs", shares, means))

    def _evict(self, moved: Sequence[bool]) -> None:
        """Rows that have come to the end of a block keep the budget's best slots, in the order of their positions."""
        held = self.held
        due = [
            new and read % self.block == 0 and used > self.budget
            for new, read, used in zip(moved, held.read, held.used, strict=True)
        ]
        if not any(due):
            return
        rows = torch.tensor([number for number, one in enumerate(due) if one], device=held.keys.device)
        most = max(held.used)
        kept = self._kept(rows, most)
        groups = held.keys.shape[1]
        each = kept.expand(-1, groups, -1)
        for one in (held.keys, held.values):
            one[rows, :, : self.budget] = one[rows].gather(2, each[..., None].expand(-1, -1, -1, one.shape[-1]))
        for noted in (held.positions, held.notes):
            if noted is not None:
                noted[rows, :, : self.budget] = noted[rows].gather(2, kept)
        held.positions[rows, :, self.budget :] = -1
        held.used = [self.budget if one else used for one, used in zip(due, held.used, strict=True)]

    def _kept(self, rows: Int[Tensor, "row"], most: int) -> Int[Tensor, "row choice budget"]:
        """The slots that stay, in order."""
        held = self.held
        positions = held.positions[rows, :, :most].long()
        notes = positions.float() if held.notes is None else held.notes[rows, :, :most]
        now = torch.tensor(held.read, device=positions.device)[rows]
        scores = self.rule.scores(Held(positions, notes, now, self.budget, rows)).masked_fill(positions < 0, -torch.inf)
        # A stable order of the slots from the last to the first: of equal scores the later stays.
        best = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[..., : self.budget]
        return (most - 1 - best).sort(-1).values

    def before(self) -> Buffers:
        """What is held now, to come back to."""
        most = max(1, max(self.held.used, default=0))
        return self.held.map(lambda one: one[:, :, :most].clone())

    def back(self, before: Buffers) -> None:
        """Holds again what was held then."""
        for one, old in zip(self.held.tensors(), before.tensors(), strict=True):
            one[:, :, : old.shape[2]] = old
        self.held.positions[:, :, before.positions.shape[2] :] = -1
        self.held.used, self.held.read = list(before.used), list(before.read)

    def grow(self, capacity: int) -> None:
        """Makes room for that many slots, as far as they can be needed."""
        more = min(capacity, self.most) - self.held.keys.shape[2]
        if more > 0:
            used, read = self.held.used, self.held.read
            self.held = self.held.map(
                lambda one: torch.cat((one, one.new_zeros(*one.shape[:2], more, *one.shape[3:])), 2)
            )
            self.held.positions[:, :, -more:] = -1
            self.held.used, self.held.read = used, read

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        """Keeps these rows, in this order."""
        used, read = ([one[row] for row in rows.tolist()] for one in (self.held.used, self.held.read))
        self.held = self.held.map(lambda one: one[rows])
        self.held.used, self.held.read = used, read
