"""The pages as text: what the server answers with, and what an export writes, from the same templates."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from formery.catalog.card import PARTS, TRAINING
from formery.catalog.entries import STATUSES, Entry
from formery.evidence.digest import source_of
from formery.web.cards import STATUS, commands, facts, heading
from formery.web.site import charts, measured
from formery.web.site.measured import Point
from formery.web.words import machine_line

STATIC = ("site.css", "site.js", "watch.js")
TEMPLATES = Path(__file__).parents[1] / "templates"


@dataclass(frozen=True)
class Asked:
    """What a reader asked the list for."""

    query: str = ""
    part: str = ""
    domain: str = ""
    status: str = ""
    lossless: bool = False
    training: str = ""
    meaning: bool = False

    @property
    def anything(self) -> bool:
        """Whether it is more than the whole list."""
        return self != Asked()


class Pages:
    """Makes pages. served: by a program that searches and decodes; else they are files, and search themselves."""

    def __init__(self, served: bool, by_meaning: bool = False) -> None:
        self.served, self.by_meaning = served, by_meaning
        self.environment = Environment(
            loader=PackageLoader("formery.web", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self.environment.filters["slugged"] = lambda text: re.sub(r"\W+", "-", text)
        self.environment.globals |= {"heading": heading, "PARTS": PARTS, "STATUS": STATUS, "TRAINING": TRAINING}

    def _render(self, template: str, root: str, entries: Sequence[Entry], **given: Any) -> str:
        # Records of other things than decoding have works of their own, and no page of one.
        judged = {work for one in entries if one.verdict for work in one.card.works}
        works = sorted(judged & measured.works(entries).keys())
        return self.environment.get_template(f"site/{template}").render(
            root=root, home=root if self.served and root else f"{root}index.html" if not self.served else "./",
            served=self.served, works=works, **given,
        )  # fmt: skip

    def home(self, entries: Sequence[Entry], found: Sequence[Entry], asked: Asked) -> str:
        """The list, with what was asked for filled in."""
        domains = Counter(entry.card.domain for entry in entries)
        return self._render(
            "home.html", "", entries,
            found=found, asked=asked, total=len(entries), by_meaning=self.by_meaning,
            domains=sorted(domains), statuses=STATUSES,
            counts=Counter(entry.status for entry in entries),
            verdicts=Counter(entry.verdict for entry in entries if entry.status == "checked"),
        )  # fmt: skip

    def paper(self, entry: Entry, entries: Sequence[Entry]) -> str:
        """A paper: its card, how to run it, what was measured, its code, and what is near it."""
        one, record = entry.card, entry.record
        known = {other.card.slug: other for other in entries}
        near = [(known[slug], shared) for slug, shared in one.related.items()]
        near += [(known[slug], "it covers this") for slug in one.covers]
        pointing = [other for other in entries if one.slug in (*other.card.related, *other.card.covers)]
        told = {other.card.slug for other, _ in near}
        near += [
            (other, other.card.related.get(one.slug, "it covers this one"))
            for other in pointing
            if other.card.slug not in told
        ]
        return self._render(
            "paper.html", "../", entries,
            entry=entry, card=one, record=record, facts=[*facts(entry)][2:-1], commands=commands(one), near=near,
            machine=machine_line(record.machine) if record else "",
            charts=_charts(entry) if record else [],
            columns={name: measured.NAMES[name] for name in measured.columns(record)} if record else {},
            shown=measured.shown, code=_code(one.module) if one.module else None,
        )  # fmt: skip

    def work(self, name: str, points: Sequence[Point], entries: Sequence[Entry]) -> str:
        """The methods that were measured on one work, against each other."""
        best = measured.best(points, 1)
        spots = [_spot(one, "identical", 100) for one in best]
        calls = [_spot(one, "calls_per_token", -1) for one in best]
        return self._render(
            "work.html", "../", entries,
            name=name, points=points, best=best, shown=measured.shown, names=measured.NAMES,
            quality=charts.scatter(spots, "speed, × greedy decoding", "same text as greedy, %", (0.0, 100.0)),
            tokens=charts.scatter(calls, "speed, × greedy decoding", "tokens a call"),
            batches=sorted({one.row.batch for one in points}),
        )  # fmt: skip

    def watch(self, entries: Sequence[Entry], choices: Mapping[str, Any]) -> str:
        """The viewer of decoding."""
        return self._render("watch.html", "", entries, **choices)

    def problem(self, status: int, sentence: str, entries: Sequence[Entry]) -> str:
        """A page that says what went wrong."""
        return self._render("problem.html", "/" if self.served else "", entries, status=status, sentence=sentence)


def _spot(one: Point, name: str, times: float) -> charts.Spot:
    speed, value = one.row.numbers["speedup"], one.row.numbers[name].median
    height = 1 / value if times < 0 else times * value
    card = one.entry.card
    return charts.Spot(
        card.slug, speed.median, speed.low, speed.high, round(height, 3), card.exact, f"../papers/{card.slug}.html"
    )


def _charts(entry: Entry) -> list[tuple[str, Markup]]:
    """For each work and batch size of a record: the speed of each setting."""
    record = entry.record
    assert record is not None
    drawn = []
    for work, batch in dict.fromkeys((row.work, row.batch) for row in record.rows if "speedup" in row.numbers):
        lines = [
            charts.Range(Point(entry, row).label, spread.median, spread.low, spread.high)
            for row in record.rows
            if (row.work, row.batch) == (work, batch) and (spread := row.numbers.get("speedup")) is not None
        ]
        title = f"{work}, {'one text at a time' if batch == 1 else f'batches of {batch}'}"
        drawn.append((title, charts.ranges(lines, "speed, × token by token", 1.0)))
    return drawn


@dataclass(frozen=True)
class Code:
    """A module as a page shows it: what its docstring says, and its source with its syntax marked."""

    module: str
    says: list[str]
    source: Markup
    lines: int


def _code(module: str) -> Code:
    path = source_of(module)
    assert path is not None
    return _coloured(module, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=512)
def _coloured(module: str, path: Path, modified: int) -> Code:
    import ast

    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    text = path.read_text(encoding="utf-8")
    says = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")
    source = Markup(highlight(text, PythonLexer(), HtmlFormatter(nowrap=True)))  # escaped by the formatter
    return Code(module, says, source, text.count("\n"))


@cache
def static(name: str) -> str:
    """A style sheet or a script."""
    if name == "site.css":
        return "".join((TEMPLATES / part).read_text(encoding="utf-8") for part in ("colours.css", "site/site.css"))
    return (TEMPLATES / "site" / name).read_text(encoding="utf-8")
