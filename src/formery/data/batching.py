"""Rows of unequal length as one tensor, and training batches that are a pure function of seed and step.

A source of batches keeps no position: after an interruption, `batch(step)` gives the very batch that would
have come.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy
import torch
from jaxtyping import Int
from torch import Tensor

from formery.errors import FormeryError


def pad(
    rows: Sequence[Sequence[int]], value: int, side: Literal["left", "right"] = "right"
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """The rows filled up with `value` to one width, and each token's position in its row, -1 where filled."""
    width = max(map(len, rows), default=0)
    tokens = torch.full((len(rows), width), value, dtype=torch.long)
    positions = torch.full((len(rows), width), -1, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[i, where] = torch.tensor(row, dtype=torch.long)
        positions[i, where] = torch.arange(len(row))
    return tokens, positions


class WindowBatches:
    """Batches of contiguous windows of one long text, for next-token training; endless.

    ids: Int[Tensor, "total"], of any integer type. An epoch draws an offset, cuts the text from there into
    windows that touch and don't overlap, and shuffles them; the text is a ring, so that every place of it
    is seen equally often. Raises FormeryError when the text is shorter than a window.
    """

    def __init__(self, ids: Int[Tensor, " total"], length: int, batch_size: int, seed: int = 0) -> None:
        if length < 1 or batch_size < 1:
            raise FormeryError(
                f"windows of {length} tokens in batches of {batch_size} hold nothing; ask for 1 or more."
            )
        if len(ids) < length + 1:
            raise FormeryError(
                f"the text has {len(ids)} tokens, too few for a window of {length} and the token after it; "
                "give more text or shorten the window."
            )
        self.ids = ids
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.windows = len(ids) // length
        self.starts = lru_cache(maxsize=2)(self._starts)

    def _starts(self, epoch: int) -> Int[Tensor, " windows"]:
        random = numpy.random.default_rng((self.seed, epoch))
        offset = int(random.integers(len(self.ids)))
        return torch.from_numpy(offset + self.length * random.permutation(self.windows))

    def batch(self, step: int) -> dict[str, Int[Tensor, "batch window"]]:
        """{"tokens": Int[Tensor, "batch length+1"]}, the last column being only a target."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        starts = torch.stack([self.starts(place // self.windows)[place % self.windows] for place in places])
        index = (starts[:, None] + torch.arange(self.length + 1)) % len(self.ids)
        return {"tokens": self.ids[index].long()}


class PairBatches:
    """Batches of (source, target) id lists of like length, for training a translator; endless.

    pairs: as the model shall see them, targets with their <bos> and <eos>. A batch has at most
    `tokens_per_batch` ids, both sides and the padding counted; an epoch has each pair once. Lengths are
    compared in steps of `bucket` tokens: which pairs of like length meet in a batch, and the order of the
    batches, are drawn anew each epoch. Raises FormeryError for an empty list, an empty side or a pair that
    is longer than a batch.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        tokens_per_batch: int,
        pad: int,
        seed: int = 0,
        bucket: int = 4,
    ) -> None:
        if not pairs or not all(source and target for source, target in pairs):
            raise FormeryError(
                "pairs to train on need a source and a target that are not empty, and at least one pair."
            )
        self.pairs = pairs
        self.pad = pad
        self.seed = seed
        # Rounded lengths, sorted, are the same in every epoch, and so are the cuts between batches.
        lengths = numpy.array([[len(target), len(source)] for source, target in pairs])
        self.rounded = (lengths + bucket - 1) // bucket
        sizes = bucket * self.rounded[self._order(0)]
        longest = int(sizes.sum(1).max())
        if longest > tokens_per_batch:
            raise FormeryError(
                f"a pair takes {longest} tokens of a batch (lengths rounded up to {bucket}), more than the "
                f"{tokens_per_batch} allowed; raise the budget or leave out long pairs."
            )
        self.cuts = [0]
        widest = numpy.zeros(2, dtype=int)
        for i, size in enumerate(sizes):
            widest = numpy.maximum(widest, size)
            if (i + 1 - self.cuts[-1]) * widest.sum() > tokens_per_batch:
                self.cuts.append(i)
                widest = size
        self.cuts.append(len(pairs))
        self.order = lru_cache(maxsize=2)(self._order)
        self.turns = lru_cache(maxsize=2)(self._turns)

    @property
    def batches(self) -> int:
        """How many batches an epoch has."""
        return len(self.cuts) - 1

    def _order(self, epoch: int) -> numpy.ndarray:
        ties = numpy.random.default_rng((self.seed, epoch, 0)).random(len(self.rounded))
        return numpy.lexsort((ties, self.rounded[:, 1], self.rounded[:, 0]))

    def _turns(self, epoch: int) -> numpy.ndarray:
        return numpy.random.default_rng((self.seed, epoch, 1)).permutation(self.batches)

    def batch(self, step: int) -> dict[str, Int[Tensor, "batch time"]]:
        """The ids "source" and "tokens", with "source_positions" and "positions", which are -1 at padding."""
        epoch, place = divmod(step, self.batches)
        turn = self.turns(epoch)[place]
        chosen = [self.pairs[i] for i in self.order(epoch)[self.cuts[turn] : self.cuts[turn + 1]]]
        source, source_positions = pad([source for source, _ in chosen], self.pad)
        tokens, positions = pad([target for _, target in chosen], self.pad)
        return {
            "source": source,
            "source_positions": source_positions,
            "tokens": tokens,
            "positions": positions,
        }
