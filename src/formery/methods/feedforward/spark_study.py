"""What the check of the Spark Transformer measures: small models trained alike, the cut-off, and single tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.data import long_text
from formery.data.batching import WindowBatches
from formery.evidence.interleaved import interleaved, speedups
from formery.evidence.study import grown, losses
from formery.models import Decoder
from formery.parts import (
    MLP,
    Attention,
    Context,
    Embedding,
    GatedMLP,
    Layer,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    TiedOutput,
)
from formery.parts.part import build
from formery.parts.spark import SparkAttention, SparkFeedForward, ThresholdedMLP, soft_threshold
from formery.train.plan import Plan

SHARE = 0.08  # of the hidden units that are active
WIDTH, HEADS, LAYERS, GATED = 128, 4, 2, 352  # of the models that are trained; hidden units of the dense one
LENGTH, ROWS, STEPS, KEYS = 256, 8, 150, 32
WIDE, WIDE_GATED, READ, WIDE_KEYS = 1024, 8192, 448, 64  # of those that are timed; READ: as in Gemma-2, 1024 of 2304


def active_of(hidden: int) -> int:
    """How many units are to be active."""
    return max(1, round(SHARE * hidden))


def spark_feed_forward(width: int, gated: int, predictor: int | None = None) -> SparkFeedForward:
    """A feed-forward of as many weights as a gated one of `gated` hidden units, 8 % of whose units are active."""
    hidden = gated * 3 // 2
    return SparkFeedForward(width, hidden, active_of(hidden), predictor)


def stack(
    width: int,
    heads: int,
    layers: int,
    feed_forward: Callable[[], Part],
    keys: int | None = None,
    vocabulary: int = long_text.VOCABULARY,
) -> Decoder:
    """A decoder in the manner of Llama with this feed-forward. keys: how many are attended to, None for all."""
    embedding, position = Embedding(vocabulary, width), Rotary()

    def attention() -> Part:
        if keys is None:
            return Attention(width, heads, position=position)
        return SparkAttention(width, heads, keys, position=position)

    def layer() -> Layer:
        return Layer([PreNorm(RMSNorm(width), attention()), PreNorm(RMSNorm(width), feed_forward())])

    return Decoder(embedding, [layer() for _ in range(layers)], RMSNorm(width), TiedOutput(embedding))


WHOLE = GATED * 3 // 2  # hidden units of feed-forwards with two matrices and the dense one's weights
VARIANTS: dict[str, tuple[Callable[[], Part], int | None]] = {
    "dense": (partial(GatedMLP, WIDTH, GATED), None),
    "spark": (partial(spark_feed_forward, WIDTH, GATED), KEYS),
    "spark feed-forward": (partial(spark_feed_forward, WIDTH, GATED), None),
    "top-k without predictor": (partial(ThresholdedMLP, WIDTH, WHOLE, active_of(WHOLE)), None),
    "ReLU²": (partial(MLP, WIDTH, WHOLE, "relu2"), None),
}


def trained(variant: str, seed: int) -> Decoder:
    """The model of a variant, trained on prose from a seed."""
    feed_forward, keys = VARIANTS[variant]
    described = stack(WIDTH, HEADS, LAYERS, feed_forward, keys).describe()
    batches = WindowBatches(long_text.prose("train"), LENGTH, ROWS, seed)
    plan = Plan(STEPS, 2e-3, warmup=25, checkpoint_every=50, seed=seed, label=f"{variant}, seed {seed}")
    make = cast(Callable[[], Decoder], partial(build, described))
    return grown(f"spark-{variant}", make, batches, plan, sources=[SparkFeedForward])


@torch.inference_mode()
def activity(model: Decoder, tokens: Int[Tensor, "batch time"]) -> dict[str, float]:
    """How much is active on a text, means over layers and tokens.

    active: the share of hidden units that are not zero. overlap: units that are both kept and among the k largest,
    over those that are either. keys, beyond: how many keys are attended to where more than k are seen, and how often
    they are more than k.
    """
    found: dict[str, list[float]] = {}

    def units(active: int | None, part: nn.Module, inputs: Any, scores: Float[Tensor, "batch time hidden"]) -> None:
        kept = torch.relu(scores) > 0 if active is None else soft_threshold(scores, active) > 0
        found.setdefault("active", []).append(float(kept.double().mean()))
        if active is not None:
            # Both sets are the largest so many: the smaller one lies within the other.
            count = kept.sum(-1).double()
            overlap = count.clamp(max=active) / count.clamp(min=active)
            found.setdefault("overlap", []).append(float(overlap.mean()))

    def attended(part: nn.Module, inputs: tuple[Tensor, Context], made: Tensor) -> None:
        assert isinstance(part, SparkAttention)
        chosen, seen = part.choice(*inputs)
        number = chosen.sum(-1)[(seen.sum(-1) > part.active).expand(chosen.shape[:-1])].double()
        found.setdefault("keys", []).append(float(number.mean()))
        found.setdefault("beyond", []).append(float((number > part.active).double().mean()))

    hooks = []
    for part in model.modules():
        if isinstance(part, SparkFeedForward):
            hooks.append(part.score.register_forward_hook(partial(units, part.active)))
        elif isinstance(part, ThresholdedMLP):
            hooks.append(part.up.register_forward_hook(partial(units, part.active)))
        elif isinstance(part, MLP) and part.activation == "relu2":
            hooks.append(part.up.register_forward_hook(partial(units, None)))
        elif isinstance(part, SparkAttention):
            hooks.append(part.register_forward_hook(attended))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return {name: sum(values) / len(values) for name, values in found.items()}


def studied(variant: str, seed: int) -> dict[str, float]:
    """The held-out loss of a trained variant, how much of it is active, and its weights."""
    model, held_out = trained(variant, seed), WindowBatches(long_text.prose("test"), LENGTH, ROWS)
    loss = float(losses(model, held_out, 16).mean())
    return {
        "loss": loss,
        "parameters": float(model.parameter_count()),
        **activity(model, held_out.batch(16)["tokens"][:, :-1]),
    }


@torch.inference_mode()
def selected(rounds: int) -> dict[str, list[float]]:
    """The cut-off against `torch.topk` on Gaussian scores of a feed-forward as wide as Gemma-2's."""
    hidden = 13_824
    active = active_of(hidden)
    scores = torch.randn(64, hidden, generator=torch.Generator().manual_seed(0))
    count = (soft_threshold(scores, active) > 0).sum(-1).double()
    seconds = interleaved(
        {"cut-off": lambda: soft_threshold(scores, active), "topk": lambda: scores.topk(active)}, rounds, 15
    )
    return {
        "speedup": speedups(seconds["cut-off"], seconds["topk"]),
        "overlap": (count.clamp(max=active) / count.clamp(min=active)).tolist(),
        "kept over k": (count / active).tolist(),
    }


@torch.inference_mode()
def one_token(rounds: int) -> dict[str, list[float]]:
    """A token through one wide feed-forward, dense and by the active units' rows: the dense one's time over it."""
    dense, spark = GatedMLP(WIDE, WIDE_GATED).eval(), spark_feed_forward(WIDE, WIDE_GATED, READ).eval()
    token, context = torch.randn(1, 1, WIDE), Context(torch.zeros(1, 1, dtype=torch.long), even=True)
    seconds = interleaved(
        {
            "dense": lambda: dense(token, context),
            "rows of active units": lambda: spark(token, context),
            "all units": lambda: spark.dense(token),
        },
        rounds,
        15,
    )
    return {name: speedups(own, seconds["dense"]) for name, own in seconds.items() if name != "dense"}


@torch.inference_mode()
def decoding(rounds: int) -> dict[str, list[float]]:
    """Steps of one token of whole decoders of random weights, behind 256 tokens: the dense one's time over each."""
    spark = partial(spark_feed_forward, WIDE, WIDE_GATED, READ)
    models = {
        "dense": stack(WIDE, 8, 2, partial(GatedMLP, WIDE, WIDE_GATED)),
        "spark feed-forward": stack(WIDE, 8, 2, spark),
        "spark": stack(WIDE, 8, 2, spark, WIDE_KEYS),
    }
    token = torch.ones(1, 1, dtype=torch.long)

    def steps(model: Decoder) -> Callable[[], None]:
        state = model.eval().start(1, 288)
        model.read(torch.randint(model.vocabulary, (1, 256), generator=torch.Generator().manual_seed(0)), state)

        def run() -> None:
            for _ in range(4):
                model.step(token, state)
            state.rollback([256])

        return run

    seconds = interleaved({name: steps(model) for name, model in models.items()}, rounds, 7)
    return {name: speedups(own, seconds["dense"]) for name, own in seconds.items() if name != "dense"}


def multiplications(width: int, gated: int, read: int) -> float:
    """Those of a gated feed-forward over those of a sparse one of the same weights, for a token."""
    hidden = gated * 3 // 2
    return 3 * width * gated / (read * hidden + active_of(hidden) * (2 * width - read))
