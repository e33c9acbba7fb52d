"""Papers in a terminal: the list, a card with its evidence, and what a check just saw."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from formery.catalog.card import TRAINING
from formery.web.table import listing
from formery.web.words import machine_line, took

if TYPE_CHECKING:
    from formery.catalog import Card, Entry
    from formery.evidence.record import Record
    from formery.evidence.sweep import Outcome
    from formery.evidence.verdict import Criterion

STYLES = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}
STATUS = {
    "entry only": "in the catalogue; its code is not written yet",
    "runs": "the code is here, its check has not run yet",
    "checked": "with the code that is here",
    "stale": "checked before the code or a model changed; verify it again",
}


def paper_list(entries: Sequence["Entry"]) -> RenderableType:
    """The papers, one a line or two, with where they stand."""
    rows = [
        (
            Text(entry.card.slug, style="bold"),
            Text(heading(entry.card)),
            entry.card.part,
            entry.status,
            verdict_text(entry.verdict),
        )
        for entry in entries
    ]
    return listing(("paper", "title", "part", "status", "verdict"), rows, whole=1)


def heading(card: "Card") -> str:
    """A title with its year, where that is known."""
    return f"{card.title} ({card.year})" if card.year else card.title


def verdict_text(verdict: str | None) -> Text:
    """A verdict in its colour; a dash where there is none."""
    return Text(verdict or "–", style=STYLES.get(verdict or "", ""))


def facts(entry: "Entry") -> Iterator[tuple[str, str]]:
    """What a card says, each with its name."""
    card = entry.card
    yield "does", card.does
    yield "claims", card.claims
    if card.sought:
        yield "look here for", card.sought
    if card.needs:
        yield "needs", card.needs
    if card.training:
        yield "training", f"{card.training}: {TRAINING[card.training]}"
    if card.exact:
        yield "output", "exactly the plain method's"
    yield "part", f"{card.part}, shown on {card.domain.replace('-', ' ')}"
    if card.kind != "system":
        yield "kind", card.kind
    if card.module:
        yield "code", card.module
    yield "status", f"{entry.status}: {STATUS[entry.status]}"


def card(entry: "Entry") -> RenderableType:
    """A paper's card, its evidence, how to run it, and what is near it."""
    one, record = entry.card, entry.record
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, text in facts(entry):
        table.add_row(name, Text(text))
    parts: list[RenderableType] = [Text(heading(one), style="bold"), Text(), table]
    if record is not None:
        parts += [Text(), evidence(record)]
    if one.module:
        parts += [Text(), Text("run it", style="bold"), *(Text(f"  {command}") for command in commands(one))]
    if near := [*one.related.items(), *((slug, "covers it") for slug in one.covers)]:
        beside = Table.grid(padding=(0, 2))
        beside.add_column(no_wrap=True)
        beside.add_column(style="dim")
        for slug, shared in near:
            beside.add_row(Text(f"  {slug}"), Text(shared))
        parts += [Text(), Text("related", style="bold"), beside]
    return Group(*parts)


def card_json(entry: "Entry") -> dict[str, Any]:
    """All that `card` shows, as plain data."""
    record = entry.record
    return {
        **entry.card.to_json(),
        **entry.to_json(),
        "commands": commands(entry.card),
        "record": None if record is None else record.to_json(),
    }


def commands(card: "Card") -> list[str]:
    """How to run a paper's methods and its check; none where there is no code."""
    if not card.module:
        return []
    named = [method.name for method in card.methods]
    runs = [f"formery compare {work} --methods {','.join(named)}" for work in card.works or ("code",) if named]
    return [*runs, f"formery verify {card.slug}"]


def outcomes(found: Sequence["Outcome"]) -> RenderableType:
    """What became of each check of a sweep."""
    rows = [
        (
            Text(one.slug, style="bold"),
            verdict_text(one.record.verdict) if one.record else Text(one.problem, style="red"),
            Text(f"{one.seconds:.0f} s" + (f", {one.attempts} attempts" if one.attempts > 1 else "")),
        )
        for one in found
    ]
    return listing(("paper", "verdict", "took"), rows, numbers=1)


def evidence(record: "Record") -> RenderableType:
    """The verdict, the criteria that it comes from, and what they were measured on."""
    heading = Text("verdict: ", style="bold")
    heading.append_text(verdict_text(record.verdict))
    table = listing(("", "must be true", "needed", "measured"), [_criterion(one) for one in record.criteria])
    below = [
        f"Compared with {record.baseline}. {machine_line(record.machine)}.",
        f"{record.date[:10]}, {took(record.seconds)}, "
        + ", ".join(f"{name} {version}" for name, version in record.versions.items())
        + ".",
        *record.notes,
    ]
    return Group(heading, Text(), table, Text(), *(Padding(Text(line, style="dim"), 0) for line in below))


def _criterion(one: "Criterion") -> Sequence[RenderableType]:
    mark = {True: Text("✓", style="green"), False: Text("✗", style="red"), None: Text("–", style="dim")}[
        one.holds
    ]
    if one.measured is None or one.low is None or one.high is None:
        measured = one.untestable
    elif one.low == one.high:
        measured = f"{one.measured:.4g}"
    else:
        measured = f"{one.measured:.4g} ({one.low:.4g}–{one.high:.4g})"
    return mark, Text(one.statement), Text(f"{one.relation} {one.threshold:g}"), Text(measured)
