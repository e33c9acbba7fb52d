"""Cross-attention into keys and values that another stack of layers has made, chunk by chunk."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.parts.context import Context, Visibility
from formery.parts.kernels import attend
from formery.parts.linear import Linear
from formery.parts.norm import RMSNorm
from formery.parts.part import Part
from formery.parts.position import Position


class Crossing(Part):
    """Cross-attention over keys and values that were made elsewhere: a norm, a query map and an output map.

    query: the query map, as it begins. The output map begins at zero. The other arguments are as those of the attention
    that it follows.
    """

    def __init__(self, query: Linear, heads: int, key_value_heads: int, position: Position, scale: float | None = None):
        super().__init__()
        self.heads, self.key_value_heads, self.position, self.scale = heads, key_value_heads, position, scale
        self.dim = query.outputs // heads
        self.norm, self.query = RMSNorm(query.inputs), query
        self.output = Linear(query.outputs, query.inputs, gain=0.0)

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        keys: Float[Tensor, "batch slot group dim"],
        values: Float[Tensor, "batch slot group dim"],
        places: Int[Tensor, "slot"],
        place: int,
        allowed: Bool[Tensor, "batch time slot"],
    ) -> Float[Tensor, "batch time width"]:
        """What is added to `hidden`. places: the positions of the keys; place: that of all queries."""
        batch, time, _ = hidden.shape
        query = self.query(self.norm(hidden)).view(batch, time, self.heads, self.dim)
        query = self.position.rotate(query, Context(torch.full((1, time), place, device=hidden.device)))
        keys = self.position.rotate(keys, Context(places[None]))
        heads = (query.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2))
        mixed = attend(*heads, Visibility(allowed[:, None]), scale=self.scale)
        made: Tensor = self.output(mixed.transpose(1, 2).flatten(-2))
        return made
