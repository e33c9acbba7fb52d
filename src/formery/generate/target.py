"""The model that has the last word, and why its greedy choice is the same however it is computed."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.generate.draft import Draft, as_batch, as_trees
from formery.generate.settings import Settings
from formery.models import Model, Source
from formery.parts import Packing

# A row's logits differ in their last bits with the number of tokens and rows computed together. Differences seen on
# trained models stay below 16 units of rounding of the largest logit; the bound leaves a wide margin above that.
# In 16 bits the differences are of a few units, and so is the bound.
UNITS = {torch.float64: 256, torch.float32: 256, torch.bfloat16: 16, torch.float16: 16}
CODED = 64  # times that, where weights are codes: inputs are rounded to 16 bits, which a last bit may tip

Begun = Callable[..., Float[Tensor, "batch width hidden"]]  # as a model's `read`

START = 4  # room for what a decoder reads before it writes, where the prompt is read apart


class Target:
    """A model while it decodes a batch of prompts.

    hidden: its last normed vectors in the latest pass, at first those of the prompts but for their last tokens; None
    where these have no more than one. begun: a drafter that has run the first layers on all tokens of the next pass
    leaves here how the pass goes on, so that they are not run again. encoded: until drafters have begun, what its
    encoder made of the prompts, if it has one.
    """

    def __init__(self, model: Model, prompts: Sequence[Source], settings: Settings):
        self.model = model
        longest = START if model.reads_apart else max(map(len, prompts))
        # A few slots more, since a row is padded to the width of its widest neighbour.
        capacity = longest + full_length(model, longest, settings) + 8
        self.packing = Packing()
        self.hidden: Float[Tensor, "batch time width"] | None = None
        self.begun: Begun | None = None
        with self.packing:
            self.state, self.prefixes = model.begin(prompts, capacity, keep=True)
        self.encoded, self.state.encoded = self.state.encoded, None
        if max(len(prefix) for prefix in self.prefixes) > 1:
            self._prefill([prefix[:-1] for prefix in self.prefixes])

    def _prefill(self, rows: Sequence[Sequence[int]]) -> None:
        tokens, positions = as_batch(rows, [0] * len(rows), device_of(self.model))
        with self.packing:
            self.hidden = self.model.read(tokens, self.state, positions)
        if positions is not None:
            self.state.rollback([len(row) for row in rows])

    def feed(
        self, rows: Sequence[Sequence[int]], drafts: Sequence[Draft] | None = None
    ) -> Float[Tensor, "batch width vocabulary"]:
        """Logits after each of these tokens; rows may be of unequal width, the state then holds padding behind.

        drafts: what comes behind the first token of each row, where that is a tree.
        """
        state, device = self.state, device_of(self.model)
        tokens, positions = as_batch(rows, state.slots.lengths, device)
        seen: dict[str, Tensor] = {}
        if drafts is not None and any(draft.parents is not None for draft in drafts):
            positions, seen["visible"] = as_trees(drafts, state.slots.lengths, state.slots.used, device)
        begun, self.begun = self.begun, None
        with self.packing:
            if begun is not None:
                self.hidden = begun(tokens, state, positions, **seen)
            else:
                self.hidden = self.model.read(tokens, state, positions, **seen)
            return self.model.logits(self.hidden, state)


def full_length(model: Model, prefix: int, settings: Settings) -> int:
    """How many tokens may be written behind a prefix of that length: as asked for, or until the model is full."""
    most = settings.max_new_tokens
    return most if model.max_length is None else min(most, model.max_length + 1 - prefix)


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
