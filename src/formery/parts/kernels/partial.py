"""Attention to some of the keys, and how the answers for several such shares become that for all of them.

Softmax over keys that are looked at in shares needs three things of each share: its largest score, the sum of the
exponentials against it, and the values weighted by them. `merge` is associative and commutative, and `empty` changes
nothing in it, so that shares may be of any size, none at all too, and be put together in any order along any tree
(Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Partial:
    """`maximum = max score`, `denominator = Σ exp(score - maximum)`, `numerator = Σ exp(score - maximum) · value`.

    The sums are over the keys of a share that the query sees; where it sees none they are -inf, 0 and 0.
    """

    maximum: Float[Tensor, "batch head time"]
    denominator: Float[Tensor, "batch head time"]
    numerator: Float[Tensor, "batch head time value"]

    @property
    def value(self) -> Float[Tensor, "batch head time value"]:
        """Attention to these keys alone, `numerator / denominator`; 0 for a query that sees none of them."""
        seen = (self.denominator > 0)[..., None]
        return self.numerator / torch.where(seen, self.denominator[..., None], 1)

    @property
    def log_sum_exp(self) -> Float[Tensor, "batch head time"]:
        """`log Σ exp(score)`; -inf for a query that sees none of the keys."""
        return self.maximum + self.denominator.log()

    def packed(self) -> Float[Tensor, "batch head time packed"]:
        """All of it as one tensor: the numerator, then denominator and maximum."""
        return torch.cat((self.numerator, self.denominator[..., None], self.maximum[..., None]), -1)

    @classmethod
    def unpacked(cls, packed: Float[Tensor, "batch head time packed"]) -> Self:
        """What `packed` made a tensor of."""
        return cls(packed[..., -1], packed[..., -2], packed[..., :-2])


def partial(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    allowed: Bool[Tensor, "#batch #head #time slot"] | None = None,
    bias: Float[Tensor, "#batch #head #time slot"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
) -> Partial:
    """Of the scores `soft_cap · tanh(scale · query · key / soft_cap) + bias`, where allowed; slot may be 0.

    head / group query heads share each key and value head. Sums are kept in at least float32; `scale` is
    1 / sqrt(key width) unless given.
    """
    batch, heads, time, width = query.shape
    groups, slots = key.shape[1], key.shape[2]
    if slots == 0:
        return empty(query, value.shape[-1])
    grouped = query.reshape(batch, groups, heads // groups * time, width)
    scores = grouped @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    scores = scores.reshape(batch, heads, time, slots).to(_wide(query.dtype))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if bias is not None:
        scores = scores + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    # What is subtracted cancels, so that no gradient has to flow through it.
    maximum = scores.detach().amax(-1)
    weights = (scores - _finite(maximum)[..., None]).exp()
    used = weights.reshape(batch, groups, heads // groups * time, slots).to(value.dtype)
    numerator = (used @ value).reshape(batch, heads, time, -1).to(weights.dtype)
    return Partial(maximum, weights.sum(-1), numerator)


def empty(query: Float[Tensor, "batch head time key"], width: int) -> Partial:
    """Of no keys, with values of that width: merged with any other it leaves that as it is."""
    none = query.new_zeros(query.shape[:-1], dtype=_wide(query.dtype))
    return Partial(none - torch.inf, none, none[..., None].expand(*none.shape, width))


def merge(first: Partial, second: Partial) -> Partial:
    """Of the keys of both, which have none in common."""
    maximum = torch.maximum(first.maximum, second.maximum)
    against = _finite(maximum)
    one, other = (first.maximum - against).exp(), (second.maximum - against).exp()
    return Partial(
        maximum,
        first.denominator * one + second.denominator * other,
        first.numerator * one[..., None] + second.numerator * other[..., None],
    )


def merged(parts: Iterable[Partial]) -> Partial:
    """Of the keys of all of them (at least one), from the first to the last."""
    return reduce(merge, parts)


def _finite(maximum: Tensor) -> Tensor:
    """0 in place of the -inf of a query that sees nothing: -inf - -inf would be no number."""
    return torch.where(maximum == -torch.inf, 0, maximum)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
