"""What came after runs of tokens: a large corpus that stays as it is, and counts that grow with a text."""

from collections.abc import Sequence
from functools import cached_property

import numpy
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.models.guide import Guide

Followers = dict[int, float]  # how often each token came next

MOST = 256  # places of a run that are looked at: the share of a frequent run's followers is known well enough by then
MULTIPLIER = numpy.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing


class Corpus:
    """Tokens in order, and for each run of `shortest` to `longest` of them what followed it.

    Runs are found by a hash of 64 bits; a run that is not there could only be found by a collision, and then a guess
    would be wrong, nothing else.
    """

    def __init__(self, tokens: Int[Tensor, "count"], shortest: int, longest: int):
        self.tokens = tokens.cpu().numpy().astype(numpy.int64)
        self.sizes = range(longest, shortest - 1, -1)
        self.known: dict[tuple[int, ...], Followers] = {}

    @cached_property
    def _sorted(self) -> dict[int, tuple[NDArray[numpy.uint64], NDArray[numpy.int64]]]:
        """For each size the hashes of all runs in order, and the places behind them."""
        found, ids = {}, self.tokens.astype(numpy.uint64) + numpy.uint64(1)
        for size in self.sizes:
            count = max(0, len(ids) - size)
            hashes = numpy.zeros(count, dtype=numpy.uint64)
            for place in range(size):
                hashes = (hashes + ids[place : place + count]) * MULTIPLIER
            order = hashes.argsort(kind="stable")
            found[size] = hashes[order], order + size
        return found

    def after(self, run: tuple[int, ...]) -> Followers:
        """What followed that run."""
        if run not in self.known:
            ids = numpy.asarray(run, dtype=numpy.uint64) + numpy.uint64(1)
            key = numpy.zeros(1, dtype=numpy.uint64)
            for one in ids:
                key = (key + one) * MULTIPLIER
            hashes, places = self._sorted[len(run)]
            first, last = (int(hashes.searchsorted(key[0], side)) for side in ("left", "right"))
            chosen = places[first:last]
            if len(chosen) > MOST:  # drawn, since what is periodic in the corpus would fool regular steps
                chosen = numpy.random.default_rng(0).choice(chosen, MOST, replace=False)
            tokens, counts = numpy.unique(self.tokens[chosen], return_counts=True)
            each = (last - first) / max(1, len(chosen))
            self.known[run] = dict(zip(tokens.tolist(), (counts * each).tolist(), strict=True))
        return self.known[run]


class CorpusGuide(Guide):
    """A corpus of `count` tokens; it has nothing to learn.

    width: of the vectors of the model that wrote it. vocabulary: how many tokens there are.
    """

    def __init__(self, width: int, vocabulary: int, count: int):
        super().__init__()
        self.width, self.vocabulary, self.count = width, vocabulary, count
        kind = torch.int16 if vocabulary <= 2**15 else torch.int32
        self.tokens = nn.Parameter(torch.zeros(count, dtype=kind), requires_grad=False)
        self._indexed: dict[tuple[int, int], Corpus] = {}

    def corpus(self, shortest: int, longest: int) -> Corpus:
        """The corpus, its runs indexed once."""
        if (shortest, longest) not in self._indexed:
            self._indexed[shortest, longest] = Corpus(self.tokens.detach(), shortest, longest)
        return self._indexed[shortest, longest]


class Counts:
    """What followed each run of `shortest` to `longest` tokens in a text that grows."""

    def __init__(self, shortest: int, longest: int):
        if not 1 <= shortest <= longest:
            raise FormeryError(f"runs need 1 <= shortest <= longest, not shortest {shortest}, longest {longest}.")
        self.sizes = range(longest, shortest - 1, -1)
        self.known: dict[tuple[int, ...], Followers] = {}

    def add(self, before: Sequence[int], token: int, weight: float = 1.0) -> None:
        """That token came after these."""
        for size in self.sizes:
            if size <= len(before):
                followers = self.known.setdefault(tuple(before[-size:]), {})
                followers[token] = followers.get(token, 0.0) + weight

    def after(self, run: tuple[int, ...]) -> Followers:
        """What followed that run."""
        return self.known.get(run, {})
