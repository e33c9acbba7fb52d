"""Residual layouts: how a sub-layer is normalised and added to the stream. A layer is a list of them."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from formery.parts.context import Context
from formery.parts.part import Part


class PreNorm(Part):
    """`x + inner(norm(x))`."""

    def __init__(self, norm: Part, inner: Part, dropout: float = 0.0):
        super().__init__()
        self.norm, self.inner, self.dropout = norm, inner, dropout

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return hidden + _drop(self, self.inner(self.norm(hidden), context))


class PostNorm(Part):
    """`norm(x + inner(x))`."""

    def __init__(self, norm: Part, inner: Part, dropout: float = 0.0):
        super().__init__()
        self.norm, self.inner, self.dropout = norm, inner, dropout

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return self.norm(hidden + _drop(self, self.inner(hidden, context)))


class Sandwich(Part):
    """`x + after(inner(before(x)))`."""

    def __init__(self, before: Part, inner: Part, after: Part, dropout: float = 0.0):
        super().__init__()
        self.before, self.inner, self.after, self.dropout = before, inner, after, dropout

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return hidden + _drop(self, self.after(self.inner(self.before(hidden), context)))


class Parallel(Part):
    """`x + Σ inner_i(norm_i(x))`; with a single norm it is computed once and read by all.

    norms: one for each inner part, or just one.
    """

    def __init__(self, norms: Sequence[Part], inners: Sequence[Part], dropout: float = 0.0):
        super().__init__()
        if len(norms) not in (1, len(inners)):
            raise ValueError(f"{len(norms)} norms for {len(inners)} parallel parts: give one, or one for each")
        self.norms, self.inners, self.dropout = nn.ModuleList(norms), nn.ModuleList(inners), dropout

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        normed = [norm(hidden) for norm in self.norms] * (len(self.inners) if len(self.norms) == 1 else 1)
        return hidden + sum(_drop(self, inner(one, context)) for inner, one in zip(self.inners, normed, strict=True))


class Layer(Part):
    """Residual sub-layers, one after the other."""

    def __init__(self, sublayers: Sequence[Part]):
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        for sublayer in self.sublayers:
            hidden = sublayer(hidden, context)
        return hidden


def _drop(part: Part, update: Tensor) -> Tensor:
    dropout = part.dropout
    assert isinstance(dropout, float | int)
    return nn.functional.dropout(update, float(dropout), part.training) if dropout and part.training else update
