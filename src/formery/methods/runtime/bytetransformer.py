"""ByteTransformer: batches of texts of unlike length without padding, for reading and for training.

Zhai, Jiang, Wang, Jia, Zhang, Chen, Liu and Zhu, "ByteTransformer: A High-Performance Transformer Boosted for
Variable-Length Inputs", 2022. The tokens of a batch, `Σ length` of them and not `batch · longest`, are rows of one
matrix for all that works token by token: products, norms, activations, the output. Prefix sums of the lengths say where
each text begins, and attention runs within each text. The paper has kernels for that on an A100, among them ones that
fuse attention, the bias and the activation, and the residual and its norm. Here a model's own parts run on packed rows;
texts are sorted by length, so that those of one length are attended to in one call of the kernel that is at hand,
without copies: a piece of the rows is a batch. Nothing that one text cannot see of another is computed.

`packable(model)` in `formery.models.packed` is the model with the very same weights, of which `encoded`, `read`,
`continued` and `translated` there run padded batches packed, and which the objectives of `formery.train.packed` train.
It reads padded batches as before, too.
"""

from collections.abc import Callable
from functools import partial

from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.methods.runtime.packing_races import (
    LEARNED,
    LONG,
    LONGEST,
    POOL,
    SIZE,
    SORTED,
    captions,
    equal,
    learning,
    prose,
    reading,
)

ESSENTIAL = ("reading captions", "learning to translate")


def check(budget: Budget) -> Measured:
    """Packed against padded, against batches of like length and against nested tensors, on lengths of real texts."""
    works: dict[str, Callable[[int], dict[str, list[float]]]] = {
        "reading captions": lambda seed: reading(captions, POOL, seed, budget.rounds),
        "reading prose": lambda seed: reading(prose, LONG, seed, budget.rounds),
        "learning to translate": lambda seed: learning(False, seed, budget.rounds),
        "learning to write": lambda seed: learning(True, seed, budget.rounds),
    }
    budget.units.expect((len(works) + 1) * len(budget.seeds))
    same = [budget.units.measure(f"equality, seed {seed}", partial(equal, seed)) for seed in budget.seeds]
    found: dict[str, dict[str, list[float]]] = {}
    for name, run in works.items():
        for seed in budget.seeds:
            measured = budget.units.measure(f"{name}, seed {seed}", partial(run, seed))
            for key, values in measured.items():
                found.setdefault(name, {}).setdefault(key, []).extend(values)
    faster = [
        criterion(
            name,
            f"{name} runs at least 1.5 times as fast as padded, batch {SIZE}",
            numbers["packed"],
            ">=",
            1.5,
            name in ESSENTIAL,
        )
        for name, numbers in found.items()
    ]
    captions_read = found["reading captions"]
    return Measured(
        [
            criterion(
                "outputs",
                "outputs differ from padding's by rounding",
                [one["outputs"] for one in same],
                "<=",
                1e-5,
                True,
            ),
            criterion(
                "gradients",
                "gradients differ from padding's by rounding",
                [one["gradients"] for one in same],
                "<=",
                1e-4,
                True,
            ),
            *faster,
            criterion(
                "expectation",
                "reading captions gains nine tenths of what padding wastes",
                captions_read["of 1 / fill"],
                ">=",
                0.9,
            ),
            criterion(
                "like lengths",
                "it is faster than batches of like length",
                captions_read["packed over like lengths"],
                ">",
                1.0,
            ),
            criterion(
                "nested tensors",
                "it is faster than PyTorch's attention on nested tensors",
                captions_read["packed over nested tensors"],
                ">",
                1.0,
            ),
            criterion(
                "compiled",
                "it is 1.5 times as fast as padding in compiled kernels",
                captions_read["packed over padded, compiled"],
                ">=",
                1.5,
            ),
            untestable(
                "A100",
                "fused attention is 6.13 times as fast as PyTorch's on an A100, BERT 1.55 to 2.38 times as others",
                ">=",
                1.55,
                "needs that card and the fused kernels in CUDA",
            ),
        ],
        [
            Row(name, "packed and others over padded", SIZE, {key: spread(values) for key, values in numbers.items()})
            for name, numbers in found.items()
        ],
        baseline="the same model on padded batches in the order in which texts were drawn, in PyTorch's operations",
        models=["translate"],
        notes=[
            f"Texts: {POOL} batches of {SIZE} English captions of Multi30k read at a time, {LEARNED} of pairs learned "
            f"from, {LONG} of sentences of WikiText-2 of at most {LONGEST} tokens, in the vocabulary of `translate`.",
            f"Batches of like length are drawn from {SORTED} batches of texts, sorted: little padding, but no longer "
            "random; their time counts by the token.",
            "`1 / fill` is what all that works token by token would gain. Attention, whose padding costs the square of "
            "a length, can gain more; calls of the kernel, one for each length that occurs, take some of it back.",
            "Learning: loss and gradients without the update of weights; packed, the output runs where a target is.",
        ],
    )


PAPER = publish(
    Paper(
        slug="bytetransformer",
        title="ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs",
        year=2022,
        part="runtime",
        domain="language",
        does="Computes batches of texts of unlike length without padding: valid tokens are packed into one matrix for "
        "all that works token by token, and attention runs text by text on the packed data in fused kernels.",
        claims="Attention 6.13 times faster than PyTorch on an A100, and BERT 55 to 138% faster than PyTorch, XLA, "
        "TurboTransformers, DeepSpeed and FasterTransformer.",
        needs="CUDA and an A100 for the factors.",
        name="ByteTransformer",
        training="none",
        sought="padding wastes compute in batches of different lengths; BERT serving on GPU; variable-length sequences",
        related={
            "leanattention": "attention for ragged lengths",
            "fusemax": "fused attention",
            "transformer-lite": "an inference engine",
            "survey-inference-optimisation": "how inference is made fast",
        },
        added="2026-11-28",
        check=check,
        works=("translate", "write"),
    )
)
