"""Rules that watch: what layers choose in common, and how much a rule chooses."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Bool
from torch import Tensor

from formery.parts.asking import Asked, Chosen
from formery.parts.context import Visibility
from formery.parts.selection import Rule


class Noting(Rule):
    """Leaves nothing out, and notes what each layer would have chosen for the last query of a pass."""

    def __init__(self, budget: int):
        self.budget, self.sets = budget, list[Tensor]()

    def __call__(self, asked: Asked) -> None:
        _, weights = asked.weighed()
        chosen = Chosen.largest(asked.grouped(weights), asked.allowed, self.budget)
        self.sets.append(chosen.mask(asked.keys.shape[2])[:, :, -1])

    def overlap(self, layer: int, other: int) -> float:
        """The share of one layer's choices that are another's too, head by head."""
        return float((self.sets[layer] & self.sets[other]).sum() / self.sets[layer].sum())


class Counting(Rule):
    """Chooses as `rule` does, and counts: pairs of a query and a key that it chose, of those that may be seen.

    writing: whether queries behind the prompt are counted, or those of the prompt.
    """

    def __init__(self, rule: Rule, writing: bool):
        self.rule, self.writing, self.chosen, self.all = rule, writing, 0, 0

    def __call__(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        mask = self.rule(asked)
        counted = asked.written if self.writing else ~asked.written & (asked.positions >= 0)
        allowed = asked.allowed & counted[:, None, :, None]
        self.all += int(allowed.count_nonzero())
        self.chosen += int((allowed if mask is None else mask & allowed).count_nonzero())
        return mask

    @property
    def share(self) -> float:
        """The part that was chosen."""
        return self.chosen / max(1, self.all)


def ratio(first: Callable[[], object], second: Callable[[], object], times: int) -> float:
    """The seconds that the first takes over those of the second, in turn, after one run each to warm up."""
    spent = [0.0, 0.0]
    for turn in range(-1, times):
        for which, run in enumerate((first, second)):
            began = time.perf_counter()
            run()
            spent[which] += time.perf_counter() - began if turn >= 0 else 0.0
    return spent[0] / spent[1]


def random_asked(groups: int, width: int, slots: int, seed: int = 0) -> Asked:
    """One query of each of `groups` heads behind so many tokens, of random numbers, to be timed."""
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(1, slots, groups, width, generator=draw).transpose(1, 2) for _ in range(2))
    query = torch.randn(1, groups, 1, width, generator=draw)
    at = torch.tensor([[slots - 1]])
    return Asked(query, keys, values, None, Visibility(), at, torch.arange(slots)[None], at[0], width**-0.5, None)
