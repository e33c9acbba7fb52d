"""Draft and verify: the one loop behind plain decoding and every method that guesses ahead.

    last token ─┐
    draft ──────┴─► one target call ─► keep a path of the draft, add one token ─► the state keeps what stands

A draft is a chain or a tree; a token of a tree sees the text and the guesses on the way to itself.

Greedy decoding is exact by decision, not by luck. The compiled kernels compute a token's logits with the same bits
however many tokens and rows are computed together. Where they are not used, logits differ in their last bits, so near
ties could flip; there, every greedy choice whose margin lies within the rounding bound is decided by `canonical`: the
row alone, from scratch, in one pass. Plain decoding does the same, so all methods, batch sizes and draft lengths agree;
`guarded` counts how often it was needed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from formery.generate.draft import Draft, Drafter, Row, stream_of
from formery.generate.judge import Judge, Relaxed
from formery.generate.pace import Pace
from formery.generate.sampler import Rule, modified_rejection
from formery.generate.settings import Settings
from formery.generate.stopping import Stopping
from formery.generate.target import Target, full_length
from formery.models import Model, Source
from formery.parts.spans import span


@dataclass
class Event:
    """What one target call did for one row.

    row: index of its prompt. drafted: the guessed tokens; parents: as in `Draft`. path: the places of those that stand,
    of which there are `accepted`. emitted: the tokens written. text: what they add to the text. stop: why the row
    ended, if it did. guarded: near ties decided apart. draft_seconds, verify_seconds, bookkeeping_seconds: of the whole
    batch's step: guessing and learning from verdicts, calling the target and judging, and all the rest. state_bytes:
    held by the batch's decode state.
    """

    row: int
    drafted: list[int] = field(default_factory=list)
    parents: list[int] | None = None
    path: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    text: str = ""
    stop: str | None = None
    guarded: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    bookkeeping_seconds: float = 0.0
    state_bytes: int = 0

    @property
    def accepted(self) -> int:
        """How many guesses stand."""
        return len(self.path)

    @property
    def rejected(self) -> list[int]:
        """The guesses that do not stand."""
        return [token for place, token in enumerate(self.drafted) if place not in self.path]

    @property
    def depth(self) -> int:
        """How many tokens could have stood: the length of a chain, the depth of a tree."""
        return max(Draft(self.drafted, parents=self.parents).depths, default=0)


Decoding = Callable[[Model, Sequence[Source], Settings, int], Iterator[list[Event]]]


@torch.inference_mode()
def draft_and_verify(
    model: Model,
    prompts: Sequence[Source],
    settings: Settings,
    first: int,
    drafter: Drafter,
    rule: Rule = modified_rejection,
    guard: bool = True,
    relaxed: Relaxed | None = None,
    adapt: bool = False,
) -> Iterator[list[Event]]:
    """Decodes a batch; yields the events of all rows after each target call.

    first: index of the first prompt in the caller's list. rule: decides on drafted tokens when sampling.
    guard: decide near ties apart (switched off only to show what happens without). relaxed: lets greedy guesses stand
    that are not the target's choice. adapt: drafts are cut to what pays by the costs and acceptance seen so far.
    """
    target = Target(model, prompts, settings)
    rows = [
        Row(first + i, prompt, prefix, model.reads_apart, stream_of(settings.seed, first + i, "target"))
        for i, (prompt, prefix) in enumerate(zip(prompts, target.prefixes, strict=True))
    ]
    drafter.begin(target, rows, settings)
    target.encoded = None
    judge = Judge(model, settings, rule, guard and not target.state.exact, relaxed)
    stopping = {row.index: Stopping(model, settings, row.prefix) for row in rows}
    pace = Pace(named=settings.temperature == 0) if adapt else None
    while rows:
        started = time.perf_counter()
        # The target always adds a token of its own, so one less may be drafted than may be written.
        rooms = [room(model, row, settings) - 1 for row in rows]
        with span("draft"):
            drafts = drafter.propose(rows, rooms if pace is None else pace.rooms(rooms))
            drafts = drafts if pace is None else pace.trim(drafts)
        drafted = time.perf_counter()
        with span("verify"):
            fed = [[row.tokens[-1], *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
            verdicts = judge(rows, drafts, target.feed(fed, drafts))
        verified = time.perf_counter()
        kept = [[0, *(place + 1 for place in verdict.path)] for verdict in verdicts]
        target.state.settle(kept)
        assert target.hidden is not None
        for hidden, verdict, path in zip(target.hidden, verdicts, kept, strict=True):
            verdict.hidden = hidden[path]
        held = target.state.nbytes
        events = []
        for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
            emitted, text, stop = stopping[row.index].take(row.output, verdict.emitted, room(model, row, settings))
            row.output += emitted
            event = Event(row.index, draft.tokens, draft.parents, verdict.path[: len(emitted)], emitted, text, stop)
            event.guarded, event.state_bytes = verdict.guarded, held
            events.append(event)
        booked = time.perf_counter()
        drafter.observe(rows, verdicts)
        drafting = drafted - started + time.perf_counter() - booked
        if pace is not None:
            pace.observe(drafts, verdicts, drafting, verified - drafted)
        for event in events:
            event.draft_seconds, event.verify_seconds = drafting, verified - drafted
            event.bookkeeping_seconds = booked - verified
        going = [i for i, event in enumerate(events) if event.stop is None]
        yield events
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            if rows:
                target.state.select(going)
                drafter.select(going)


def room(model: Model, row: Row, settings: Settings) -> int:
    """How many tokens the row may still write."""
    return full_length(model, len(row.prefix), settings) - len(row.output)
