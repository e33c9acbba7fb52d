"""Weights by which a decoder that is told no positions counts them and attends by distance (NoPE, theorems 1, 2)."""

import torch
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError
from formery.models import Decoder
from formery.parts import MLP, Attention, Context, Embedding, Layer, Output, Part


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
    embedding = Embedding(vocabulary, 5)
    embedding.weight.zero_()
    embedding.weight[begin, 0], embedding.weight[:, 1] = 1, 1
    layers = [Layer([Plain(_mean()), Plain(_reciprocal(length))]), Layer([Plain(_by_distance(slope))])]
    output = Output(5, 5)
    output.map.weight.copy_(torch.eye(5))
    return Decoder(embedding, layers, None, output, length)


def _mean() -> Attention:
    """Reads the mean of entry 0 over all tokens so far, 1 / t, into entry 2."""
    part = Attention(5, 1, head_width=2)
    for one in (part.query, part.key, part.value, part.output):
        one.weight.zero_()
    part.value.weight[0, 0] = part.output.weight[2, 0] = 1
    return part


def _reciprocal(length: int) -> MLP:
    """Writes `t = 1 + 2 · Σ relu(1 - s · x)`, s from 1 to length - 1, into entry 3 where entry 2 is `x = 1 / t`.

    Only s < t count: their sum is (t - 1) / 2.
    """
    part = MLP(5, length, activation="relu")
    part.up.weight.zero_()
    part.down.weight.zero_()
    part.up.weight[:, 1], part.up.weight[:-1, 2] = 1, -torch.arange(1.0, length)
    part.down.weight[3] = 2
    part.down.weight[3, -1] = 1  # the last unit is the 1 in front of the sum
    return part


def _by_distance(slope: float) -> Attention:
    """Scores keys by `-slope · (t_query - t_key)`, and reads entry 0 of what it looks at into entry 4."""
    part = Attention(5, 1, head_width=2, scale=slope)
    for one in (part.query, part.key, part.value, part.output):
        one.weight.zero_()
    part.query.weight[0, 3], part.query.weight[1, 1] = 1, 1
    part.key.weight[0, 1], part.key.weight[1, 3] = -1, 1
    part.value.weight[0, 0] = part.output.weight[4, 0] = 1
    return part
