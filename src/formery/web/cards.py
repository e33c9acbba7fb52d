"""Papers in a terminal: the list, a card with its evidence, and what a check just saw."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from formery.web.table import listing
from formery.web.words import machine_line

if TYPE_CHECKING:
    from formery.catalog import Entry
    from formery.evidence.record import Record
    from formery.evidence.verdict import Criterion

STYLES = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}
STATUS = {
    "runs": "the code is here, its check has not run yet",
    "checked": "checked with the code that is here",
    "stale": "checked before the code or a model changed: verify it again",
}


def paper_list(entries: Sequence["Entry"]) -> RenderableType:
    """The papers, one a line or two, with where they stand."""
    rows = [
        (
            Text(entry.paper.slug, style="bold"),
            Text(f"{entry.paper.title} ({entry.paper.year})"),
            entry.paper.part,
            entry.status,
            verdict_text(entry.verdict),
        )
        for entry in entries
    ]
    return listing(("paper", "title", "part", "status", "verdict"), rows)


def verdict_text(verdict: str | None) -> Text:
    """A verdict in its colour; a dash where there is none."""
    return Text(verdict or "–", style=STYLES.get(verdict or "", ""))


def card(entry: "Entry") -> RenderableType:
    """A paper's card, its evidence, and how to run it."""
    paper = entry.paper
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    facts.add_row("does", paper.does)
    facts.add_row("claims", paper.claims)
    if paper.needs:
        facts.add_row("needs", paper.needs)
    facts.add_row("part", f"{paper.part}, shown on {paper.domain}")
    facts.add_row("code", paper.module)
    facts.add_row("status", f"{entry.status}: {STATUS[entry.status]}")
    parts: list[RenderableType] = [Text(f"{paper.title} ({paper.year})", style="bold"), Text(), facts]
    if entry.record is not None:
        parts += [Text(), evidence(entry.record)]
    commands = [*_commands(entry), f"formery verify {paper.slug}"]
    parts += [Text(), Text("run it", style="bold"), *(Text(f"  {command}") for command in commands)]
    return Group(*parts)


def card_json(entry: "Entry") -> dict[str, Any]:
    """All that `card` shows, as plain data."""
    paper = entry.paper
    named = ("year", "domain", "does", "claims", "needs", "module")
    return {
        **entry.to_json(),
        **{name: getattr(paper, name) for name in named},
        "methods": [method.name for method in entry.methods],
        "record": None if entry.record is None else entry.record.to_json(),
    }


def _commands(entry: "Entry") -> Iterable[str]:
    works = entry.paper.works or ("code",)
    for method in entry.methods:
        for work in works:
            yield f"formery compare {work} --methods {method.name}"


def evidence(record: "Record") -> RenderableType:
    """The verdict, the criteria that it comes from, and what they were measured on."""
    heading = Text("verdict: ", style="bold")
    heading.append_text(verdict_text(record.verdict))
    table = listing(("", "must be true", "needed", "measured"), [_criterion(one) for one in record.criteria])
    below = [
        f"Compared with {record.baseline}. {machine_line(record.machine)}.",
        f"{record.date[:10]}, {record.seconds / 60:.0f} minutes, "
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
