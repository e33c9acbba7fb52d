"""Token shards: a text of any length as files of plain numbers, and training batches read from it place by place.

A place is read when it is needed and nothing is kept, so that a corpus takes no memory. (A mapped file would: its pages
count as resident until somebody else needs the room.) Which windows an epoch has, and in which order, follows from seed
and step alone.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy
import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.tokenise import INDEX
from formery.errors import FormeryError, first_line

TYPES = ("uint16", "uint32")
ROUNDS = 4  # of the shuffling network; fewer leave neighbours near each other


class Shards:
    """The tokens of a folder that `tokenise` wrote, one long text.

    Raises FormeryError where the index is damaged or a shard has not the length that it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.dtype = numpy.dtype(index["dtype"])
        self.tokenizer: str = index["tokenizer"]
        counts = []
        for shard in index["shards"]:
            path = self.folder / shard["file"]
            if not path.is_file() or path.stat().st_size != shard["tokens"] * self.dtype.itemsize:
                raise FormeryError(f"{path} is not the shard that {INDEX} tells of: tokenise the corpus again.")
            counts.append(int(shard["tokens"]))
        self.ends = list(accumulate(counts))
        self.paths = [self.folder / shard["file"] for shard in index["shards"]]

    def __len__(self) -> int:
        """How many tokens there are."""
        return self.ends[-1] if self.ends else 0

    def take(self, start: int, count: int) -> Int[Tensor, " count"]:
        """The tokens from place `start` on; after the last comes the first."""
        found = numpy.empty(count, self.dtype)
        done = 0
        while done < count:
            place = (start + done) % len(self)
            shard = bisect_right(self.ends, place)
            some = min(count - done, self.ends[shard] - place)
            before = self.ends[shard - 1] if shard else 0
            found[done : done + some] = self._read(shard, place - before, some)
            done += some
        return torch.from_numpy(found.astype(numpy.int64))

    def _read(self, shard: int, offset: int, count: int) -> numpy.ndarray:
        width = self.dtype.itemsize
        try:
            with self.paths[shard].open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), count * width, offset * width)
        except OSError as error:
            raise FormeryError(f"{self.paths[shard]} cannot be read: {error.strerror}.") from error
        if len(data) != count * width:
            raise FormeryError(f"{self.paths[shard]} has become shorter while it was read: tokenise the corpus again.")
        return numpy.frombuffer(data, self.dtype)


class ShardBatches:
    """Batches of contiguous windows of token shards, for next-token training; endless, and without memory of their own.

    An epoch draws an offset, cuts the text from there into windows that touch and don't overlap, and has each of them
    once, in an order that is computed place by place; the text is a ring. Raises FormeryError when the text is shorter
    than a window.
    """

    def __init__(self, shards: Shards, length: int, batch_size: int, seed: int = 0) -> None:
        if length < 1 or batch_size < 1:
            raise FormeryError(
                f"windows of {length} tokens in batches of {batch_size} hold nothing; ask for 1 or more."
            )
        if len(shards) < length + 1:
            raise FormeryError(
                f"{shards.folder} has {len(shards)} tokens, too few for a window of {length} and the token after it; "
                "give more text or shorten the window."
            )
        self.shards, self.length, self.batch_size, self.seed = shards, length, batch_size, seed
        self.windows = len(shards) // length

    def start(self, place: int) -> int:
        """Where the window begins that is the `place`-th of all epochs."""
        epoch, place = divmod(place, self.windows)
        keys = numpy.random.default_rng((self.seed, epoch)).integers(2**62, size=ROUNDS + 1)
        *network, offset = map(int, keys)
        return offset % len(self.shards) + self.length * shuffled(place, self.windows, network)

    def batch(self, step: int) -> dict[str, Int[Tensor, "batch window"]]:
        """{"tokens": Int[Tensor, "batch length+1"]}, the last column being only a target."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return {"tokens": torch.stack([self.shards.take(self.start(one), self.length + 1) for one in places])}


def shuffled(place: int, count: int, keys: Sequence[int]) -> int:
    """Where a permutation of 0 … count - 1 puts `place`: a Feistel network over the next power of four, walked on while
    it leads outside (Black and Rogaway, 2002, "Ciphers with Arbitrary Finite Domains").
    """
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for key in keys:
            mixed = (right ^ key) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32 & mask)
        place = left << half | right
        if place < count:
            return place


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FormeryError(f"{folder} holds no token shards (no {INDEX}): `formery data tokenise` writes them.")
    try:
        index = json.loads(path.read_text())
        whole = index["format"] == 1 and index["dtype"] in TYPES and isinstance(index["tokenizer"], str)
        for shard in index["shards"]:
            name, tokens = shard["file"], shard["tokens"]
            whole = whole and isinstance(tokens, int) and tokens >= 0 and Path(name).name == name
        if not whole:
            raise ValueError("it is of another format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormeryError(f"{path} is damaged ({first_line(error)}): tokenise the corpus again.") from error
    return dict(index)
