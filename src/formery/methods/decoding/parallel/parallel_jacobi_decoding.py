"""Parallel Jacobi decoding: greedy decoding as a fixed point, iterated at many places at once.

Santilli, Severino, Postolache, Maiorca, Mancusi, Marin and Rodolà, "Accelerating Transformer Inference for
Translation via Parallel Decoding", 2023. Greedy decoding solves `y[i] = argmax p(· | y[<i], x)` for all i.
Instead of one unknown after the other (Gauss-Seidel), every unknown of a block is updated at once from the
last guess (Jacobi) until nothing changes; the fixed point is the greedy text. Each iteration settles at least
one more token.

- plain: the block is the whole text asked for.
- block: blocks of `block` tokens, one after the other; a block is finished before the next begins.
- hybrid: as block for the first `until` tokens, then token by token, since guesses about the end are mostly
lost.

On the shared loop the last iterate is the draft: what is settled is kept and never computed again. The paper
reports up to 38 % less time for translation models as they are, and nearly half with enough parallel
hardware.
"""

from collections.abc import Sequence

from formery.errors import FormeryError, unknown
from formery.evidence.checks import Setting, best, criterion, rows, survey, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.method import Method, drafting, register
from formery.generate.settings import Settings
from formery.generate.target import Target


def plain(written: int, room: int, block: int, until: int) -> int:
    """How many more unknowns to iterate: all that may be written."""
    return room


def blockwise(written: int, room: int, block: int, until: int) -> int:
    """How many more unknowns to iterate: the rest of the block under way; the call adds one token itself."""
    return block - written % block - 1


def hybrid(written: int, room: int, block: int, until: int) -> int:
    """How many more unknowns to iterate: as `blockwise` at first, later none."""
    return blockwise(written, room, block, until) if written < until else 0


FORMS = {"plain": plain, "block": blockwise, "hybrid": hybrid}


class JacobiDrafter:
    """Drafts the last iterate; a place not guessed yet starts as the token before it."""

    def __init__(self, form: str = "block", block: int = 5, until: int = 32):
        if form not in FORMS:
            raise unknown("form of Jacobi decoding", form, FORMS)
        if block < 2 or until < 1:
            raise FormeryError(f"Jacobi decoding needs block >= 2 and until >= 1, not block {block}, until {until}.")
        self.form, self.block, self.until = form, block, until

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        self.guesses: list[list[int]] = [[] for _ in rows]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        drafts = []
        for row, room, guess in zip(rows, rooms, self.guesses, strict=True):
            count = min(room, FORMS[self.form](len(row.output), room, self.block, self.until))
            filler = guess[-1] if guess else row.tokens[-1]
            drafts.append(Draft([*guess[:count], *[filler] * (count - len(guess))]))
        return drafts

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        # The choices after the last settled token are the next iterate of the places that are still open.
        self.guesses = [verdict.choices[verdict.accepted + 1 :] for verdict in verdicts]

    def select(self, rows: Sequence[int]) -> None:
        self.guesses = [self.guesses[row] for row in rows]


METHOD = register(
    Method(
        "parallel-jacobi-decoding",
        "guesses at many places, iterated until nothing changes",
        lossless=True,
        make=drafting(JacobiDrafter),
        variants=("form=plain", "form=hybrid"),
        paper="parallel-jacobi-decoding",
    )
)


def check(budget: Budget) -> Measured:
    """The three forms, blocks of 3 and of 5, against greedy decoding."""
    options = ("form=plain", "form=block:block=3", "form=block:block=5", "form=hybrid:block=5:until=16")
    results = survey(budget, [Setting(f"{METHOD.name}:{one}") for one in options])
    setting, ratios = best(results, "speedup", work="translate", batch=1)
    criteria = [
        criterion(
            "identical",
            "the share of texts with the very tokens of greedy decoding is 1, on both works",
            values_of(results, "identical"),
            "==",
            1.0,
            essential=True,
        ),
        criterion(
            "calls",
            "translating, the model is called less than once for each token, in every form",
            values_of(results, "calls_per_token", work="translate"),
            "<",
            1.0,
        ),
        criterion(
            "faster",
            f"one text at a time, translating is faster than token by token in the best form ({setting})",
            ratios,
            ">",
            1.0,
            essential=True,
        ),
        criterion(
            "factor",
            f"one text at a time, translating is at least 1.38 times as fast in the best form ({setting})",
            ratios,
            ">=",
            1.38,
        ),
        untestable(
            "factor in parallel",
            "translating is nearly twice as fast where there is hardware for all positions at once",
            ">=",
            1.9,
            "needs more parallel hardware than a few processor cores",
        ),
    ]
    return Measured(
        criteria,
        rows(results),
        baseline="greedy decoding, token by token",
        models=PAPER.works,
        notes=[
            "On a few cores a call costs more the more positions it has: less time is saved than calls.",
            "These models know relative positions alone: a row of equal guesses gives a row of equal tokens, so that "
            "guesses settle hardly sooner than token by token. Models with absolute positions may do better.",
        ],
    )


PAPER = publish(
    Paper(
        slug="parallel-jacobi-decoding",
        title="Accelerating Transformer Inference for Translation via Parallel Decoding",
        year=2023,
        part="decoding",
        domain="translation",
        does="Greedy decoding is solved as a system of equations: all places of a block are guessed at once "
        "and iterated until nothing changes.",
        claims="Translation models as they are decode up to 38 % faster, nearly twice as fast with enough "
        "parallel hardware, and translate the same.",
        needs="More parallel hardware, for the larger of the two factors.",
        name="Parallel Jacobi decoding",
        training="none",
        sought="faster machine translation without changing or training the model; fixed-point iteration decoding",
        related={
            "aggressive-decoding": "faster without training",
            "lexical-unit-decoding": "several tokens a call",
            "glat": "parallel translation",
            "hidden-transfer": "guesses at many places",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
