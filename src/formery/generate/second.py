"""Drafting with a guide that is a second decoder: it starts on what the target's encoder made."""

from collections.abc import Sequence

from formery.errors import FormeryError
from formery.generate.attending import AttendingGuided
from formery.generate.draft import Row
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.models.guide import Guide
from formery.models.second_decoder import SecondDecoder
from formery.parts import State


def started(target: Target, draft: Guide, batch: int, capacity: int) -> State:
    """The guide's empty state on the encoder's vectors; FormeryError where it was made for another kind of model."""
    assert isinstance(draft, SecondDecoder)
    found = None if target.encoded is None else target.encoded.shape[-1]
    if draft.source != found:
        made = "without an encoder" if draft.source is None else f"with an encoder of width {draft.source}"
        raise FormeryError(f"the guide is for a model {made}: take one that was trained on this model.")
    return draft.start_on(batch, capacity, target.encoded, target.state.memory_positions)


class SecondGuided(AttendingGuided):
    """An attending guide that also reads what the encoder made."""

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        self.state = started(target, self.draft, len(rows), self.state.slots.capacity)
