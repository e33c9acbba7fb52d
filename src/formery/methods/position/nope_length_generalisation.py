"""No position encoding: a causal decoder that is told no positions, on inputs longer than those it learned from.

Kazemnejad, Padhi, Natesan Ramamurthy, Das and Reddy, "The Impact of Positional Encoding on Length Generalization in
Transformers", 2023. One decoder is trained with each of several position schemes on short inputs of small tasks and
asked for longer ones; schemes are ranked in each task. The paper finds the model without any scheme (NoPE) first and T5's
relative bias next, before ALiBi, rotary and absolute positions; that NoPE's attention resembles that of T5's bias
most; and that a scratchpad helps only in some tasks and formats.

The causal mask alone tells positions (theorem 1): where all scores are equal, a head reads the mean of all values so
far, so that a value of 1 at `<bos>` and 0 elsewhere comes out as `1 / t` at the t-th token, which a feed-forward turns
into `t`. From there (theorem 2) queries `[t, -1]` and keys `[-1, t]` score the distance, `-(t_query - t_key)`.
`counting` has just these weights.

Patterns of heads P and Q are compared by the mean of their Jensen-Shannon divergences over queries, and models
in a layer by the nearest pair of their heads (section 5).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.data.sequences import SYMBOLS, Sequences
from formery.errors import FormeryError, unknown
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import grown
from formery.models import Decoder
from formery.models.attention_maps import Maps, attention_maps
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    Embedding,
    Layer,
    Learned,
    Output,
    Part,
    Position,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sinusoidal,
)
from formery.train.answering import answering
from formery.train.plan import Plan

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
    """Writes `t` into entry 3 where entry 2 is `x = 1 / t`, for t from 1 to `length`.

    Linear between these points: `t(x) = 1 + Σ (slope_t - slope_(t-1)) · relu(1 / t - x)`, t from 1 to length - 1, where
    slope_t = ((t + 1) - t) / (1 / t - 1 / (t + 1)) = t · (t + 1).
    """
    part = MLP(5, length, activation="relu")
    t = torch.arange(1, length)
    part.up.weight.zero_()
    part.down.weight.zero_()
    part.up.weight[:-1, 1], part.up.weight[:-1, 2] = 1 / t, -1.0
    part.down.weight[3, :-1] = (t * (t + 1) - (t - 1) * t).float()
    part.up.weight[-1, 1] = part.down.weight[3, -1] = 1
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


def divergence(first: Float[Tensor, "... key"], second: Float[Tensor, "... key"]) -> Float[Tensor, "..."]:
    """The Jensen-Shannon divergence of distributions over keys, in bits: from 0 (equal) to 1 (apart)."""
    middle = (first + second) / 2
    return (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q.clamp(min=torch.finfo(q.dtype).tiny)).log2(), 0.0).sum(-1)


def between_heads(first: Maps, second: Maps) -> Float[Tensor, "layer head other"]:
    """The mean divergence over rows and queries of each head of one model and each of another, layer by layer."""
    pairs = [divergence(p[:, :, None], q[:, None]).mean((0, 3)) for p, q in zip(first, second, strict=True)]
    return torch.stack(pairs)


@torch.no_grad()
def exact(made: Decoder, task: str, length: int, seed: int) -> float:
    """The share of fresh inputs of that length whose whole answer greedy decoding writes."""
    batch = Sequences(task, length, length, EXAMPLES, seed + 1000).batch(0)
    tokens, due = batch["tokens"], batch["answers"][:, 1:]
    right = made(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return float((right | ~due).all(1).double().mean())


def measured(scheme: str, task: str, seed: int) -> dict[str, float]:
    """Exact answers at the longest trained length and at longer ones."""
    made, longest = trained(scheme, task, seed), TRAINED[task.partition("-")[0]]
    found = {f"{times:g}": exact(made, task, round(times * longest), seed) for times in (1.0, *LONGER)}
    return found | {"longer": mean(found[f"{times:g}"] for times in LONGER)}


def likeness(task: str, seed: int) -> dict[str, float]:
    """The divergence of NoPE's attention from each other scheme's, on inputs twice as long as in training.

    nearest: of the nearest pair of heads, as the paper has it; heads: of each of NoPE's heads and the nearest to it.
    Means over layers.
    """
    tokens = Sequences(task, 2 * TRAINED[task], 2 * TRAINED[task], 16, seed + 1000).batch(0)["tokens"][:, :-1]
    maps = {scheme: attention_maps(trained(scheme, task, seed), tokens)[0] for scheme in SCHEMES}
    found = {}
    for scheme in SCHEMES[1:]:
        pairs = between_heads(maps["nope"], maps[scheme])
        found[f"nearest, {scheme}"] = float(pairs.amin((1, 2)).mean())
        found[f"heads, {scheme}"] = float(pairs.amin(2).mean())
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value, 1 for the largest; equal ones share the mean of their places."""
    return [sum(b > a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values]
