"""Attention by rules: one for the tokens of a prompt, one for those that are written behind it."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.parts.asking import Asked
from formery.parts.attention import Attention
from formery.parts.context import Context
from formery.parts.part import Part
from formery.parts.selection import Rule
from formery.parts.state import LayerState, Slots, State

PROMPT = "prompt"  # under this name a state knows where prompts end


class Steady:
    """What a layer remembers of a prompt as a whole: tokens that come and go do not change it."""

    def check_rollback(self, lengths: Sequence[int]) -> None:
        """It can always be done."""

    def check_keep(self, counts: Sequence[int]) -> None:
        """It can always be done."""

    def rollback(self, lengths: Sequence[int]) -> None:
        """Nothing to do: what is read again in its place is prompt again."""

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        """It can always be done."""

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        """Nothing to do: what settles was written."""

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        """Nothing to do where it is not told by slot."""

    def grow(self, capacity: int) -> None:
        """Nothing to do where it is not told by slot."""


class Ends(Steady):
    """Where the prompt of each row ends: tokens from the position since[row] on are written."""

    def __init__(self, since: Int[Tensor, "batch"]):
        self.since = since

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.since = self.since[rows]

    def tensors(self) -> list[Tensor]:
        return [self.since]


class Observed(Steady):
    """How much the last tokens of each prompt looked at each slot."""

    def __init__(self, slots: Slots, groups: int):
        shape, device = slots.positions.shape, slots.positions.device
        self.weights: Float[Tensor, "batch slot group"] = torch.zeros(*shape, groups, device=device)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.weights = self.weights[rows]

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.weights[:, : slots.shape[1]] = self.weights[rows, slots]

    def grow(self, capacity: int) -> None:
        larger = self.weights.new_zeros(len(self.weights), capacity, self.weights.shape[2])
        larger[:, : self.weights.shape[1]] = self.weights
        self.weights = larger

    def tensors(self) -> list[Tensor]:
        return [self.weights]


def ends(context: Context) -> Int[Tensor, "batch"] | None:
    """The position from which each row is written; None where the pass knows no prompt."""
    known = None if context.state is None else context.state.layers.get((PROMPT, 0))
    if known is None:
        return None
    assert isinstance(known, Ends)
    return known.since


class Asking(Part):
    """An attention whose queries, in passes that know where prompts end, see what a subclass makes of `mixed`."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        since = ends(context)
        if since is None:
            whole: Tensor = self.attention(hidden, context)
            return whole
        mixed = self.mixed(Asked.by(self.attention, hidden, context, since), context)
        made: Tensor = self.attention.output(mixed.transpose(1, 2).flatten(2))
        return made

    @abstractmethod
    def mixed(self, asked: Asked, context: Context) -> Float[Tensor, "batch head time value"]:
        """What the queries take from the values."""


class Selective(Asking):
    """An attention of which each query sees what a rule chooses.

    reading: the rule for tokens of the prompt. writing: for those behind it. None: they see all. The keys that are not
    chosen are masked, not left unread.
    """

    def __init__(self, attention: Attention, reading: Rule | None = None, writing: Rule | None = None):
        super().__init__(attention)
        self.reading, self.writing = reading, writing

    def mixed(self, asked: Asked, context: Context) -> Float[Tensor, "batch head time value"]:
        asked = self.observing(asked, context)
        mask = self.chosen(asked)
        return asked.everything() if mask is None else asked.only(mask)

    def observing(self, asked: Asked, context: Context) -> Asked:
        """What is asked, with what the layer remembers besides keys and values."""
        return asked

    def chosen(self, asked: Asked) -> Bool[Tensor, "batch group time slot"] | None:
        """What the rules choose for the queries of both kinds."""
        if asked.writing:
            return None if self.writing is None else self.writing(asked)
        reading = None if self.reading is None else self.reading(asked)
        if not bool(asked.written.any()):
            return reading
        writing = None if self.writing is None else self.writing(asked)
        if reading is None and writing is None:
            return None
        read, wrote = (asked.allowed if mask is None else mask for mask in (reading, writing))
        return torch.where(asked.written[:, None, :, None], wrote, read)


class Observing(Selective):
    """As `Selective`; while the prompt is read it remembers how much the last `window` tokens looked at each slot.

    smooth: a slot counts as much as the mean over so many neighbours. The prompt is read in one pass.
    """

    def __init__(
        self,
        attention: Attention,
        reading: Rule | None = None,
        writing: Rule | None = None,
        window: int = 16,
        smooth: int = 7,
    ):
        super().__init__(attention, reading, writing)
        if smooth % 2 == 0:
            raise ValueError(f"neighbours on both sides and the slot itself are an odd number, not {smooth}")
        self.window, self.smooth = window, smooth

    def start(self, state: State) -> LayerState:
        """What it remembers besides keys and values."""
        return Observed(state.slots, self.attention.groups)

    def observing(self, asked: Asked, context: Context) -> Asked:
        held = context.remembered(self)
        assert isinstance(held, Observed)
        slots = asked.keys.shape[2]
        ending = (asked.positions == asked.since[:, None] - 1).any(1) & (asked.since > 0)
        if bool(ending.any()):
            last, real = asked.last_read(self.window)
            whole = asked.since.clamp(max=self.window) == real.sum(1)
            if not bool((whole | ~ending).all()):
                raise FormeryError("what stays of a prompt is chosen by its last tokens: read them in one pass.")
            _, weights = last.weighed()
            looked = (asked.grouped(weights) * real[:, None, :, None]).sum(2).float()
            looked = nn.functional.avg_pool1d(looked, self.smooth, 1, self.smooth // 2)
            held.weights[ending, :slots] = looked.transpose(1, 2)[ending]
        return replace(asked, observed=held.weights[:, :slots].transpose(1, 2))
