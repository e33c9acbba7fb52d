"""A small model beside `long`: made alike, of the same texts and questions, with a part of its training."""

import copy
from dataclasses import dataclass, replace

import torch

from formery.data.long_batches import LongBatches
from formery.data.long_text import VOCABULARY, code, prose, tokenizer
from formery.evidence.study import grown
from formery.models import Decoder
from formery.models.compose import language_model
from formery.train.answering import answering
from formery.train.plan import Plan

SHORT = Plan(steps=600, learning_rate=2.5e-3, warmup=100, evaluate_every=600, checkpoint_every=50, label="short")
LENGTHENED = replace(SHORT, steps=60, learning_rate=1e-3, warmup=5, final_learning_rate_ratio=0.02, label="lengthened")


@dataclass(frozen=True)
class Size:
    """What a model is made of."""

    name: str
    width: int
    layers: int
    heads: int
    hidden: int

    def make(self) -> Decoder:
        """A model of this size with random weights."""
        return language_model(VOCABULARY, self.width, self.layers, self.heads, self.heads, self.hidden, 8192)


SMALL = Size("small", 96, 4, 3, 256)


def trained(size: Size, length: int, short: Plan = SHORT, lengthened: Plan = LENGTHENED) -> Decoder:
    """A model that learned texts of 192 tokens, then of `length`."""
    vocabulary, ids = tokenizer(), torch.cat((prose("train"), code("train")))
    sources = (LongBatches, language_model)
    name = f"sizes/{size.name}"
    dense = LongBatches(vocabulary, ids, 192, 32, share=0.75, room=96)
    first = grown(f"{name}/short", size.make, dense, short, answering, sources)

    def make() -> Decoder:
        return copy.deepcopy(first).train()

    rows = LongBatches(vocabulary, ids, length, 6, seed=1)
    model = grown(f"{name}/{length}", make, rows, lengthened, answering, sources)
    model.tokenizer = vocabulary
    return model
