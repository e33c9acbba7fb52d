"""The way into a model from token ids, and the way out to logits."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.parts.codes import Codes
from formery.parts.context import Context
from formery.parts.kernels.product import product
from formery.parts.linear import Linear
from formery.parts.native.mode import enabled
from formery.parts.part import Part, normal
from formery.parts.position import Position


class Embedding(Part):
    """`norm(position(lift(weight[token] * scale)))`.

    weight: [vocabulary, inner], inner being the width unless given. lift: a map from inner to width, where they differ
    (factorised embeddings; Lan et al., 2020). position, norm: what is done to the vectors, if anything. table:
    another embedding whose weight is this one's too.
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
        inner: int | None = None,
        lift: Part | None = None,
        table: "Embedding | None" = None,
    ):
        super().__init__()
        shape = (vocabulary, width if inner is None else inner)
        if table is not None and table.weight.shape != shape:
            raise ValueError(f"a table of {list(table.weight.shape)} cannot be shared as one of {list(shape)}")
        if lift is None and shape[1] != width:
            raise ValueError(f"a table of width {inner} needs a map to the width {width}")
        self.vocabulary, self.width, self.position, self.norm = vocabulary, width, position, norm
        self.scale, self.dropout, self.deviation = scale, dropout, deviation
        self.inner, self.lift, self.table = inner, lift, table
        self.weight: nn.Parameter | Codes = normal(*shape, deviation=deviation) if table is None else table.weight

    def looked_up(self, tokens: Int[Tensor, "..."]) -> Float[Tensor, "... width"]:
        """The vectors of tokens, before anything is done for their positions."""
        weight = self.weight
        hidden = weight.rows(tokens) if isinstance(weight, Codes) else nn.functional.embedding(tokens, weight)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return hidden if self.lift is None else cast(Tensor, self.lift(hidden))

    def forward(self, tokens: Int[Tensor, "batch time"], context: Context) -> Float[Tensor, "batch time width"]:
        hidden = self.looked_up(tokens)
        if self.position is not None:
            hidden = self.position.embed(hidden, context)
        if self.norm is not None:
            hidden = self.norm(hidden)
        return nn.functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden

    def places(self, tokens: Int[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
        """The positions of the vectors that it makes: 0, 1, 2, …."""
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)

    def collate(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"] | None]:
        """Texts as one batch, and their positions (-1: padding) where their lengths differ."""
        longest = max(len(prompt) for prompt in prompts)
        rows = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        tokens = torch.tensor(rows, dtype=torch.long)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        if bool((lengths == longest).all()):
            return tokens, None
        positions = torch.arange(longest).expand(tokens.shape)
        return tokens, positions.masked_fill(positions >= lengths[:, None], -1)


class Output(Part):
    """Logits by a map of its own: `soft_cap · tanh(map(x) / soft_cap)`."""

    def __init__(self, width: int, vocabulary: int, bias: bool = False, soft_cap: float | None = None):
        super().__init__()
        self.width, self.vocabulary, self.bias, self.soft_cap = width, vocabulary, bias, soft_cap
        self.map = Linear(width, vocabulary, bias)

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocabulary"]:
        return capped(self.map(hidden), self.soft_cap)


class TiedOutput(Part):
    """Logits by the embedding's own table: `soft_cap · tanh(scale · lower(x) · weightᵀ / soft_cap)`.

    bias: an added learned vector over the vocabulary. lower: a map to the table's width, where that is another.
    """

    def __init__(
        self,
        embedding: Embedding,
        scale: float = 1.0,
        bias: bool = False,
        soft_cap: float | None = None,
        lower: Part | None = None,
    ):
        super().__init__()
        self.embedding, self.scale, self.soft_cap, self.lower = embedding, scale, soft_cap, lower
        self.shift = nn.Parameter(torch.zeros(embedding.vocabulary)) if bias else None

    @property
    def bias(self) -> bool:
        """Whether a learned vector is added."""
        return self.shift is not None

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time vocabulary"]:
        lowered = hidden if self.lower is None else self.lower(hidden)
        scaled = lowered if self.scale == 1.0 else lowered * self.scale
        return capped(product(scaled, self.embedding.weight, self.shift), self.soft_cap)


def capped(logits: Float[Tensor, "..."], soft_cap: float | None) -> Float[Tensor, "..."]:
    """The logits bounded to ±soft_cap, or as they are."""
    if soft_cap is None:
        return logits
    library = enabled(logits)
    if library is not None:
        # PyTorch computes the last few of a tensor by another tangent than the rest.
        from formery.parts.native.program import CAP
        from formery.parts.native.stack import alone

        cap, width = soft_cap, logits.shape[-1]
        found = alone(library, logits, width, lambda writer: writer.step(CAP, 0, 1, a=width, e=cap))
        if found is not None:
            return found
    return soft_cap * torch.tanh(logits / soft_cap)
