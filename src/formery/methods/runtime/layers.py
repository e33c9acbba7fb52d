"""One layer's attention in a step of decoding: random queries, keys and values, and what attention to them is."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from formery.parts.context import Visibility
from formery.parts.kernels.eager import eager


@dataclass(frozen=True)
class Shape:
    """heads, of which `groups` have keys and values, of `dim` numbers in float32."""

    heads: int = 8
    groups: int = 2
    dim: int = 64

    def drawn(self, slots: int, seed: int, rows: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """A query a row, and keys and values, laid out as a state has them; the same for the same seed."""
        draw = torch.Generator().manual_seed(seed)
        shapes = ((1, self.heads), (slots, self.groups), (slots, self.groups))
        query, keys, values = (torch.randn(rows, length, heads, self.dim, generator=draw) for length, heads in shapes)
        return query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)


def reach(lengths: Sequence[int]) -> Visibility:
    """Sight of the first lengths[row] slots of each row."""
    if min(lengths) == max(lengths):
        return Visibility()
    return Visibility((torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None])


def plain(
    query: Float[Tensor, "batch head time dim"],
    keys: Float[Tensor, "batch group slot dim"],
    values: Float[Tensor, "batch group slot dim"],
    sight: Visibility = Visibility(),  # noqa: B008 - it never changes
) -> Float[Tensor, "batch head time dim"]:
    """Attention by the formula, in float64."""
    wide = (query.double(), keys.double(), values.double())
    return eager(*wide, sight, None, query.shape[-1] ** -0.5, None, 0.0)[0]
