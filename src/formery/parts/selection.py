"""Rules for what a written token looks at: a fixed number of slots, chosen for each layer and each key head.

A rule answers for every query by itself, from positions and vectors alone, so that tokens read at once and one by one
choose alike. `None` stands for everything that may be seen.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.asking import Asked, Chosen
from formery.parts.part import Described

CERTAIN = 1e6  # more than attention weights ever add up to


class Rule(Described):
    """Which slots the queries of a pass look at."""

    @abstractmethod
    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        """True where the query looks; None where it looks at all that it may see."""


@dataclass(frozen=True)
class Budgeted(Rule):
    """A rule that chooses about `budget` slots."""

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise FormeryError(f"a budget is of at least 1 token, not of {self.budget}.")


@dataclass(frozen=True)
class Largest(Budgeted):
    """The slots with the largest attention weights, summed over the query heads that share them.

    The weights are computed first: it tells what the best choice would give and saves nothing by itself.
    """

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        slots = asked.keys.shape[2]
        if self.budget >= slots:
            return None
        _, weights = asked.weighed()
        return Chosen.largest(asked.grouped(weights), asked.allowed, self.budget).mask(slots)


@dataclass(frozen=True)
class Recent(Budgeted):
    """The first `sinks` tokens and the latest ones (Xiao et al., "Efficient Streaming Language Models with Attention
    Sinks", 2023)."""

    sinks: int = 4

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        sinks = min(self.sinks, self.budget - 1)
        query, key = asked.positions[:, None, :, None], asked.key_positions[:, None, None, :]
        return ((key < sinks) | (query - key < self.budget - sinks)) & asked.allowed


@dataclass(frozen=True)
class Pages(Budgeted):
    """The pages of `size` tokens whose keys could score highest, and the page of the query itself.

    `bound = Σ_i max(query_i · least_i, query_i · greatest_i)` over the least and greatest entries of the page's keys,
    summed over the query heads that share them (Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context
    LLM Inference", 2024). A position bias adds its greatest value in the page.
    """

    size: int = 16

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        number = -(-self.budget // self.size)
        page = asked.key_positions.clamp(min=0) // self.size
        pages = int(page.max()) + 1
        if number >= pages:
            return None
        bound = self.bounds(asked, page, pages)
        own = asked.positions.clamp(min=0) // self.size
        index = torch.arange(pages, device=page.device)
        before = (index < own[..., None])[:, None].expand(bound.shape)
        # The query's own page holds tokens that are not there yet when tokens come one by one: it is never compared.
        chosen = index == own[:, None, :, None]
        if number > 1:
            chosen = chosen | Chosen.largest(bound, before, number - 1).mask(pages)
        chosen = chosen.expand(bound.shape)
        return chosen.gather(-1, page[:, None, None].expand(*chosen.shape[:3], -1)) & asked.allowed

    def bounds(
        self, asked: Asked, page: Int[Tensor, "batch slot"], pages: int
    ) -> Float[Tensor, "batch group time page"]:
        """How high a key of each page could score."""
        batch, groups, slots, width = asked.keys.shape
        heads, time = asked.query.shape[1:3]
        # Emptied slots keep old keys: they take part in a page that is cut off.
        place = torch.where(asked.key_positions < 0, pages, page)
        index = place[:, None, :, None].expand(batch, groups, slots, width)
        least, greatest = (
            asked.keys.new_zeros(batch, groups, pages + 1, width).scatter_reduce(
                2, index, asked.keys, how, include_self=False
            )
            for how in ("amin", "amax")
        )
        query = asked.query.view(batch, groups, heads // groups, time, width)
        high = query.clamp(min=0) @ greatest[:, :, None].transpose(-1, -2)
        bound = (high + query.clamp(max=0) @ least[:, :, None].transpose(-1, -2))[..., :pages] * asked.scale
        if asked.bias is not None:
            bias = asked.bias.expand(batch, heads, time, slots)
            most = bias.new_zeros(batch, heads, time, pages + 1).scatter_reduce(
                3, place[:, None, None].expand(bias.shape), bias, "amax", include_self=False
            )
            bound = bound + most[..., :pages].view(batch, groups, heads // groups, time, pages)
        return bound.sum(2)


@dataclass(frozen=True)
class Kept(Budgeted):
    """What was chosen once, when the prompt had been read, and everything written since.

    Of the prompt stay the first `sinks` tokens, the last `window`, and those at which these looked most, smoothed over
    neighbours (Li et al., "SnapKV: LLM Knows What You Are Looking for Before Generation", 2024). The layer must be
    `Observing`.
    """

    window: int = 16
    sinks: int = 4

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        assert asked.observed is not None
        prompt = ((asked.key_positions < asked.since[:, None]) & (asked.key_positions >= 0))[:, None]
        if self.budget >= int(prompt.sum(-1).max()):
            return None
        edge = (asked.key_positions < self.sinks) | (asked.key_positions >= asked.since[:, None] - self.window)
        # Above all weights, the later the higher: never a tie.
        importance = torch.where(edge[:, None], asked.key_positions[:, None] + CERTAIN, asked.observed)
        kept = self.shared(importance[:, :, None], prompt[:, :, None].expand(importance[:, :, None].shape))
        return (kept | ~prompt[:, :, None]) & asked.allowed

    def shared(
        self, importance: Float[Tensor, "batch group 1 slot"], prompt: Bool[Tensor, "batch group 1 slot"]
    ) -> Bool[Tensor, "batch group 1 slot"]:
        """What each group keeps: as many slots as any other."""
        return Chosen.largest(importance, prompt, self.budget).mask(importance.shape[-1])


@dataclass(frozen=True)
class KeptUnevenly(Kept):
    """As `Kept`, where the groups of a layer compete for what each keeps above a share of its own.

    floor: that share (Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient
    LLM Inference", 2024).
    """

    floor: float = 0.2

    def shared(
        self, importance: Float[Tensor, "batch group 1 slot"], prompt: Bool[Tensor, "batch group 1 slot"]
    ) -> Bool[Tensor, "batch group 1 slot"]:
        batch, groups, _, slots = importance.shape
        sure = min(self.budget, max(1, round(self.floor * self.budget), self.window + self.sinks))
        own = Chosen.largest(importance, prompt, sure).mask(slots)
        if self.budget == sure:
            return own
        rest = (prompt & ~own).view(batch, 1, 1, groups * slots)
        further = Chosen.largest(importance.reshape(rest.shape), rest, groups * (self.budget - sure))
        return own | further.mask(groups * slots).view(own.shape)
