"""A small decoder that knows a short window, and what it is trained on: the base of papers that read beyond it.

It is kept apart from the papers, so that what they change leaves the trained models as they are.
"""

from dataclasses import replace
from functools import cache

import torch

from formery.data.long import Long
from formery.data.long_batches import LongBatches
from formery.data.long_text import VOCABULARY, prose, tokenizer
from formery.evidence.study import grown
from formery.models import Decoder
from formery.models.compose import language_model
from formery.parts import Attention, LinearScaling, Rotary
from formery.train.answering import answering
from formery.train.objective import Batch, Batches
from formery.train.plan import Plan

WINDOW = 128
FULL = 144  # rows of questions are made of that many tokens at least; what lies behind the window is cut off
FACTOR = 4  # times the window, that a full cache is trained on
ROWS = 8  # of a batch of longer texts
SHORT = Plan(steps=1400, learning_rate=6e-3, warmup=50, final_learning_rate_ratio=0.05, label="a window of 128")
LONG = Plan(steps=150, learning_rate=1.5e-3, warmup=10, final_learning_rate_ratio=0.05, label="longer texts")


class Cut:
    """Rows of text and questions of at least 144 tokens, of which the first `length` are read."""

    def __init__(self, length: int, rows: int, seed: int = 0, split: str = "train"):
        work = Long(tasks=("recall",), tokenizer=tokenizer())
        text = prose(split)  # type: ignore[arg-type]
        self.length, self.rows, self.seed, self.split = length, rows, seed, split
        self.inner = LongBatches(tokenizer(), text, max(FULL, length), rows, seed, work=work, split=split)

    def batch(self, step: int) -> Batch:
        """As of LongBatches, and the number of the batch as "step"."""
        cut = {name: one[:, : self.length + 1] for name, one in self.inner.batch(step).items()}
        return {**cut, "step": torch.tensor(step)}


def small(layers: int = 4, heads: int = 2, key_value_heads: int = 2) -> Decoder:
    """A decoder of a third of a million weights."""
    model = language_model(VOCABULARY, 64, layers, heads, key_value_heads, 176, max_length=1 << 16)
    model.tokenizer = tokenizer()
    return model


def frugal() -> Decoder:
    """A decoder of half the layers with half the keys and values: a quarter of the bytes for each token."""
    return small(layers=2, key_value_heads=1)


@cache
def base() -> Decoder:
    """The model that has never seen more than its window."""
    return grown("window-128", small, Cut(WINDOW, 16), SHORT, answering)


@cache
def frugal_base() -> Decoder:
    """The frugal one after as many steps."""
    return grown("window-128-frugal", frugal, Cut(WINDOW, 16), SHORT, answering)


def own(model: Decoder) -> Decoder:
    """A decoder of the same weights that may be trained without changing it."""
    twin = model.clone().requires_grad_()
    twin.tokenizer = model.tokenizer
    return twin


def stretched(model: Decoder, factor: float) -> Decoder:
    """The same with its positions squeezed by that factor (position interpolation)."""
    twin = own(model)
    for part in twin.modules():
        if isinstance(part, Attention):
            part.replace("position", Rotary(scaling=LinearScaling(factor)))
    return twin


@cache
def interpolated(seed: int) -> Decoder:
    """The base with positions squeezed by 4, all of it trained on at 4 windows with a full cache."""
    return grown("window-128-interpolated", lambda: stretched(base(), FACTOR), *longer(seed), answering)


@cache
def dense(seed: int) -> Decoder:
    """The frugal base, trained on likewise."""
    return grown("window-128-dense", lambda: stretched(frugal_base(), FACTOR), *longer(seed), answering)


def longer(seed: int) -> tuple[Batches, Plan]:
    """Texts of 4 windows, and the plan for them."""
    return Cut(FACTOR * WINDOW, ROWS, seed), replace(LONG, seed=seed)
