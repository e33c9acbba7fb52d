"""Attention that looks back a bounded way, at a cost and with a decode state that do not grow with the text."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.parts.attention import Attention
from formery.parts.context import Context
from formery.parts.kernels import attend
from formery.parts.mask import Both, Causal, Either, Mask, Window, window
from formery.parts.rolling import RollingKeyValues
from formery.parts.state import LayerState, State

BLOCK = 64  # queries at least that are computed together


class LocalAttention(Attention):
    """Attention under a mask that hides the future and what lies too far back, such as `causal & window(128)`.

    The same as Attention with that mask, and with the same arguments; but queries are computed in blocks, each over the
    keys that it may see, and while decoding only those keys are held that may still be seen.
    """

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        query, key = (one(hidden).view(batch, time, -1, self.dim) for one in (self.query, self.key))
        value = self.value(hidden).view(batch, time, self.groups, self.dim)
        if self.query_norm is not None:
            query = self.query_norm(query)
        if self.key_norm is not None:
            key = self.key_norm(key)
        if self.position is not None:
            query, key = self.position.rotate(query, context), self.position.rotate(key, context)
        own, narrow = context.remembered(self), context
        keys, values = key.transpose(1, 2), value.transpose(1, 2)
        if own is not None:
            assert isinstance(own, RollingKeyValues)
            keys, values = own.append(key, value, context.positions)
            narrow = own.context(context)
        span, query = self.span, query.transpose(1, 2)
        if time > max(span, BLOCK) and context.even and consecutive(narrow.key_positions):
            mixed = self._blocks(query, keys, values, narrow)
        else:
            mixed = self._attend(query, keys, values, narrow)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    @property
    def mask(self) -> Mask:
        """Who sees whom."""
        return self._mask

    @mask.setter
    def mask(self, mask: Mask) -> None:
        # The constructor of all attention sets it: a mask that is of no use here is refused then.
        if span_of(mask) is None or not hides_future(mask):
            raise ValueError(f"the mask of local attention must be causal and bounded by a window, not {mask}")
        self._mask = mask

    @property
    def span(self) -> int:
        """How many positions a query sees at most, its own among them."""
        span = span_of(self.mask)
        assert span is not None
        return span

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        return RollingKeyValues(state.slots, self.groups, self.dim, self.dim, self.key.dtype, self.span)

    def _blocks(self, query: Tensor, keys: Tensor, values: Tensor, context: Context) -> Tensor:
        """As `_attend`, where the keys lie in the order of their positions, the queries' own the last of them."""
        mixed, span, time, before = [], self.span, query.shape[2], keys.shape[2] - query.shape[2]
        for first in range(0, time, max(span, BLOCK)):
            last = min(time, first + max(span, BLOCK))
            low = max(0, before + first - span + 1)
            part = Context(context.positions[:1, first:last], context.key_positions[:1, low : before + last])
            near = slice(low, before + last)
            mixed.append(self._attend(query[:, :, first:last], keys[:, :, near], values[:, :, near], part))
        return torch.cat(mixed, 2)

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, context: Context) -> Tensor:
        bias = None if self.position is None else self.position.bias(self.heads, context)
        dropout = self.dropout if self.training else 0.0
        visibility = context.visibility(self.mask, self.heads)
        return attend(query, keys, values, visibility, bias, self.scale, self.soft_cap, dropout)


def consecutive(positions: Int[Tensor, "batch slot"]) -> bool:
    """Whether all rows hold the same positions, each one after the last."""
    first = positions[:1, :1]
    return bool((positions == first + torch.arange(positions.shape[1], device=positions.device)).all() and first >= 0)


def span_of(mask: Mask) -> int | None:
    """How many positions a mask shows looking back, the query's own among them; None where nothing bounds it."""
    if isinstance(mask, Window):
        return mask.size
    if isinstance(mask, Both | Either):
        spans = [one for one in (span_of(mask.left), span_of(mask.right)) if one is not None]
        if isinstance(mask, Both):
            return min(spans, default=None)
        return max(spans) if len(spans) == 2 else None
    return None


def hides_future(mask: Mask) -> bool:
    """Whether a mask is known to hide all that comes after a query."""
    if isinstance(mask, Both):
        return hides_future(mask.left) or hides_future(mask.right)
    if isinstance(mask, Either):
        return hides_future(mask.left) and hides_future(mask.right)
    return isinstance(mask, Causal)


def localised(part: Attention, span: int) -> LocalAttention:
    """The same attention with the same weights over the last `span` positions; ValueError where that cannot be."""
    if span < 1:
        raise ValueError(f"a window shows at least the token itself, not {span}")
    given = {name: getattr(part, name) for name in part.parameters_of_constructor()}
    with torch.device("meta"):
        made = LocalAttention(**{**given, "mask": part.mask & window(span)})
    for name in ("query", "key", "value", "output"):
        if name in getattr(part, "replaced", ()):
            made.replace(name, getattr(part, name))
        else:
            setattr(made, name, getattr(part, name))
    return made.train(part.training)
