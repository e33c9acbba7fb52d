"""A mixture of experts: a router sends each token to a few of many feed-forwards."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.linear import Linear
from formery.parts.part import Part


class Experts(Part):
    """`Σ_i share_i · expert_i(x)` over the `active` likeliest experts (Shazeer et al., 2017; Jiang et al., 2024).

    share: softmax, in at least float32, of `router(x)` over all experts; normalised: the shares of those that run
    are made to sum to one. An expert computes only the tokens that are sent to it.
    """

    def __init__(self, width: int, experts: Sequence[Part], active: int, normalised: bool = True):
        super().__init__()
        if not 1 <= active <= len(experts):
            raise ValueError(f"{active} of {len(experts)} experts cannot run")
        self.width, self.active, self.normalised = width, active, normalised
        self.experts = nn.ModuleList(experts)
        self.router = Linear(width, len(experts))

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        tokens = hidden.flatten(0, 1)
        scores = self.router(tokens)
        likely = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).topk(self.active, -1)
        shares, chosen = likely
        if self.normalised:
            shares = shares / shares.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        for number in chosen.unique().tolist():
            places, ranks = (chosen == number).nonzero(as_tuple=True)
            made = self.experts[number](tokens[None, places], context)[0]
            mixed.index_add_(0, places, (made * shares[places, ranks, None]).to(mixed.dtype))
        return mixed.view_as(hidden)
