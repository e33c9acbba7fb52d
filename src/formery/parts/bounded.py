"""Attention that remembers no more keys and values than a budget: a rule says which stay."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.attention import Attention
from formery.parts.band import Band, Buffers, Pass
from formery.parts.context import Context, Visibility
from formery.parts.eviction import Eviction
from formery.parts.kernels.choose import attend
from formery.parts.kernels.eager import eager
from formery.parts.mask import Mask, causal
from formery.parts.part import Described, Part
from formery.parts.position import Position
from formery.parts.state import LayerState, State

RETAKEN = 64  # the latest pass can be taken back where it has from 2 to so many tokens


class Placing(Described):
    """At which positions kept keys stand for the queries that come later."""

    @abstractmethod
    def stored(self, key: Tensor, position: Position | None, context: Context) -> Tensor:
        """Keys as they are kept."""

    @abstractmethod
    def placed(
        self, query: Tensor, places: Tensor, keys: Tensor, key_places: Tensor, position: Position | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, their positions, keys and theirs, as they meet. One row for each row and head of keys."""


@dataclass(frozen=True)
class Original(Placing):
    """Tokens keep the positions that they had in the text: distances count what was dropped too."""

    def stored(self, key: Tensor, position: Position | None, context: Context) -> Tensor:
        return key if position is None else position.rotate(key, context)

    def placed(
        self, query: Tensor, places: Tensor, keys: Tensor, key_places: Tensor, position: Position | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _turned(query, places, position), places, keys, key_places


@dataclass(frozen=True)
class Compacted(Placing):
    """What is kept stands close together: distances are counted within the cache (as StreamingLLM does)."""

    def stored(self, key: Tensor, position: Position | None, context: Context) -> Tensor:
        return key

    def placed(
        self, query: Tensor, places: Tensor, keys: Tensor, key_places: Tensor, position: Position | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Slots are in the order of their positions, so that a key's place is its slot.
        slots = torch.arange(keys.shape[2], device=keys.device).expand_as(key_places)
        earlier = (key_places >= 0)[:, None] & (key_places[:, None] <= places[:, :, None])
        now = (earlier.sum(-1) - 1).masked_fill(places < 0, -1)
        ranks = slots.masked_fill(key_places < 0, -1)
        return _turned(query, now, position), now, _turned(keys, ranks, position), ranks


def _turned(
    heads: Float[Tensor, "row head time dim"], places: Int[Tensor, "row time"], position: Position | None
) -> Tensor:
    return heads if position is None else position.rotate(heads.transpose(1, 2), Context(places)).transpose(1, 2)


class Bounded(Attention):
    """Self-attention whose decode state keeps `budget` slots a head of keys and values, by a rule of eviction.

    budget: a list has one for each head of keys and values. block: slots are given up after each so many tokens of a
    row, so that up to budget + block are held. placing: where kept keys stand (`Original` unless given); the other
    arguments as in Attention. Without a decode state it reads from scratch just as it would with one. Drafts that are
    trees, packed texts, and going back further than the latest pass are refused with a FormeryError.
    """

    def __init__(
        self,
        rule: Eviction,
        budget: int | Sequence[int],
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        position: Position | None = None,
        mask: Mask = causal,
        bias: bool = False,
        output_bias: bool | None = None,
        query_norm: Part | None = None,
        key_norm: Part | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float = 0.0,
        block: int = 1,
        placing: Placing | None = None,
    ):
        super().__init__(
            width, heads, key_value_heads, head_width, position, mask, bias, output_bias, query_norm, key_norm, scale,
            soft_cap, dropout,
        )  # fmt: skip
        self.rule, self.budget, self.block, self.placing = rule, budget, block, placing
        self.budgets = [budget] * self.groups if isinstance(budget, int) else list(budget)
        if len(self.budgets) != self.groups:
            raise ValueError(f"{len(self.budgets)} budgets for {self.groups} heads of keys and values: give each one")
        if min(self.budgets) < 1 or block < 1:
            raise ValueError(f"a budget of {min(self.budgets)} slots, in blocks of {block} tokens, keeps nothing")

    @classmethod
    def of(
        cls,
        attention: Attention,
        rule: Eviction,
        budget: int | Sequence[int],
        block: int = 1,
        placing: Placing | None = None,
    ) -> "Bounded":
        """The same attention, with the very same weights, bounded."""
        with torch.device("meta"):
            made = cls(rule, budget, **attention.arguments(), block=block, placing=placing)
        for name, part in attention.named_children():
            setattr(made, name, part)
        return made.train(attention.training)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        if context.visible is not None:
            raise FormeryError(
                "a bounded cache reads chains of tokens, no trees and no packed texts; draft with a width of 1."
            )
        batch, time, _ = hidden.shape
        query = self.query(hidden).view(batch, time, self.heads, self.dim)
        key = self.key(hidden).view(batch, time, self.groups, self.dim)
        value = self.value(hidden).view(batch, time, self.groups, self.dim)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None:
            key = self.key_norm(key)
        own = context.remembered(self)
        if own is None:
            own = BoundedKeyValues(self, batch, time, query)
        assert isinstance(own, BoundedKeyValues)
        key = self._placing.stored(key, self.position, context)
        mixed = own.read(Pass(query.transpose(1, 2), key, value, context.positions))
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        like = torch.empty(0, dtype=self.key.dtype, device=state.slots.positions.device)
        return BoundedKeyValues(self, state.batch, state.slots.capacity, like)

    @property
    def _placing(self) -> Placing:
        return Original() if self.placing is None else self.placing

    def reading(
        self, heads: slice, query: Tensor, places: Tensor, keys: Tensor, key_places: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What queries of these heads read in the slots of their band, and their weights where the rule takes notes."""
        (batch, count, time, _), choices = query.shape, key_places.shape[1]
        # Heads that keep different tokens are rows of their own.
        alone = query.reshape(batch * choices, count // choices, time, -1)
        keys, values = (one.reshape(batch * choices, one.shape[1] // choices, *one.shape[2:]) for one in (keys, values))
        key_places = key_places.reshape(batch * choices, -1).long()
        at = places[:, None].expand(batch, choices, time).reshape(batch * choices, time)
        alone, at, keys, key_places = self._placing.placed(alone, at, keys, key_places, self.position)
        context = Context(at, key_places)
        allowed = context.visibility(self.mask, self.heads).allowed
        bias = None if self.position is None else self.position.bias(self.heads, context)
        allowed, bias = (_of(one, batch, choices, heads) for one in (allowed, bias))
        scale = self.dim**-0.5 if self.scale is None else self.scale
        if self.rule.memory is None:
            mixed, weights = attend(alone, keys, values, Visibility(allowed), bias, scale, self.soft_cap), None
        else:
            mixed, weights = eager(alone, keys, values, Visibility(allowed), bias, scale, self.soft_cap, 0.0)
            weights = weights.reshape(batch, count, time, -1)
        return mixed.reshape(batch, count, time, -1), weights


def _of(whole: Tensor | None, batch: int, choices: int, heads: slice) -> Tensor | None:
    """Of what holds for each row and all heads, what holds for the heads of a row."""
    if whole is None or whole.shape[1] == 1:
        return whole
    if choices == 1:
        return whole[:, heads]
    own = whole[:, heads].reshape(-1, choices, choices, whole[:, heads].shape[1] // choices, *whole.shape[2:])
    return own.diagonal(dim1=1, dim2=2).movedim(-1, 1).flatten(0, 1)


class BoundedKeyValues:
    """The keys and values that a bounded attention has kept, in a band for each run of heads of one budget."""

    def __init__(self, part: Bounded, batch: int, capacity: int, like: Tensor):
        self.part, self.shares = part, part.heads // part.groups
        self.bands: list[tuple[slice, Band]] = []
        first = 0
        for budget, run in groupby(part.budgets):
            groups = len(list(run))
            band = Band(batch, groups, part.dim, max(1, capacity), budget, part.block, part.rule, like)
            self.bands.append((slice(first, first + groups), band))
            first += groups
        self.latest: Pass | None = None
        self.before: list[Buffers] = []
        self.start = [0] * batch  # tokens that each row had read before the latest pass

    def read(self, new: Pass) -> Float[Tensor, "batch head time value"]:
        """Reads the tokens of a pass; gives what each query reads."""
        self.start = list(self.bands[0][1].held.read)
        again = 1 < new.positions.shape[1] <= RETAKEN
        self.latest, self.before = (new, [band.before() for _, band in self.bands]) if again else (None, [])
        return self._take(new)

    def _take(self, new: Pass) -> Float[Tensor, "batch head time value"]:
        mixed = []
        for groups, band in self.bands:
            heads = slice(groups.start * self.shares, groups.stop * self.shares)
            own = Pass(new.query[:, heads], new.key[:, :, groups], new.value[:, :, groups], new.positions)
            mixed.append(band.take(own, lambda *given, heads=heads: self.part.reading(heads, *given)))
        return torch.cat(mixed, 1) if len(mixed) > 1 else mixed[0]

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.latest, self.before = None, []
        self.start = [self.start[row] for row in rows.tolist()]
        for _, band in self.bands:
            band.select(rows)

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can be done within the latest pass, if that was of 2 to 64 tokens."""
        read = self.bands[0][1].held.read
        if all(length >= now for length, now in zip(lengths, read, strict=True)):
            return
        if self.latest is None or any(length < start for length, start in zip(lengths, self.start, strict=True)):
            raise FormeryError(
                f"a bounded cache goes back only within its latest pass, of 2 to {RETAKEN} tokens; it has read {read} "
                f"tokens and cannot go back to {list(lengths)}."
            )

    def rollback(self, lengths: Sequence[int]) -> None:
        read = self.bands[0][1].held.read
        if self.latest is None or all(length >= now for length, now in zip(lengths, read, strict=True)):
            return
        for (_, band), before in zip(self.bands, self.before, strict=True):
            band.back(before)
        bound = torch.tensor(list(lengths), device=self.latest.positions.device)[:, None]
        positions = self.latest.positions
        self.latest.positions = positions.masked_fill(positions >= bound, -1)
        self._take(self.latest)

    def check_keep(self, counts: Sequence[int]) -> None:
        raise FormeryError("a bounded cache decides by its own rule what it keeps; no tokens can be taken out of it.")

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        if any(list(path) != list(range(len(path))) for path in paths):
            raise FormeryError("a bounded cache takes chains of drafts, no trees; draft with a width of 1.")
        self.check_rollback([start + len(path) for start, path in zip(self.start, paths, strict=True)])

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        self.rollback([start + len(path) for start, path in zip(self.start, paths, strict=True)])

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Never called: `check_keep` refuses."""

    def grow(self, capacity: int) -> None:
        for _, band in self.bands:
            band.grow(capacity)

    def tensors(self) -> list[Tensor]:
        latest = self.latest
        kept = [] if latest is None else [latest.query, latest.key, latest.value, latest.positions]
        kept += [one for before in self.before for one in before.tensors()]
        return kept + [one for _, band in self.bands for one in band.held.tensors()]
