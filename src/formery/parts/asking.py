"""What a layer's queries ask for: their vectors, the keys and values there are, and who may be seen at all."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.parts.attention import Attention
from formery.parts.context import Context, Visibility
from formery.parts.kernels import attend
from formery.parts.kernels.eager import eager
from formery.parts.state import KeyValues


@dataclass(frozen=True)
class Asked:
    """The queries of one layer in one pass, and what they could look at.

    positions: of the queries, -1 for padding; key_positions: of the slots, -1 where empty. since: the position in each
    row from which tokens are written; those before it are the prompt. observed: how much the prompt's last tokens
    looked at each slot, where the layer remembers it.
    """

    query: Float[Tensor, "batch head time key"]
    keys: Float[Tensor, "batch group slot key"]
    values: Float[Tensor, "batch group slot value"]
    bias: Float[Tensor, "#batch head time slot"] | None
    visibility: Visibility
    positions: Int[Tensor, "batch time"]
    key_positions: Int[Tensor, "batch slot"]
    since: Int[Tensor, "batch"]
    scale: float
    soft_cap: float | None
    observed: Float[Tensor, "batch group slot"] | None = None

    @classmethod
    def by(cls, part: Attention, hidden: Float[Tensor, "batch time width"], context: Context, since: Tensor) -> "Asked":
        """What `part` asks for in a pass; its keys and values of this pass are then in the state, if there is one."""
        batch, time, _ = hidden.shape
        query = part.query(hidden).view(batch, time, part.heads, part.dim)
        key = part.key(hidden).view(batch, time, part.groups, part.dim)
        value = part.value(hidden).view(batch, time, part.groups, part.dim)
        query = query if part.query_norm is None else part.query_norm(query)
        key = key if part.key_norm is None else part.key_norm(key)
        bias = None
        if part.position is not None:
            query, key = part.position.rotate(query, context), part.position.rotate(key, context)
            bias = part.position.bias(part.heads, context)
        own = context.remembered(part)
        if own is None:
            keys, values = key.transpose(1, 2), value.transpose(1, 2)
        else:
            assert isinstance(own, KeyValues)
            keys, values = own.append(key, value)
        visibility = context.visibility(part.mask, part.heads)
        scale = part.dim**-0.5 if part.scale is None else part.scale
        at, slots = context.positions, context.key_positions
        return cls(query.transpose(1, 2), keys, values, bias, visibility, at, slots, since, scale, part.soft_cap)

    @property
    def groups(self) -> int:
        """How many heads have keys and values of their own; query heads share them evenly."""
        return self.keys.shape[1]

    @property
    def written(self) -> Bool[Tensor, "batch time"]:
        """Which queries are of tokens behind the prompt."""
        return self.positions >= self.since[:, None]

    @property
    def writing(self) -> bool:
        """Whether no query is of the prompt."""
        return bool((self.written | (self.positions < 0)).all())

    @property
    def allowed(self) -> Bool[Tensor, "batch group time slot"]:
        """What may be seen by a head of the group: never the future, never padding."""
        batch, heads, time, _ = self.query.shape
        slots = self.keys.shape[2]
        full = self.visibility.tensor(time, slots, self.query.device).expand(batch, -1, time, slots)
        if full.shape[1] == 1:
            return full.expand(batch, self.groups, time, slots)
        return full.view(batch, self.groups, heads // self.groups, time, slots).any(2)

    def grouped(self, heads: Float[Tensor, "batch head time slot"]) -> Float[Tensor, "batch group time slot"]:
        """The sum over the query heads that share keys and values."""
        batch, number, time, slots = heads.shape
        return heads.view(batch, self.groups, number // self.groups, time, slots).sum(2)

    def everything(self) -> Float[Tensor, "batch head time value"]:
        """Attention to all that may be seen, as without any rule."""
        return attend(self.query, self.keys, self.values, self.visibility, self.bias, self.scale, self.soft_cap)

    def weighed(self) -> tuple[Float[Tensor, "batch head time value"], Float[Tensor, "batch head time slot"]]:
        """Attention to all that may be seen, and its weights."""
        return eager(self.query, self.keys, self.values, self.visibility, self.bias, self.scale, self.soft_cap, 0.0)

    def only(self, mask: Bool[Tensor, "batch group time slot"]) -> Float[Tensor, "batch head time value"]:
        """Attention to what the mask chooses of what may be seen; queries for which that is nothing see all of it."""
        allowed = self.visibility.tensor(mask.shape[2], mask.shape[3], mask.device)
        seen = mask.repeat_interleave(self.query.shape[1] // self.groups, 1) & allowed
        seen = seen | ~seen.any(-1, keepdim=True) & allowed
        return attend(self.query, self.keys, self.values, Visibility(seen), self.bias, self.scale, self.soft_cap)

    def at(self, places: Int[Tensor, "batch some"]) -> "Asked":
        """The same for these queries of each row alone."""
        batch, heads, time, width = self.query.shape
        slots, some = self.keys.shape[2], places.shape[1]

        def taken(whole: Tensor) -> Tensor:
            whole = whole.expand(batch, -1, time, slots)
            return whole.gather(2, places[:, None, :, None].expand(batch, whole.shape[1], some, slots))

        return replace(
            self,
            query=self.query.gather(2, places[:, None, :, None].expand(batch, heads, some, width)),
            bias=None if self.bias is None else taken(self.bias),
            visibility=Visibility(taken(self.visibility.tensor(time, slots, self.query.device))),
            positions=self.positions.gather(1, places),
        )

    def last_read(self, number: int) -> tuple["Asked", Bool[Tensor, "batch some"]]:
        """The queries of the last `number` tokens of each prompt that are in this pass, and which of them there are."""
        order = self.positions.masked_fill(self.written, -1)
        latest = order.topk(min(number, order.shape[1]), 1)
        return self.at(latest.indices), latest.values >= 0


@dataclass(frozen=True)
class Chosen:
    """Slots that queries look at, the same for all heads of a group.

    real: which of them there are; a query that may see fewer than the others has fewer.
    """

    slots: Int[Tensor, "batch group time chosen"]
    real: Bool[Tensor, "batch group time chosen"]

    @classmethod
    def largest(
        cls,
        importance: Float[Tensor, "batch group time slot"],
        allowed: Bool[Tensor, "batch group time slot"],
        number: int,
    ) -> "Chosen":
        """The `number` most important slots of those allowed."""
        top = importance.masked_fill(~allowed, float("-inf")).topk(min(number, importance.shape[-1]), -1).indices
        return cls(top, allowed.gather(-1, top))

    def mask(self, slots: int) -> Bool[Tensor, "batch group time slot"]:
        """The same as a mask over all slots."""
        empty = torch.zeros(*self.slots.shape[:-1], slots, dtype=torch.bool, device=self.slots.device)
        return empty.scatter(-1, self.slots, self.real)

    def attended(self, asked: Asked) -> Float[Tensor, "batch head time value"]:
        """Attention that reads the keys and values of these slots alone."""
        batch, heads, time, width = asked.query.shape
        shared, number = heads // asked.groups, self.slots.shape[-1]
        slots, real = self.slots.transpose(1, 2), self.real.transpose(1, 2)
        row = torch.arange(batch, device=slots.device)[:, None, None, None]
        group = torch.arange(asked.groups, device=slots.device)[:, None]
        # Each query is a row of its own, with the keys and values that it chose.
        keys, values = (whole[row, group, slots].flatten(0, 1) for whole in (asked.keys, asked.values))
        bias = None
        if asked.bias is not None:
            places = slots.repeat_interleave(shared, 2)
            bias = asked.bias.expand(batch, heads, time, -1).transpose(1, 2).gather(-1, places)
            bias = bias.reshape(-1, heads, 1, number)
        seen = Visibility()
        if not bool(real.all()):
            # A query that sees nothing is padding; its mean of whatever lies there is never read.
            real = real | ~real.any(-1, keepdim=True)
            seen = Visibility(real.repeat_interleave(shared, 2).reshape(-1, heads, 1, number))
        query = asked.query.transpose(1, 2).reshape(-1, heads, 1, width)
        mixed = attend(query, keys, values, seen, bias, asked.scale, asked.soft_cap)
        return mixed.view(batch, time, heads, -1).transpose(1, 2)
