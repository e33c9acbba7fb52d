"""Tokens that are read several times: who sees their copies, and for how long the copies' keys and values are kept.

With each token read `repeats` times, time `number` of the token at position `place` stands at
`repeats · place + number`; number 0 is the original, the others are its copies. In a pass all originals come first,
then the copies, those of one token side by side.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention
from formery.parts.mask import Mask
from formery.parts.state import KeyValues, LayerState, Slots, State


class Repetition(Mask):
    """A mask over originals and copies that also says which copies outlive their pass."""

    repeats: int

    @property
    @abstractmethod
    def keeps(self) -> bool:
        """Whether any do."""

    @abstractmethod
    def kept(self, length: int) -> int:
        """The first token whose copies are still seen from position `length` on."""

    @abstractmethod
    def wanted(self, length: int) -> int:
        """The first token whose copies have a part in what is seen from position `length` on."""

    def start(self, state: State) -> LayerState:
        """Where the kept copies stand, before there are any."""
        return Recent(self, state.slots)


@dataclass(frozen=True)
class HiddenDecoding(Repetition):
    """Originals see originals; a copy sees these, what comes before it of its own token, and the copies near it.

    `key ≤ query and (original(key) or token(key) = token(query) or near)`, where a copy is near to those of the
    `window` tokens before it, in chunks of `chunk` tokens (if any) to those of its own chunk only (Wu et al., 2025).
    """

    repeats: int
    window: int = 0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.window < 0 or (self.chunk is not None and self.chunk < 1):
            raise ValueError(f"{self.repeats} repeats, a window of {self.window}, chunks of {self.chunk}")

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        read, seen = query // self.repeats, key // self.repeats
        allowed = (key % self.repeats == 0) | (read == seen)
        if self.window:
            near = (query % self.repeats > 0) & (read - seen <= self.window)
            if self.chunk is not None:
                near = near & (read // self.chunk == seen // self.chunk)
            allowed = allowed | near
        return (key <= query) & allowed

    @property
    def keeps(self) -> bool:
        return self.window > 0 and self.repeats > 1

    def kept(self, length: int) -> int:
        return length if not self.keeps else max(self._begin(length), length - self.window)

    def wanted(self, length: int) -> int:
        return length if not self.keeps else self._begin(length)

    def _begin(self, length: int) -> int:
        """Where the chunk of that position begins."""
        return 0 if self.chunk is None else length // self.chunk * self.chunk


@dataclass(frozen=True)
class EveryCopy(Repetition):
    """Plain repetition: everything sees all that stands before it, and all copies are kept."""

    repeats: int

    def __call__(self, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    @property
    def keeps(self) -> bool:
        return self.repeats > 1

    def kept(self, length: int) -> int:
        return 0

    def wanted(self, length: int) -> int:
        return 0


class Recent:
    """Where the copies stand that are kept: those of the latest pass, and of earlier ones what is still seen.

    positions: as the module says, -1 where a copy has been taken back. earlier: how many of the columns are of earlier
    passes. order: which columns of the state before the latest pass these were. first: which token of the latest pass
    is the first with copies. floor: the token from which on a row's copies are all here.
    """

    def __init__(self, rule: Repetition, slots: Slots):
        batch, device = slots.positions.shape[0], slots.positions.device
        self.rule, self.slots = rule, slots
        self.positions: Int[Tensor, "batch copy"] = torch.empty(batch, 0, dtype=torch.long, device=device)
        self.order = self.positions
        self.earlier, self.first, self.floor = 0, 0, [0] * batch

    def begin(self, positions: Int[Tensor, "batch new"], lengths: Sequence[int], first: int) -> None:
        """A pass begins on rows of these lengths: forgets what no token sees any more, makes room for its copies."""
        kept = [self.rule.kept(length) for length in lengths]
        bound = torch.tensor(kept, device=positions.device)[:, None]
        stays = (self.positions >= 0) & (self.positions // self.rule.repeats >= bound)
        self.earlier = int(stays.sum(1).amax()) if stays.shape[1] else 0
        self.order = (~stays).int().argsort(dim=1, stable=True)[:, : self.earlier]
        old = self.positions.gather(1, self.order).masked_fill(~stays.gather(1, self.order), -1)
        self.positions, self.first = torch.cat((old, positions), 1), first
        begun = [length + first if first else 0 for length in lengths]
        self.floor = [max(three) for three in zip(self.floor, kept, begun, strict=True)]

    def joined(
        self, old: Float[Tensor, "batch before head dim"], new: Float[Tensor, "batch new head dim"]
    ) -> Float[Tensor, "batch copy head dim"]:
        """What belongs to each column, of what belonged to those before the pass and what it adds."""
        if self.earlier < old.shape[1] or not torch.equal(self.order, self._places(old)):
            old = old.take_along_dim(self.order[..., None, None], 1)
        return torch.cat((old, new), 1)

    def _places(self, old: Tensor) -> Tensor:
        return torch.arange(old.shape[1], device=old.device).expand_as(self.order)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.positions, self.order = self.positions[rows], self.order[rows]
        self.floor = [self.floor[row] for row in rows.tolist()]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """Raises FormeryError where copies that the next token sees are gone."""
        for row, length in enumerate(lengths):
            if length > self.rule.kept(length) < self.floor[row]:
                raise FormeryError(
                    f"row {row} cannot be taken back to {length} tokens: the copies that its next token would see are "
                    "gone; take back no more than the latest pass, or everything."
                )

    def check_keep(self, counts: Sequence[int]) -> None:
        """Raises FormeryError where tokens, not just padding, would be dropped."""
        if list(counts) != self.slots.lengths:
            raise FormeryError("copies of tokens are kept here in a window only, from which none can be dropped.")

    def rollback(self, lengths: Sequence[int]) -> None:
        bound = torch.tensor(lengths, device=self.positions.device)[:, None] * self.rule.repeats
        self.positions = self.positions.masked_fill(self.positions >= bound, -1)
        self.floor = [min(pair) for pair in zip(self.floor, lengths, strict=True)]

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """It can always be done."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        columns = torch.arange(self.positions.shape[1] - self.earlier, device=self.positions.device)
        places = self.first + columns // max(1, self.rule.repeats - 1)
        for row, path in enumerate(paths):
            gone = ~torch.isin(places, torch.tensor(list(path), dtype=torch.long, device=places.device))
            self.positions[row, self.earlier :].masked_fill_(gone, -1)

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to move: copies have no slots."""

    def grow(self, capacity: int) -> None:
        """Nothing to do: how many copies are kept does not depend on the room for tokens."""

    def tensors(self) -> list[Tensor]:
        return [self.positions]


class Retained(KeyValues):
    """Keys and values of originals in the slots, and beside them those of the copies that are kept.

    recent: where these stand; None where copies are forgotten with their pass.
    """

    def __init__(self, slots: Slots, recent: Recent | None, heads: int, width: int, dtype: torch.dtype):
        super().__init__(slots, heads, width, width, dtype)
        self.recent = recent
        self.copied_keys, self.copied_values = self.keys[:, :0].clone(), self.values[:, :0].clone()

    def append(
        self, keys: Float[Tensor, "batch read head key"], values: Float[Tensor, "batch read head value"]
    ) -> tuple[Float[Tensor, "batch head seen key"], Float[Tensor, "batch head seen value"]]:
        """Stores this pass's originals, and its copies where they are kept; returns all that there are."""
        time = self.slots.used[0] - self.slots.start[0]
        originals = super().append(keys[:, :time], values[:, :time])
        copies = keys[:, time:], values[:, time:]
        if self.recent is not None:
            copies = self.recent.joined(self.copied_keys, copies[0]), self.recent.joined(self.copied_values, copies[1])
            self.copied_keys, self.copied_values = copies
        return (
            torch.cat((originals[0], copies[0].transpose(1, 2)), 2),
            torch.cat((originals[1], copies[1].transpose(1, 2)), 2),
        )

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        super().select(rows)
        self.copied_keys, self.copied_values = self.copied_keys[rows], self.copied_values[rows]

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.copied_keys, self.copied_values]


class RepeatedAttention(Attention):
    """Attention whose mask is a `Repetition`, which says what it remembers of copies too."""

    def start(self, state: State) -> LayerState:
        assert isinstance(self.mask, Repetition)
        recent = state.of(self.mask) if self.mask.keeps else None
        assert recent is None or isinstance(recent, Recent)
        return Retained(state.slots, recent, self.groups, self.dim, self.key.dtype)
