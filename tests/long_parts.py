"""An example of each part that long contexts brought, no argument at its default."""

from collections.abc import Callable
from typing import Any

from formery.models.beyond import Beyond
from formery.models.blocks import BlockTransformer, Concatenated
from formery.models.compose import language_model
from formery.models.phased import Phased
from formery.models.repeating import Repeating
from formery.parts import (
    Attention,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    Linear,
    Output,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    causal,
    window,
)
from formery.parts.bounded import Bounded, Compacted, Original
from formery.parts.condenser import Condenser
from formery.parts.copies import EveryCopy, HiddenDecoding, RepeatedAttention
from formery.parts.crossing import Crossing
from formery.parts.eviction import Anything, HeavyHitters, Latest, Sinks
from formery.parts.grain import BlindTree, Even, Tree
from formery.parts.local import LocalAttention
from formery.parts.mixers.retention import Retention
from formery.parts.packed import PackedAttention, PackedCrossAttention
from formery.parts.reading import Blocks, CoveringLines, Lines, Near
from formery.parts.selection import Kept, KeptUnevenly, Largest, Pages, Recent
from formery.parts.selective import Asking, Observing, Selective
from formery.parts.shared_attention import OwningAttention, SharedAttention
from formery.parts.spark import SparkAttention, SparkFeedForward, ThresholdedMLP
from formery.parts.spread import SpreadAttention


def attending() -> dict[str, Any]:
    """The arguments of an attention."""
    return {
        "width": 8, "heads": 2, "key_value_heads": 1, "head_width": 6, "position": Rotary(500.0), "bias": True,
        "mask": causal & window(5), "output_bias": False, "query_norm": RMSNorm(6), "key_norm": RMSNorm(6),
        "scale": 0.5, "soft_cap": 20.0, "dropout": 0.1,
    }  # fmt: skip


def attention() -> Attention:
    return Attention(8, 2, position=Rotary())


def layers(inner: Part) -> list[Part]:
    return [Layer([PreNorm(RMSNorm(8), inner), PreNorm(RMSNorm(8), GatedMLP(8, 12))])]


def blocks() -> BlockTransformer:
    embedding = Embedding(11, 8)
    embedder = Concatenated(Embedding(11, 4), 2)
    return BlockTransformer(
        embedder, layers(attention()), RMSNorm(8), Linear(8, 8), embedding, layers(attention()), RMSNorm(8),
        Output(8, 11), 32,
    )  # fmt: skip


def repeating() -> Repeating:
    rule = EveryCopy(2)
    return Repeating(Embedding(11, 8), layers(RepeatedAttention(8, 2, mask=rule)), RMSNorm(8), Output(8, 11), rule, 32)


EXAMPLES: dict[str, Callable[[], Any]] = {
    "Anything": lambda: Anything(3),
    "Asking": lambda: Asking(attention()),
    "Beyond": lambda: Beyond(language_model(11, 8, 2, 2, 2, 12, 64), 16, 4, 2),
    "BlindTree": lambda: BlindTree(2, 2),
    "BlockTransformer": blocks,
    "Blocks": lambda: Blocks(0.5, 8),
    "Bounded": lambda: Bounded(Sinks(1), [4], **attending(), block=2, placing=Compacted()),
    "Compacted": Compacted,
    "Concatenated": lambda: Concatenated(Embedding(11, 4), 2),
    "Condenser": lambda: Condenser(layers(attention()), Even(4), 8),
    "CoveringLines": lambda: CoveringLines(0.5, 32),
    "Crossing": lambda: Crossing(Linear(8, 8), 2, 1, Rotary(), 0.5),
    "Even": lambda: Even(4),
    "EveryCopy": lambda: EveryCopy(2),
    "HeavyHitters": lambda: HeavyHitters(0.25),
    "HiddenDecoding": lambda: HiddenDecoding(2, 4, 8),
    "Kept": lambda: Kept(9, 3, 2),
    "KeptUnevenly": lambda: KeptUnevenly(9, 3, 2, 0.5),
    "Largest": lambda: Largest(9),
    "Latest": Latest,
    "Lines": lambda: Lines(0.5, 32),
    "LocalAttention": lambda: LocalAttention(**attending()),
    "Near": lambda: Near(0.5, 2),
    "Observing": lambda: Observing(attention(), Lines(0.5), Kept(9), 8, 3),
    "Original": Original,
    "OwningAttention": lambda: OwningAttention(**attending()),
    "PackedAttention": lambda: PackedAttention(attention()),
    "PackedCrossAttention": lambda: PackedCrossAttention(CrossAttention(8, 2)),
    "Pages": lambda: Pages(9, 4),
    "Phased": lambda: Phased(Embedding(11, 8), layers(attention()), RMSNorm(8), Output(8, 11), 32),
    "Recent": lambda: Recent(9, 2),
    "RepeatedAttention": lambda: RepeatedAttention(**{**attending(), "mask": HiddenDecoding(2)}),
    "Repeating": repeating,
    "Retention": lambda: Retention(8, 2, 16, Rotary(), 16.0, 256.0, 32, 1e-4, 32),
    "Selective": lambda: Selective(attention(), Lines(0.5), Largest(9)),
    "SharedAttention": lambda: SharedAttention(
        OwningAttention(8, 2, 1, 6),
        **{name: one for name, one in attending().items() if name not in ("key_value_heads", "head_width", "key_norm")},
    ),
    "Sinks": lambda: Sinks(1),
    "SparkAttention": lambda: SparkAttention(8, 2, 3, 1, 8, 4, Rotary(), window(5)),
    "SparkFeedForward": lambda: SparkFeedForward(8, 12, 3, 2, "silu"),
    "SpreadAttention": lambda: SpreadAttention(**attending()),
    "ThresholdedMLP": lambda: ThresholdedMLP(8, 12, 3, "silu"),
    "Tree": lambda: Tree(2, 2),
}
BASES = {"Budgeted", "Eviction", "Grain", "Mixing", "Placing", "Repetition", "Rule", "Shared"}  # only ever subclassed
