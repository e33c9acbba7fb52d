"""The model that has the last word, and why its greedy choice is the same however it is computed."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.generate.draft import as_batch
from formery.generate.settings import Settings
from formery.models import Model, Source
from formery.parts import Packing, State

# A row's logits differ in their last bits with the number of tokens and rows computed together. Differences seen on
# trained models stay below 16 units of rounding of the largest logit; the bound leaves a wide margin above that.
# In 16 bits the differences are of a few units, and so is the bound.
UNITS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}
CODED = 64  # times that, where weights are codes: inputs are rounded to 16 bits, which a last bit may tip

START = 4  # room for what a decoder reads before it writes, where the prompt is read apart


class Target:
    """A model while it decodes a batch of prompts."""

    def __init__(self, model: Model, prompts: Sequence[Source], settings: Settings):
        self.model = model
        longest = START if model.reads_apart else max(map(len, prompts))
        # A few slots more, since a row is padded to the width of its widest neighbour.
        capacity = longest + full_length(model, longest, settings) + 8
        self.packing = Packing()
        with self.packing:
            self.state, self.prefixes = model.begin(prompts, capacity)
        if max(len(prefix) for prefix in self.prefixes) > 1:
            self._prefill([prefix[:-1] for prefix in self.prefixes])

    def _prefill(self, rows: Sequence[Sequence[int]]) -> None:
        tokens, positions = as_batch(rows, [0] * len(rows), device_of(self.model))
        with self.packing:
            self.model.read(tokens, self.state, positions)
        if positions is not None:
            self.state.rollback([len(row) for row in rows])

    def feed(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch width vocabulary"]:
        """Logits after each of these tokens; rows may be of unequal width, the state then holds padding behind."""
        with self.packing:
            return feed(self.model, self.state, rows)


def full_length(model: Model, prefix: int, settings: Settings) -> int:
    """How many tokens may be written behind a prefix of that length: as asked for, or until the model is full."""
    most = settings.max_new_tokens
    return most if model.max_length is None else min(most, model.max_length + 1 - prefix)


def feed(model: Model, state: State, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch width vocabulary"]:
    """Reads more tokens of each row into the state; roll it back afterwards where widths differ."""
    tokens, positions = as_batch(rows, state.slots.lengths, device_of(model))
    return model.step(tokens, state, positions)


def device_of(model: Model) -> torch.device:
    """Where the weights are."""
    return next(model.parameters()).device


def canonical(model: Model, prompt: Source, tokens: Sequence[int]) -> Float[Tensor, "vocabulary"]:
    """Logits after `tokens`, computed in the one way that depends on nothing else: alone, in a single pass."""
    state, _ = model.begin([prompt], len(tokens))
    hidden = model.read(torch.tensor([list(tokens)], device=device_of(model)), state)
    logits = model.logits(hidden[:, -1:])
    return logits[0, 0]


def rounding_bound(logits: Float[Tensor, "... vocabulary"], coded: bool = False) -> Float[Tensor, "..."]:
    """A margin between two logits below which rounding could have changed their order.

    coded: the weights are codes, whose inputs are rounded to 16 bits.
    """
    return 2 * UNITS[logits.dtype] * (CODED if coded else 1) * torch.finfo(logits.dtype).eps * logits.abs().amax(-1)
