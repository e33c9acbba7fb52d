"""Spark Transformer: few hidden units and few keys at work, chosen by a cheap part of the input without sorting.

You, Wu, Jia, Chen, Bhojanapalli, Guo, Evci, Wassenberg, Netrapalli, Willcock, Subramanian, Chern, Andreev, Pathak, Yu,
Jain, Culler, Levy and Kumar, "Spark Transformer: Reactivating Sparsity in FFN and Attention", 2025. Both parts score
their entries (hidden units, keys) with the first r dimensions, keep about k of them, and compute the rest for those:

- `feed-forward(x) = valuesᵀ · (gelu(top_k(score · x[:r])) * (up · x[r:]))`
- `attention(q) = (softmax(top_k(keys[:, :r] · q[:r])) * softplus(keys[:, r:] · q[r:])) · values`

with the statistical top-k `max(x - mean(x) - deviation(x) · Q(1 - k / n), 0)`, Q the Gaussian quantile function; in
attention what is cut off becomes minus infinity, and the softmax takes no notice of the shift. No weights are added:
the feed-forward has two matrices, the first one split, and so half as many hidden units again as a gated one of the
same number of weights. Not told, and chosen here: what the deviation divides by (n, as in the published code of
Gemma 3n), how scores are scaled (by the root of the dimensions in them), and what counts under a causal mask (what is
seen; all of it stays where that is no more than k).

The parts are in `formery.parts.spark`. One token reads the rows of active units alone; batches compute all units, and
attention computes all products, so that only the decoding of single texts gains.
"""

from collections.abc import Mapping
from functools import partial

from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.methods.feedforward.spark_study import (
    KEYS,
    LAYERS,
    LENGTH,
    READ,
    ROWS,
    SHARE,
    STEPS,
    VARIANTS,
    WIDE,
    WIDE_GATED,
    WIDTH,
    decoding,
    multiplications,
    one_token,
    selected,
    studied,
)

BOUND = 0.05  # nats a token


def check(budget: Budget) -> Measured:
    """Dense and sparse models of the same weights, trained alike; the cut-off against sorting; decoding by rows."""
    budget.units.expect(len(VARIANTS) * len(budget.seeds) + 3)
    found: dict[str, list[Mapping[str, float]]] = {
        variant: [
            budget.units.measure(f"{variant}, seed {seed}", partial(studied, variant, seed)) for seed in budget.seeds
        ]
        for variant in VARIANTS
    }
    selection = budget.units.measure("the cut-off against topk", partial(selected, budget.rounds))
    layer = budget.units.measure("one token through a feed-forward", partial(one_token, budget.rounds))
    whole = budget.units.measure("one token through a decoder", partial(decoding, budget.rounds))

    def values(variant: str, name: str) -> list[float]:
        return [one[name] for one in found[variant]]

    def dearer(own: str, other: str) -> list[float]:
        return [a - b for a, b in zip(values(own, "loss"), values(other, "loss"), strict=True)]

    both = [*values("spark", "active"), *values("spark feed-forward", "active")]
    statement = f"costs at most {BOUND} nats a token more than the dense gated model of the same weights"
    criteria = [
        criterion(
            "quality", f"with few units and few keys it {statement}", dearer("spark", "dense"), "<=", BOUND, True
        ),
        criterion("units alone", f"with few units it {statement}", dearer("spark feed-forward", "dense"), "<=", BOUND),
        criterion(
            "active units",
            "between 7 and 9 % of the hidden units are active",
            [abs(one - SHARE) for one in both],
            "<=",
            0.01,
        ),
        criterion(
            "keys",
            f"where more are seen, at most {KEYS} keys are attended to on average",
            values("spark", "keys"),
            "<=",
            KEYS,
        ),
        criterion(
            "predictor",
            "it costs no more than top-k of the whole input's scores",
            dearer("spark feed-forward", "top-k without predictor"),
            "<=",
            0.0,
        ),
        criterion(
            "ReLU²", "it costs no more than ReLU² of the same weights", dearer("spark feed-forward", "ReLU²"), "<=", 0.0
        ),
        criterion("selection", "the cut-off takes less time than torch.topk", selection["speedup"], ">", 1.0),
        criterion(
            "overlap",
            "of Gaussian scores, 90 % of what is kept or among the k largest is both",
            selection["overlap"],
            ">=",
            0.9,
        ),
        criterion(
            "overlap when trained", "of trained scores 80 % is both", values("spark feed-forward", "overlap"), ">=", 0.8
        ),
        criterion(
            "one token",
            "a token passes a feed-forward of 8,192 or more units faster by its active rows",
            layer["rows of active units"],
            ">",
            1.0,
        ),
        criterion("decoding", "a decoder of such layers writes a token 1.35 times as fast", whole["spark"], ">=", 1.35),
        untestable(
            "size",
            "Gemma-2's quality at 2 billion parameters and 2 trillion tokens",
            "<=",
            0.0,
            "needs such a pretraining",
            essential=True,
        ),
    ]
    rows = [
        Row("prose", variant, ROWS, {name: spread(values(variant, name)) for name in found[variant][0]})
        for variant in VARIANTS
    ]
    rows += [
        Row("Gaussian scores", "cut-off against topk, 64 x 13,824", 64, {k: spread(v) for k, v in selection.items()}),
        Row(
            "one token", f"feed-forward {WIDE} x {WIDE_GATED}, over dense", 1, {k: spread(v) for k, v in layer.items()}
        ),
        Row("one token", "decoder of two such layers, over dense", 1, {k: spread(v) for k, v in whole.items()}),
    ]
    fewer, gemma = multiplications(WIDE, WIDE_GATED, READ), multiplications(2304, 9216, 1024)
    return Measured(
        criteria,
        rows,
        baseline="a dense decoder with gated feed-forwards of the same number of weights",
        notes=[
            f"All variants have as many weights ({LAYERS} layers of width {WIDTH}) and learn from the same {STEPS} "
            f"batches of {ROWS * LENGTH} tokens of WikiText-2; losses are in nats a token, early in learning.",
            f"The sparse feed-forward that is timed needs {fewer:.2f} times fewer multiplications ({gemma:.2f} with "
            "Gemma-2's sizes); what is left of that is time for the scores, which all units have.",
            "Decoders that are timed have random weights, whose scores are Gaussian. Their attention computes all "
            "products, in plain PyTorch, where the dense decoder runs in one compiled program.",
            "Training computes all units: sparse models learn more slowly in time, by the cut-off and the wider layer.",
        ],
    )


PAPER = publish(
    Paper(
        slug="spark-transformer",
        title="Spark Transformer: Reactivating Sparsity in FFN and Attention",
        year=2025,
        part="feedforward",
        domain="language",
        does="Trains a model in which few units and few tokens are active: a statistical cut-off finds the largest "
        "scores without sorting, and a small part of each input predicts which ones matter.",
        claims="Keeps Gemma-2's quality with 8% of the feed-forward units and at most 256 tokens attended to: 2.5 "
        "times fewer operations, decoding up to 1.79 times faster on CPUs and 1.40 on GPUs.",
        needs="Pretraining at the size of Gemma-2, a kernel for sparse products.",
        name="Spark Transformer",
        training="whole",
        sought="activation sparsity in LLM; sparse FFN and attention; faster CPU decoding by computing fewer neurons",
        related={
            "tidaldecode": "attention to few tokens",
            "sparse-frontier": "sparse attention",
            "memoryformer": "little of the feed-forward is computed",
            "matformer": "parts of a feed-forward",
            "primer": "activation of the feed-forward",
        },
        added="2026-11-28",
        check=check,
        works=("write",),
    )
)
