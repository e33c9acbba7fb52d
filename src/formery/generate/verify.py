"""Draft and verify: the one loop behind plain decoding and every method that guesses ahead.

    pending ─┐
    draft ───┴─► one target call ─► accept a prefix, add one token ─► roll the state back to what stands

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
from jaxtyping import Float
from torch import Tensor

from formery.generate.draft import Draft, Drafter, Row, Verdict, stream_of
from formery.generate.sampler import Rule, draw, modified_rejection, penalised, probabilities
from formery.generate.settings import Settings
from formery.generate.stopping import Stopping
from formery.generate.target import Target, canonical, full_length, rounding_bound
from formery.models import Model, Source
from formery.parts import Codes
from formery.parts.spans import span


@dataclass
class Event:
    """What one target call did for one row.

    row: index of its prompt. drafted: the guessed tokens, of which the first `accepted` stand. emitted: the tokens
    written. text: what they add to the text. stop: why the row ended, if it did. guarded: near ties decided apart.
    draft_seconds, verify_seconds: of the whole batch's call. state_bytes: held by the batch's decode state.
    """

    row: int
    drafted: list[int] = field(default_factory=list)
    accepted: int = 0
    emitted: list[int] = field(default_factory=list)
    text: str = ""
    stop: str | None = None
    guarded: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    state_bytes: int = 0


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
) -> Iterator[list[Event]]:
    """Decodes a batch; yields the events of all rows after each target call.

    first: index of the first prompt in the caller's list. rule: decides on drafted tokens when sampling.
    guard: decide near ties apart (switched off only to show what happens without).
    """
    target = Target(model, prompts, settings)
    rows = [
        Row(first + i, prompt, prefix, model.reads_apart, stream_of(settings.seed, first + i, "target"))
        for i, (prompt, prefix) in enumerate(zip(prompts, target.prefixes, strict=True))
    ]
    drafter.begin(model, rows, settings)
    judge = Judge(model, settings, rule, guard and not target.state.exact)
    stopping = {row.index: Stopping(model, settings, row.prefix) for row in rows}
    while rows:
        started = time.perf_counter()
        # The target always adds a token of its own, so one less may be drafted than may be written.
        with span("draft"):
            drafts = drafter.propose(rows, [room(model, row, settings) - 1 for row in rows])
        drafted = time.perf_counter()
        fed = [[row.tokens[-1], *draft.tokens] for row, draft in zip(rows, drafts, strict=True)]
        lengths = target.state.lengths
        with span("verify"):
            logits = target.feed(fed)
            verdicts = judge(rows, drafts, logits)
        verified = time.perf_counter()
        target.state.rollback([length + 1 + one.accepted for length, one in zip(lengths, verdicts, strict=True)])
        held = target.state.nbytes
        events = []
        for row, draft, verdict in zip(rows, drafts, verdicts, strict=True):
            emitted, text, stop = stopping[row.index].take(row.output, verdict.emitted, room(model, row, settings))
            row.output += emitted
            event = Event(row.index, draft.tokens, min(verdict.accepted, len(emitted)), emitted, text, stop)
            event.guarded, event.state_bytes = verdict.guarded, held
            event.draft_seconds, event.verify_seconds = drafted - started, verified - drafted
            events.append(event)
        drafter.observe(rows, verdicts)
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


class Judge:
    """Decides how much of each draft stands, and what comes after it."""

    def __init__(self, model: Model, settings: Settings, rule: Rule, guard: bool):
        self.model, self.settings, self.rule, self.guard = model, settings, rule, guard
        self.coded = guard and any(isinstance(part, Codes) for part in model.modules())

    def __call__(
        self, rows: Sequence[Row], drafts: Sequence[Draft], logits: Float[Tensor, "batch width vocabulary"]
    ) -> list[Verdict]:
        """The verdict on each row's draft; logits[i, j] are those after the pending token and j drafted ones."""
        if self.settings.temperature > 0:
            choices = logits.argmax(-1).tolist()
            return [
                self._sample(row, draft, logits[i], choices[i][: len(draft.tokens) + 1])
                for i, (row, draft) in enumerate(zip(rows, drafts, strict=True))
            ]
        plain = logits
        if self.settings.changes_logits:
            logits = logits.clone()
            for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
                history = row.tokens
                for j in range(len(draft.tokens) + 1):
                    first = not row.output and j == 0
                    logits[i, j] = penalised(logits[i, j], history + draft.tokens[:j], self.settings, first)
        choices, close = self._choices(plain, logits)
        return [
            self._greedy(row, draft, choices[i][: len(draft.tokens) + 1], close[i])
            for i, (row, draft) in enumerate(zip(rows, drafts, strict=True))
        ]

    def _choices(self, plain: Tensor, logits: Tensor) -> tuple[list[list[int]], list[list[bool]]]:
        """The likeliest tokens, and which of them are near ties; plain: the logits before penalties."""
        if not self.guard:
            likeliest: list[list[int]] = logits.argmax(-1).tolist()
            return likeliest, [[False] * len(row) for row in likeliest]
        # A penalty multiplies what rounding did to a logit as well.
        penalty = self.settings.repetition_penalty
        bound = rounding_bound(plain, self.coded) * max(penalty, 1 / penalty)
        top = logits.topk(min(2, logits.shape[-1]), -1)
        return top.indices[..., 0].tolist(), (top.values[..., 0] - top.values[..., -1] <= bound).tolist()

    def _greedy(self, row: Row, draft: Draft, choices: list[int], close: list[bool]) -> Verdict:
        guarded = 0
        for j, token in enumerate([*draft.tokens, None]):
            if close[j]:
                history = draft.tokens[:j]
                logits = canonical(self.model, row.source, row.tokens + history)
                first = not row.output and j == 0
                choices[j] = int(penalised(logits, row.tokens + history, self.settings, first).argmax())
                guarded += 1
            if token != choices[j]:
                return Verdict(j, [*draft.tokens[:j], choices[j]], choices, guarded)
        raise AssertionError("unreachable: the last comparison is with no token")

    def _sample(self, row: Row, draft: Draft, logits: Tensor, choices: list[int]) -> Verdict:
        history = row.tokens
        for j, token in enumerate(draft.tokens):
            first = not row.output and j == 0
            chances = probabilities(logits[j], history + draft.tokens[:j], self.settings, first)
            drawn_from = None if draft.probabilities is None else draft.probabilities[j]
            rest = self.rule(chances, drawn_from, token, row.random.random())
            if rest is not None:
                return Verdict(j, [*draft.tokens[:j], draw(rest, row.random.random())], choices)
        first = not row.output and not draft.tokens
        chances = probabilities(logits[len(draft.tokens)], history + draft.tokens, self.settings, first)
        return Verdict(len(draft.tokens), [*draft.tokens, draw(chances, row.random.random())], choices)
