"""The way into a model from token ids, and the way out to logits."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.kernels.product import product
from formery.parts.linear import Linear
from formery.parts.part import Part, normal
from formery.parts.position import Position


class Embedding(Part):
    """`norm(position(weight[token] * scale))`.

    weight: [vocabulary, width]. position, norm: what is done to the vectors, if anything.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        position: Position | None = None,
        norm: Part | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        deviation: float = 0.02,
    ):
        super().__init__()
        self.vocabulary, self.width, self.position, self.norm = vocabulary, width, position, norm
        self.scale, self.dropout, self.deviation = scale, dropout, deviation
        self.weight = normal(vocabulary, width, deviation=deviation)

    def forward(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        hidden = nn.functional.embedding(tokens, self.weight)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        if self.position is not None:
            hidden = self.position.embed(hidden, context)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return nn.functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


class Output(Part):
    """Logits by a map of its own: `soft_cap · tanh(map(x) / soft_cap)`."""

    def __init__(self, width: int, vocabulary: int, bias: bool = False, soft_cap: float | None = None):
        super().__init__()
        self.width, self.vocabulary, self.bias, self.soft_cap = width, vocabulary, bias, soft_cap
        self.map = Linear(width, vocabulary, bias)

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocabulary"]:
        return capped(self.map(hidden), self.soft_cap)


class TiedOutput(Part):
    """Logits by the embedding's own table: `soft_cap · tanh(scale · x · weightᵀ / soft_cap)`.

    bias: an added learned vector over the vocabulary.
    """

    def __init__(self, embedding: Embedding, scale: float = 1.0, bias: bool = False, soft_cap: float | None = None):
        super().__init__()
        self.embedding, self.scale, self.soft_cap = embedding, scale, soft_cap
        self.shift = nn.Parameter(torch.zeros(embedding.vocabulary)) if bias else None

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added."""
        return self.shift is not None

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocabulary"]:
        scaled = hidden if self.scale == 1.0 else hidden * self.scale
        return capped(product(scaled, self.embedding.weight, self.shift), self.soft_cap)


def capped(logits: Float[Tensor, "..."], soft_cap: float | None) -> Float[Tensor, "..."]:
    """The logits bounded to ±soft_cap, or as they are."""
    return logits if soft_cap is None else soft_cap * torch.tanh(logits / soft_cap)
