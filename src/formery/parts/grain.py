"""What is kept of a chunk of text: evenly much of it, or little of most and more of what is like a query."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from formery.errors import FormeryError
from formery.parts.part import Described


class Grain(Described):
    """What of a chunk is kept: nodes, pieces of one length at each level, and every so-manieth token of each."""

    @property
    def levels(self) -> Sequence[tuple[int, int]]:
        """For each level of nodes: how many there are, and of how many tokens one is kept."""
        raise NotImplementedError

    def preserved(self, likeness: Float[Tensor, "*rest node"]) -> Bool[Tensor, "*rest node"]:
        """Which nodes, level by level, are read where they are so much like the query."""
        raise NotImplementedError

    def kept(self, chunk: int) -> list[int]:
        """For each level, how many entries a node keeps; raises FormeryError where the chunk does not divide so."""
        for nodes, ratio in self.levels:
            if chunk % (nodes * ratio):
                raise FormeryError(
                    f"a chunk of {chunk} tokens does not divide into {nodes} nodes that keep 1 of {ratio}."
                )
        return [chunk // (nodes * ratio) for nodes, ratio in self.levels]


@dataclass(frozen=True)
class Tree(Grain):
    """A binary tree of `height` levels below the chunk; of a leaf every `finest`-th token is kept."""

    height: int = 3
    finest: int = 4

    @property
    def levels(self) -> Sequence[tuple[int, int]]:
        return [(2**level, self.finest * 2 ** (self.height - level)) for level in range(1, self.height + 1)]

    def preserved(self, likeness: Float[Tensor, "*rest node"]) -> Bool[Tensor, "*rest node"]:
        preserved = torch.zeros_like(likeness, dtype=torch.bool)
        left = torch.zeros_like(likeness[..., :1], dtype=torch.long)  # the first of the pair that is looked at
        for level in range(1, self.height + 1):
            pair = likeness.gather(-1, torch.cat((left, left + 1), -1))
            right = self.goes_right(pair)
            if level == self.height:
                preserved = preserved.scatter(-1, left, True).scatter(-1, left + 1, True)
                break
            preserved = preserved.scatter(-1, left + (~right).long(), True)
            # Levels lie one behind the other; the pair below node i of a level is 2 i, 2 i + 1 of the next.
            place = left + right.long() - (2**level - 2)
            left = 2 ** (level + 1) - 2 + 2 * place
        return preserved

    def goes_right(self, likeness: Float[Tensor, "*rest 2"]) -> Bool[Tensor, "*rest 1"]:
        """Whether the right one of a pair is gone into."""
        return likeness[..., 1:] >= likeness[..., :1]


@dataclass(frozen=True)
class BlindTree(Tree):
    """As Tree, but the right one is always gone into: what stands nearest to the running text."""

    def goes_right(self, likeness: Float[Tensor, "*rest 2"]) -> Bool[Tensor, "*rest 1"]:
        return torch.ones_like(likeness[..., :1], dtype=torch.bool)


@dataclass(frozen=True)
class Even(Grain):
    """No tree: every `ratio`-th token of the chunk."""

    ratio: int = 8

    @property
    def levels(self) -> Sequence[tuple[int, int]]:
        return [(1, self.ratio)]

    def preserved(self, likeness: Float[Tensor, "*rest node"]) -> Bool[Tensor, "*rest node"]:
        return torch.ones_like(likeness, dtype=torch.bool)
