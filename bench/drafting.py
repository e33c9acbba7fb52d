"""Every drafting method on real prompts: is the text greedy decoding's own, what a call brings, and what it takes.

Beside each measured ratio stands the one that a short profile predicted before any method was run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import report
from bench.table import WIDTH, progress
from formery.data.works import work as work_named
from formery.errors import FormeryError
from formery.evidence.advise import advise
from formery.evidence.compare import draft_for
from formery.evidence.race import Entrant, Laps, fitted, identical, race, seconds_in_calls, speedups
from formery.evidence.replay import drafter_of, lossless
from formery.generate import Generation
from formery.generate.method import find
from formery.models import Model, guides, load, shipped

PROMPTS, PARTS = 200, 5  # prompts of a case, and in how many parts they are raced


@dataclass(frozen=True)
class Case:
    """Prompts of one work, decoded so many together, for so many tokens."""

    work: str
    batch: int
    new_tokens: int
    prompts: int = PROMPTS

    @property
    def title(self) -> str:
        """The case in a line."""
        return f"{self.work} · {self.prompts} prompts · {self.new_tokens} new tokens · batch {self.batch}"


CASES = [
    Case("code", 1, 64),
    Case("code", 8, 64),
    Case("code", 1, 256, 30),
    Case("translate", 1, 64),
    Case("translate", 8, 64),
]
QUICK = [Case("code", 1, 8, 4), Case("translate", 2, 8, 4)]


@dataclass
class Row:
    """What a method did in a case.

    identical: the share of texts with greedy decoding's very tokens. by_depth: of the guesses at each depth whose line
    stood so far, the share that stands. seconds of a call: drafting, verifying, and what else a step takes. speedup:
    over greedy decoding, the median of the parts and their range. predicted: by the profile, for one text at a time.
    """

    case: Case
    method: str
    identical: float
    calls_per_token: float
    accepted_per_call: float
    by_depth: list[float]
    drafting: float
    verifying: float
    besides: float
    speedup: tuple[float, float, float]
    predicted: float | None = None

    @property
    def error(self) -> float | None:
        """By what share the prediction was off."""
        return None if self.predicted is None else abs(self.predicted / self.speedup[0] - 1)


@dataclass
class Laid:
    """All laps of a method in a case, part by part."""

    outputs: list[Generation] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    speedups: list[float] = field(default_factory=list)


def settings(work: str, model: Model, variants: bool) -> list[str]:
    """The lossless methods that can draft for the shipped model of that name, where asked for with their variants."""
    found = []
    for method in lossless(model):
        known = not method.needs_draft or method.draft_of(work) in (*shipped(), *guides())
        if known and drafter_of(method) is not None:
            found += [method.name, *(f"{method.name}:{one}" for one in method.variants if variants)]
    return found


def measure(asked: Any) -> int:
    """All cases; writes what is finished after each. 1 where a text is another one than greedy decoding's."""
    chosen = [case for case in (QUICK if asked.quick else CASES) if not asked.models or case.work in asked.models]
    if not chosen:
        raise FormeryError("--models names no work of this benchmark: there are code and translate.")
    console, told = Console(), Console(stderr=True)
    width = console.width if console.is_terminal else WIDTH
    predicted: dict[str, dict[str, float]] = {}
    rows: list[Row] = []
    for case in chosen:
        model = load(case.work)
        names = settings(case.work, model, asked.variants)
        if case.work not in predicted:
            with progress(told, f"{case.work}: profile") as tell:
                advice = advise(case.work, methods=names, progress=tell)
            predicted[case.work] = {one.name: one.factor.value for one in advice.options if one.kind == "method"}
        found = _case(case, model, names, told)
        if case.batch == 1 and case.new_tokens == 64:
            for row in found:
                row.predicted = predicted[case.work].get(row.method)
        rows += found
        console.print(table(case, found), width=width)
        errors = [row.error for row in found if row.error is not None]
        if errors:
            console.print(f"The predictions were off by {100 * mean(errors):.0f} % on average.\n")
        if asked.json:
            report.write(asked.json, document(rows))
    return int(any(row.identical < 1 for row in rows))


def _case(case: Case, model: Model, names: Sequence[str], told: Console) -> list[Row]:
    examples = work_named(case.work).examples("test", limit=case.prompts)
    drafts = {name: draft_for(case.work, None, name) if find(name)[0].takes_draft else None for name in names}
    prompts, _ = fitted(model, [*drafts.values()], examples, case.new_tokens)
    entrants = [Entrant("greedy")]
    entrants += [Entrant(name, {} if drafts[name] is None else {"draft": drafts[name]}) for name in names]
    laid = [Laid() for _ in entrants]
    size = -(-len(prompts) // PARTS)
    with progress(told, case.title) as tell:
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            laps = race(model, some, entrants, 1, case.batch, {"max_new_tokens": case.new_tokens}, tell)
            for all_, one in zip(laid, laps, strict=True):
                all_.outputs += one.outputs
                all_.seconds += one.seconds
                all_.speedups += speedups(one, laps[0])
    greedy, *others = laid
    return [row(case, name, one, greedy) for name, one in zip(names, others, strict=True)]


def row(case: Case, name: str, laid: Laid, greedy: Laid) -> Row:
    """A method's figures from all its laps."""
    laps = Laps(laid.outputs, laid.seconds)
    events = [event for one in laid.outputs for event in one.trace]
    drafting, verifying = seconds_in_calls(laid.outputs, case.batch)
    batches = range(0, len(laid.outputs), case.batch)
    calls = sum(max(one.calls for one in laid.outputs[start : start + case.batch]) for start in batches)
    by_depth = []
    for depth in range(max((event.depth for event in events), default=0)):
        tried = [event for event in events if event.depth > depth and event.accepted >= depth]
        if tried:
            by_depth.append(sum(event.accepted > depth for event in tried) / len(tried))
    return Row(
        case=case,
        method=name,
        identical=identical(laid.outputs, greedy.outputs),
        calls_per_token=laps.calls / laps.tokens,
        accepted_per_call=sum(one.accepted for one in laid.outputs) / laps.calls,
        by_depth=by_depth,
        drafting=drafting / calls,
        verifying=verifying / calls,
        besides=max(0.0, sum(laid.seconds) - drafting - verifying) / calls,
        speedup=(median(laid.speedups), min(laid.speedups), max(laid.speedups)),
    )


def table(case: Case, rows: Sequence[Row]) -> Table:
    """The fastest first."""
    drawn = Table(title=case.title, title_justify="left", box=None, pad_edge=False)
    for heading in ("method", "same", "calls", "stand", "draft", "× greedy", "(range)", "profile"):
        drawn.add_column(heading, justify="left" if heading == "method" else "right")
    for one in sorted(rows, key=lambda one: -one.speedup[0]):
        middle, low, high = one.speedup
        drawn.add_row(
            one.method.replace(":", " "),
            f"{100 * one.identical:.4g} %",
            f"{one.calls_per_token:.2f}",
            f"{one.accepted_per_call:.2f}",
            f"{one.drafting / one.verifying:.2f}",
            f"{middle:.2f}",
            f"{low:.2f}–{high:.2f}",
            "" if one.predicted is None else f"{one.predicted:.2f}",
        )
    return drawn


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as plain data, with machine and versions."""
    whole = report.document([{**asdict(one), "error": one.error} for one in rows], [], PARTS)
    errors = [one.error for one in rows if one.error is not None]
    return {**whole, "mean_error_of_predictions": mean(errors) if errors else None}

