"""Weights by which a decoder that is told no positions counts them and attends by distance (NoPE, theorems 1, 2)."""

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.models import Decoder
from formery.parts import MLP, Attention, Context, Embedding, Layer, Linear, Output, Part


class Plain(Part):
    """`x + inner(x)`: a sub-layer without a norm, as exact constructions need it."""

    def __init__(self, inner: Part):
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return hidden + self.inner(hidden, context)


@torch.no_grad()
def counting(vocabulary: int, begin: int, length: int, slope: float = 1.0) -> Decoder:
    """A decoder without position encoding whose first layer writes each token's place 1, 2, … into its vectors.

    Its second layer attends by `softmax(-slope · distance)`, as one head of ALiBi does. begin: the token that each
    text begins with, and that is nowhere else. length: how far it counts. The vectors hold [is `begin`, 1, 1 / t, t,
    what the second layer reads]: its last entry is 1 where the token was `begin`, weighted by that attention.
    Raises FormeryError for a length below 2.
    """
    if length < 2:
        raise FormeryError(f"counting goes to at least 2, not to {length}.")
    embedding, output = Embedding(vocabulary, 5), Output(5, 5)
    signs = _blank(embedding)
    signs[begin, 0], signs[:, 1] = 1, 1
    _blank(output.map).fill_diagonal_(1)
    layers = [Layer([Plain(_mean()), Plain(_reciprocal(length))]), Layer([Plain(_by_distance(slope))])]
    return Decoder(embedding, layers, None, output, length)


def _mean() -> Attention:
    """Reads the mean of entry 0 over all tokens so far, 1 / t, into entry 2."""
    part = Attention(5, 1, head_width=2)
    _, _, value, output = map(_blank, (part.query, part.key, part.value, part.output))
    value[0, 0] = output[2, 0] = 1
    return part


def _reciprocal(length: int) -> MLP:
    """Writes `t = 1 + 2 · Σ relu(1 - s · x)`, s from 1 to length - 1, into entry 3 where entry 2 is `x = 1 / t`.

    Only s < t count: their sum is (t - 1) / 2.
    """
    part = MLP(5, length, activation="relu")
    up, down = _blank(part.up), _blank(part.down)
    up[:, 1], up[:-1, 2] = 1, -torch.arange(1.0, length)
    down[3, :-1], down[3, -1] = 2, 1  # the last unit is the 1 in front of the sum
    return part


def _by_distance(slope: float) -> Attention:
    """Scores keys by `slope · (t_key - t_query)`, and reads entry 0 of what it looks at into entry 4."""
    part = Attention(5, 1, head_width=2, scale=slope)
    query, key, value, output = map(_blank, (part.query, part.key, part.value, part.output))
    query[0, 3] = query[1, 1] = 1
    key[0, 1], key[1, 3] = -1, 1
    value[0, 0] = output[4, 0] = 1
    return part


def _blank(part: Linear | Embedding) -> Tensor:
    """A part's weights, all zero."""
    assert isinstance(part.weight, Tensor)
    return part.weight.zero_()
