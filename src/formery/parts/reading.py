"""Rules for what a prompt's tokens look at: a share of all pairs of a token and one before it, chosen once a prompt.

Those that look at the prompt's last tokens to find out what matters need the prompt in one pass.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from formery.errors import FormeryError
from formery.parts.asking import Asked
from formery.parts.selection import CERTAIN, Rule


@dataclass(frozen=True)
class Shared(Rule):
    """A rule that chooses about this share of all pairs, in each row of its own prompt's."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise FormeryError(f"a share lies above 0 and not above 1, not at {self.share}.")

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        return None if self.share == 1 else self.chosen(asked) & asked.allowed

    @abstractmethod
    def chosen(self, asked: Asked) -> Bool[Tensor, "batch #group time slot"]:
        """What is chosen, be it to be seen or not."""

    def pairs(self, asked: Asked) -> Float[Tensor, "batch"]:
        """How many pairs each row may look at."""
        return self.share * asked.since * (asked.since + 1) / 2


@dataclass(frozen=True)
class Near(Shared):
    """The first `sinks` tokens and the latest ones, as many as the share has room for."""

    sinks: int = 4

    def chosen(self, asked: Asked) -> Bool[Tensor, "batch 1 time slot"]:
        away = torch.arange(int(asked.since.max()) + 1, device=asked.since.device)
        left = (asked.since[:, None] - away).clamp(min=0)  # pairs on each diagonal
        fits = left.cumsum(1) + self.sinks * (left - 1).clamp(min=0) <= self.pairs(asked)[:, None]
        window = fits.sum(1).clamp(min=1)[:, None, None, None]
        query, key = asked.positions[:, None, :, None], asked.key_positions[:, None, None, :]
        return (key < self.sinks) | (query - key < window)


@dataclass(frozen=True)
class Blocks(Shared):
    """Blocks of `size` queries and `size` keys, for each block of queries those whose means score highest.

    Its own block and the first are always among them (Jiang et al., "MInference 1.0: Accelerating Pre-filling for
    Long-Context LLMs via Dynamic Sparse Attention", 2024, the block-sparse pattern).
    """

    size: int = 16

    def chosen(self, asked: Asked) -> Bool[Tensor, "batch group time slot"]:
        number = -(-int(asked.since.max()) // self.size)
        own, other = (at.clamp(min=0) // self.size for at in (asked.positions, asked.key_positions))
        own, other = own.clamp(max=number - 1), other.clamp(max=number - 1)
        read = (asked.key_positions >= 0) & (asked.key_positions < asked.since[:, None])
        score = self.scores(
            asked, means(own, ~asked.written & (asked.positions >= 0), number), means(other, read, number)
        )
        block = torch.arange(number, device=score.device)
        before = block <= block[:, None]
        score = score.masked_fill((block == 0) | (block == block[:, None]), CERTAIN).masked_fill(~before, -CERTAIN)
        rank = score.argsort(-1, descending=True).argsort(-1)
        chosen = (rank < self.most(asked, number)[:, None, None, None]) & before
        rows = torch.arange(len(own), device=own.device)[:, None, None]
        return chosen.transpose(0, 1)[:, rows, own[:, :, None], other[:, None, :]].transpose(0, 1)

    def scores(self, asked: Asked, own: Tensor, other: Tensor) -> Float[Tensor, "batch group block block"]:
        """The mean score of each block, up to a factor; own, other: the share of each token in its block's mean."""
        query = asked.query.view(len(own), asked.groups, -1, *asked.query.shape[2:]).sum(2)
        query, keys = own[:, None].to(query.dtype) @ query, other[:, None].to(query.dtype) @ asked.keys
        score = query @ keys.transpose(-1, -2) * asked.scale
        if asked.bias is None:
            return score
        bias = asked.grouped(asked.bias.expand(len(own), -1, -1, -1))
        return score + own[:, None].to(bias.dtype) @ bias @ other[:, None].to(bias.dtype).transpose(-1, -2)

    def most(self, asked: Asked, number: int) -> Int[Tensor, "batch"]:
        """How many blocks each block of queries may look at."""
        count = torch.arange(number + 1, device=asked.since.device)
        blocks = -(-asked.since[:, None] // self.size)
        within = torch.minimum(count, blocks)
        cost = within * blocks - within * (within - 1) / 2
        return (cost <= self.share * blocks * (blocks + 1) / 2).sum(1).sub(1).clamp(min=2)


def means(
    block: Int[Tensor, "batch token"], real: Bool[Tensor, "batch token"], number: int
) -> Float[Tensor, "batch block token"]:
    """The weights that make of tokens the mean of each block of the real ones."""
    member = (one_hot(block, number) * real[..., None]).transpose(1, 2)
    return member / member.sum(-1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Lines(Shared):
    """Columns (keys, for all queries) and diagonals (distances) that the last `probe` tokens look at most.

    Half of the share goes to columns and half to diagonals, alike in each group of heads; the first column and the main
    diagonal are always among them (Jiang et al., "MInference 1.0", 2024, the vertical-slash pattern).
    """

    probe: int = 64

    def chosen(self, asked: Asked) -> Bool[Tensor, "batch group time slot"]:
        furthest = max(1, int(asked.since.max()))
        columns, diagonals = self.weights(asked, furthest)
        left = asked.since[:, None]
        costs = tuple(
            (left - one).clamp(min=0)[:, None].expand(weight.shape)
            for one, weight in (
                (asked.key_positions.clamp(min=0), columns),
                (torch.arange(furthest, device=left.device), diagonals),
            )
        )
        on = self.taken((columns, diagonals), costs, self.pairs(asked)[:, None, None])
        away = asked.positions[:, :, None] - asked.key_positions[:, None, :]
        away = away.clamp(0, furthest - 1)[:, None].expand(-1, asked.groups, -1, -1)
        return on[0][:, :, None] | on[1][:, :, None].expand(-1, -1, away.shape[2], -1).gather(-1, away)

    def weights(
        self, asked: Asked, furthest: int
    ) -> tuple[Float[Tensor, "batch group slot"], Float[Tensor, "batch group away"]]:
        """How much the last tokens look at each slot, and at each distance."""
        last, real = asked.last_read(self.probe)
        whole = asked.since.clamp(max=self.probe) == real.sum(1)
        if not bool(whole.all()):
            raise FormeryError("this rule looks at a prompt's last tokens: read the prompt in one pass.")
        _, weights = last.weighed()
        weights = asked.grouped(weights) * real[:, None, :, None]
        away = (last.positions[:, :, None] - asked.key_positions[:, None, :]).clamp(0, furthest - 1)
        empty = weights.new_zeros(*weights.shape[:2], furthest)
        place = away.flatten(1)[:, None].expand(-1, asked.groups, -1)
        columns, diagonals = weights.sum(2), empty.scatter_add(-1, place, weights.flatten(2))
        prompt = (asked.key_positions >= 0) & (asked.key_positions < asked.since[:, None])
        columns = columns.masked_fill(~prompt[:, None], -CERTAIN)
        columns = columns.masked_fill((asked.key_positions == 0)[:, None], CERTAIN)
        diagonals[..., 0] = CERTAIN
        return columns, diagonals

    def taken(
        self, weights: tuple[Tensor, ...], costs: tuple[Tensor, ...], pairs: Tensor
    ) -> list[Bool[Tensor, "batch group line"]]:
        """The heaviest lines of each kind, as long as they cost no more than half of the pairs."""
        found = []
        for weight, cost in zip(weights, costs, strict=True):
            order = weight.argsort(-1, descending=True)
            fits = cost.gather(-1, order).cumsum(-1) <= pairs / 2
            fits[..., 0] = True
            found.append(torch.zeros_like(fits).scatter(-1, order, fits))
        return found


@dataclass(frozen=True)
class CoveringLines(Lines):
    """As `Lines`, where each group of heads takes as few lines of each kind as cover one part of what is looked at.

    That part is the same for all groups of a layer and both kinds, and as large as their pairs together allow (after
    Lai et al., "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference", 2025,
    who fix the part, not the pairs, and choose blocks in some heads).
    """

    def taken(
        self, weights: tuple[Tensor, ...], costs: tuple[Tensor, ...], pairs: Tensor
    ) -> list[Bool[Tensor, "batch group line"]]:
        before, orders = [], []
        for weight in weights:
            order = weight.argsort(-1, descending=True)
            heaviest = weight.gather(-1, order)
            real = heaviest.masked_fill((heaviest >= CERTAIN) | (heaviest < 0), 0)
            covered = real.cumsum(-1) / real.sum(-1, keepdim=True).clamp(min=1e-9)
            # What is certain comes first, and what is no line at all last.
            first = (covered - real / real.sum(-1, keepdim=True).clamp(min=1e-9)).masked_fill(heaviest >= CERTAIN, -1)
            before.append(first.masked_fill(heaviest < 0, 2))
            orders.append(order)
        cost = torch.cat([one.gather(-1, order) for one, order in zip(costs, orders, strict=True)], -1)
        batch, groups, lines = cost.shape
        turn = torch.cat(before, -1).flatten(1).argsort(dim=-1, stable=True)
        fits = cost.flatten(1).gather(-1, turn).cumsum(-1) <= groups * pairs[:, :, 0]
        on = torch.zeros_like(fits).scatter(-1, turn, fits).view(batch, groups, lines)
        certain = torch.cat(before, -1) < 0
        parts = (on | certain).split([weight.shape[-1] for weight in weights], -1)
        return [torch.zeros_like(part).scatter(-1, order, part) for part, order in zip(parts, orders, strict=True)]
