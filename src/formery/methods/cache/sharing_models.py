"""The small models on which sharing keys and values between layers is measured, trained once for all of its papers.

They read Python's standard library byte by byte. What a model saves in maps of keys and values it has in wider
feed-forwards, so that all with as many layers have as many parameters. Those that are uptrained come from the
multi-head model of the same seed, merged and trained a little on.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.base import Split
from formery.data.batching import WindowBatches
from formery.data.works import work
from formery.evidence.study import grown
from formery.models import Decoder
from formery.models.compose import language_model
from formery.models.key_value_sharing import shared
from formery.parts import build
from formery.train.plan import Plan

BYTES = 256  # the vocabulary
LAYERS, WIDTH, HEADS, HIDDEN = 8, 64, 4, 176
LENGTH, ROWS = 128, 8  # of what a step learns from
STEPS, MORE = 250, 50  # of training from scratch, and of uptraining


@dataclass(frozen=True)
class Variant:
    """A decoder whose layer i attends to the keys and values, of so many heads, of layer owners[i].

    heads: of queries, which share the width evenly.
    """

    name: str
    key_value_heads: int
    owners: tuple[int, ...] = tuple(range(LAYERS))
    heads: int = HEADS

    @property
    def entries(self) -> int:
        """The keys a token, and so the values, that are kept for it in all layers."""
        return len(set(self.owners)) * self.key_value_heads * WIDTH // self.heads

    @property
    def share(self) -> Fraction:
        """The keys and values a token, of those that multi-head attention keeps in all LAYERS."""
        return Fraction(self.entries, LAYERS * WIDTH)

    @property
    def hidden(self) -> int:
        """The units of a feed-forward that make up for the maps saved: each has three weights for each of the width."""
        return HIDDEN + round(2 * (WIDTH - self.entries / len(self.owners)) / 3)

    @property
    def key(self) -> str:
        """A name that is the same for equal variants, whatever they are called."""
        return f"{''.join(map(str, self.owners))}-{self.key_value_heads}-of-{self.heads}"


MULTI_HEAD = Variant("MHA", HEADS)
MULTI_QUERY = Variant("MQA", 1)
HALF_AS_DEEP = Variant(f"MQA, {LAYERS // 2} layers", 1, tuple(range(LAYERS // 2)))


@cache
def text(split: Split) -> Int[Tensor, " total"]:
    """Python's standard library as bytes."""
    joined = "".join(work("code").texts(split)).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8)


def made(variant: Variant, width: int = WIDTH) -> Decoder:
    """A model of that kind with weights drawn anew; wider, in all but its number of layers and heads, if asked for."""
    hidden = variant.hidden * width // WIDTH
    model = language_model(
        BYTES, width, len(variant.owners), variant.heads, variant.key_value_heads, hidden, 8 * LENGTH
    )
    # A mean of random weights is smaller than they are; what is described is drawn at its own size.
    drawn = build(shared(model, variant.owners).describe())
    assert isinstance(drawn, Decoder)
    return drawn


def trained(variant: Variant, seed: int) -> Decoder:
    """A model of that kind, trained from scratch."""
    plan = Plan(STEPS, 3e-3, warmup=20, evaluate_every=STEPS, checkpoint_every=STEPS // 2, seed=seed, label=variant.key)
    batches = WindowBatches(text("train"), LENGTH, ROWS, seed)
    return grown(f"sharing/{variant.key}", partial(made, variant), batches, plan)


def merged(variant: Variant, seed: int) -> Decoder:
    """The multi-head model of that seed with its keys and values merged, not trained since."""
    return shared(trained(MULTI_HEAD, seed), variant.owners, variant.key_value_heads).clone()


def uptrained(variant: Variant, seed: int) -> Decoder:
    """The same, trained on."""
    plan = Plan(MORE, 1e-3, warmup=5, evaluate_every=MORE, checkpoint_every=MORE, seed=seed, label=f"{variant.key} on")
    batches = WindowBatches(text("train"), LENGTH, ROWS, seed + 1000)
    return grown(f"sharing/up-{variant.key}", partial(merged, variant, seed), batches, plan, sources=[shared])
