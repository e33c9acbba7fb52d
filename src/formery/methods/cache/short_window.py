"""A small decoder that knows a short window, and what it is trained on: the base of papers that read beyond it.

It is kept apart from the papers, so that what they change leaves the trained models as they are.
"""

from dataclasses import replace
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from formery.data.base import Split
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
ROWS = 4  # of a batch of longer texts
TASKS = ("recall", "copy")
SHORT = Plan(steps=1200, learning_rate=5e-3, warmup=50, final_learning_rate_ratio=0.05, label="a window of 128")
LONG = Plan(steps=200, learning_rate=1.5e-3, warmup=10, final_learning_rate_ratio=0.05, label="longer texts")


class Cut:
    """Rows of text and of questions, the first `length` tokens of longer ones where they are shorter than 144.

    share: of the rows that hold questions. repeating: of the others half say a piece of themselves again at their end,
    which teaches a small model soon to look for what was said.
    """

    def __init__(
        self, length: int, rows: int, seed: int = 0, share: float = 0.5, repeating: bool = False, split: Split = "train"
    ):
        work = Long(tasks=TASKS, tokenizer=tokenizer())
        self.length, self.rows, self.seed, self.share = length, rows, seed, share
        self.repeating, self.split = repeating, split
        self.inner = LongBatches(tokenizer(), prose(split), max(FULL, length), rows, seed, share, work, split)

    def batch(self, step: int) -> Batch:
        """As of LongBatches, and the number of the batch as "step"."""
        cut = {name: one[:, : self.length + 1] for name, one in self.inner.batch(step).items()}
        if self.repeating:
            half = (self.rows - self.inner.asked) // 2
            near = 3 * self.length // 8
            again = repeated(cut["tokens"][:half], self.length - near, near, step)
            cut["tokens"] = torch.cat((again, cut["tokens"][half:]))
        return {**cut, "step": torch.tensor(step)}


def repeated(tokens: Int[Tensor, "batch window"], past: int, near: int, step: int) -> Int[Tensor, "batch window"]:
    """The first `past` tokens of each text, and behind them `near + 1` tokens that stand in them; drawn by step."""
    draw = torch.Generator().manual_seed(step)
    begins = torch.randint(past - near, (len(tokens), 1), generator=draw)
    piece = tokens.gather(1, begins + torch.arange(near + 1))
    return torch.cat((tokens[:, :past], piece), 1)


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
    """The model that has never seen more than its window: prose, half of it with repeated pieces, and questions."""
    return grown("window-128", small, Cut(WINDOW, 16, share=0.75, repeating=True), SHORT, answering)


@cache
def frugal_base() -> Decoder:
    """The frugal one after as many steps."""
    return grown("window-128-frugal", frugal, Cut(WINDOW, 16, share=0.75, repeating=True), SHORT, answering)


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
