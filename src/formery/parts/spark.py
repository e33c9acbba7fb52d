"""Parts in which few are active: a cut-off that is told from statistics, and what chooses by it.

You, Wu, Jia, Chen and others, "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025.
"""

from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formery.parts.attention import heads_of
from formery.parts.codes import Codes
from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.mask import Mask, causal
from formery.parts.part import Part, normal
from formery.parts.part import activation as function
from formery.parts.position import Position
from formery.parts.state import KeyValues, LayerState, State

TINY = 1e-12  # added to variances: scores that are all alike have a gradient too


def cutoff(
    scores: Float[Tensor, "... entries"], active: int, seen: Bool[Tensor, "... entries"] | None = None
) -> Float[Tensor, "... 1"]:
    """`mean + deviation · Q(1 - active / entries)`, above which lie about `active` entries if they are Gaussian.

    Q: the quantile function of the standard normal distribution. seen: which entries count. Minus infinity where no
    more than `active` of them do, so that all stay.
    """
    if seen is None:
        count = torch.full_like(scores[..., :1], scores.shape[-1])
        mean = scores.mean(-1, keepdim=True)
        variance = (scores - mean).square().mean(-1, keepdim=True)
    else:
        count = seen.sum(-1, keepdim=True).to(scores.dtype)
        mean = scores.where(seen, 0).sum(-1, keepdim=True) / count
        variance = (scores - mean).where(seen, 0).square().sum(-1, keepdim=True) / count
    quantile = torch.special.ndtri((1 - active / count).clamp(min=0.5 / scores.shape[-1]))
    return (mean + (variance + TINY).sqrt() * quantile).where(count > active, -torch.inf)


def soft_threshold(scores: Float[Tensor, "... entries"], active: int) -> Float[Tensor, "... entries"]:
    """`max(scores - cutoff, 0)`: about `active` entries stay, moved down to begin at zero ("statistical top-k")."""
    if active >= scores.shape[-1]:
        return scores
    return torch.relu(scores - cutoff(scores, active))


def largest(
    scores: Float[Tensor, "... entries"], active: int, seen: Bool[Tensor, "... entries"]
) -> Bool[Tensor, "... entries"]:
    """Which of the seen entries lie above the cut-off; the largest always does."""
    found = scores.detach()
    best = found.masked_fill(~seen, -torch.inf).amax(-1, keepdim=True)
    return seen & (found >= torch.minimum(cutoff(found, active, seen), best))


class SparkFeedForward(Part):
    """`valuesᵀ · (activation(soft_threshold(score(x[:r]))) * up(x[r:]))`, r = predictor (section 2 of the paper).

    active: about how many of the hidden units are not zero. predictor: how many of the first inputs tell which; the
    others tell how much. It has `2 · width · hidden` weights: as many as a gated feed-forward of two thirds of the
    hidden units. A single token reads the rows of the active units alone, but for `score`.
    """

    def __init__(
        self, width: int, hidden: int, active: int, predictor: int | None = None, activation: str = "gelu_tanh"
    ):
        super().__init__()
        self.width, self.hidden, self.active = width, hidden, active
        self.predictor, self.activation = predictor, activation
        _check_active(hidden, active, activation)
        self.read = _first(width, predictor)
        self.score = Linear(self.read, hidden)
        self.up = Linear(width - self.read, hidden)
        self.values = normal(hidden, width, deviation=0.3 * hidden**-0.5)  # a row for each unit, to be read alone

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        if hidden.numel() == self.width and not torch.is_grad_enabled():
            return self.gathered(hidden.flatten()).view_as(hidden)
        return self.dense(hidden)

    def dense(self, hidden: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """All units computed, active or not."""
        kept = soft_threshold(self.score(hidden[..., : self.read]), self.active)
        return (function(self.activation)(kept) * self.up(hidden[..., self.read :])) @ self.values

    def gathered(self, hidden: Float[Tensor, "width"]) -> Float[Tensor, "width"]:
        """Of one token, by the active units' rows alone."""
        kept = soft_threshold(self.score(hidden[None, : self.read])[0], self.active)
        units = kept.nonzero().flatten()
        weight = self.up.weight
        rows = weight.rows(units) if isinstance(weight, Codes) else weight.index_select(0, units)
        found = function(self.activation)(kept[units]) * torch.mv(rows, hidden[self.read :])
        return nn.functional.embedding_bag(units[None], self.values, mode="sum", per_sample_weights=found[None])[0]


class ThresholdedMLP(Part):
    """`down(activation(soft_threshold(up(x))))`: few units are active, but nothing tells which before all are known."""

    def __init__(self, width: int, hidden: int, active: int, activation: str = "gelu_tanh"):
        super().__init__()
        self.width, self.hidden, self.active, self.activation = width, hidden, active, activation
        _check_active(hidden, active, activation)
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        kept = soft_threshold(self.up(hidden), self.active)
        return cast(Tensor, self.down(function(self.activation)(kept)))


class SparkAttention(Part):
    """`(softmax(largest(q[:r] · k[:r])) * softplus(q[r:] · k[r:])) · value`, r = predictor (section 2 of the paper).

    active: about how many keys each head of a query attends to; it attends to all where it sees no more. predictor: how
    many of a head's first entries choose them. Products are scaled by 1 / sqrt of the entries in them; a rotary scheme
    turns both pieces, each by itself. The other arguments are those of `Attention`.

    A key whose score equals the cut-off to rounding may be chosen in one way of computing and not in another.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        active: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        predictor: int | None = None,
        position: Position | None = None,
        mask: Mask = causal,
    ):
        super().__init__()
        if active < 1:
            raise ValueError(f"{active} keys are too few to attend to")
        self.width, self.heads, self.active = width, heads, active
        self.key_value_heads, self.head_width, self.predictor = key_value_heads, head_width, predictor
        self.position, self.mask = position, mask
        self.groups, self.dim = heads_of(width, heads, key_value_heads, head_width)
        self.read = _first(self.dim, predictor)
        self.query = Linear(width, heads * self.dim)
        self.key = Linear(width, self.groups * self.dim)
        self.value = Linear(width, self.groups * self.dim)
        self.output = Linear(heads * self.dim, width, gain=0.3)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        batch, time, _ = hidden.shape
        query, key = self._queries(hidden, context), self._keys(hidden, context)
        values = self.value(hidden).view(batch, time, self.groups, self.dim)
        own = context.remembered(self)
        if own is None:
            keys, values = key.transpose(1, 2), values.transpose(1, 2)
        else:
            assert isinstance(own, KeyValues)
            keys, values = own.append(key, values)
        scores, seen = self._scores(query, keys, context)
        chosen = scores.masked_fill(~largest(scores, self.active, seen), -torch.inf).softmax(-1)
        gate = nn.functional.softplus(self._products(query[..., self.read :], keys[..., self.read :]))
        weights = (chosen * gate).reshape(batch, self.groups, -1, keys.shape[2])
        mixed = (weights @ values).reshape(batch, self.heads, time, self.dim)
        return self.output(mixed.transpose(1, 2).reshape(batch, time, -1))

    def choice(
        self, hidden: Float[Tensor, "batch time width"], context: Context
    ) -> tuple[Bool[Tensor, "batch head time slot"], Bool[Tensor, "#batch #head time slot"]]:
        """Which keys are attended to, and which are seen, in a pass without a state."""
        keys = self._keys(hidden, context).transpose(1, 2)
        scores, seen = self._scores(self._queries(hidden, context), keys, context)
        return largest(scores, self.active, seen), seen

    def start(self, state: State) -> LayerState:
        """What this layer remembers while decoding."""
        return KeyValues(state.slots, self.groups, self.dim, self.dim, self.key.dtype)

    def _queries(self, hidden: Tensor, context: Context) -> Float[Tensor, "batch head time dim"]:
        query = self.query(hidden).view(*hidden.shape[:2], self.heads, self.dim)
        return self._turned(query, context).transpose(1, 2)

    def _keys(self, hidden: Tensor, context: Context) -> Float[Tensor, "batch time group dim"]:
        return self._turned(self.key(hidden).view(*hidden.shape[:2], self.groups, self.dim), context)

    def _turned(self, heads: Tensor, context: Context) -> Float[Tensor, "batch time head dim"]:
        if self.position is None:
            return heads
        pieces = heads.split([self.read, self.dim - self.read], -1)
        return torch.cat([self.position.rotate(one, context) for one in pieces], -1)

    def _scores(
        self, query: Tensor, keys: Tensor, context: Context
    ) -> tuple[Float[Tensor, "batch head time slot"], Bool[Tensor, "#batch #head time slot"]]:
        scores = self._products(query[..., : self.read], keys[..., : self.read])
        bias = None if self.position is None else self.position.bias(self.heads, context)
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        seen = context.visibility(self.mask, self.heads)
        return scores, seen.tensor(query.shape[2], keys.shape[2], query.device)

    def _products(self, query: Tensor, keys: Tensor) -> Float[Tensor, "batch head time slot"]:
        """Scaled products of pieces of queries and of keys, where heads of a group share their keys."""
        batch, heads, time, entries = query.shape
        grouped = query.reshape(batch, self.groups, heads // self.groups * time, entries)
        return (grouped @ keys.transpose(-1, -2) * entries**-0.5).reshape(batch, heads, time, keys.shape[2])


def _first(entries: int, predictor: int | None) -> int:
    """How many entries the predictor reads: half of them unless given; some must be left."""
    read = entries // 2 if predictor is None else predictor
    if not 0 < read < entries:
        raise ValueError(f"a predictor cannot read {read} of {entries} entries: some must tell which, some how much")
    return read


def _check_active(hidden: int, active: int, activation: str) -> None:
    if not 1 <= active <= hidden:
        raise ValueError(f"{active} of {hidden} hidden units cannot be active")
    if function(activation)(torch.zeros(1, device="cpu")).any():
        raise ValueError(f"{activation} makes something of nothing, so that no unit would be inactive")
