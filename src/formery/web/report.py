"""A comparison as one HTML file that needs nothing else: table, plots, and every output side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from formery.data.tokenizer import Tokenizer
from formery.evidence.machine import versions
from formery.files import atomic_write
from formery.generate.method import find
from formery.web import words
from formery.web.plots import NAMED, quality_against_speed, tokens_per_call
from formery.web.tokens import Piece, first_difference, pieces
from formery.web.words import IDENTICAL, OTHER, metrics, promise, rate, share, size

if TYPE_CHECKING:
    from formery.evidence.compare import Comparison, MethodRow, Output

OPEN_EXAMPLES = 3
PROMPT_LINES, PROMPT_CHARACTERS = 12, 1200


@dataclass(frozen=True)
class Written:
    """One method's output for one example, ready to show."""

    name: str
    options: str
    summary: str
    pieces: Sequence[Piece]
    same: bool


def write_report(
    comparison: "Comparison", path: str | Path, tokenizer: Tokenizer | None = None, command: str = ""
) -> None:
    """Writes the page, whole or not at all; command: what made it, to be made again."""
    text = render(comparison, tokenizer, command)
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def render(comparison: "Comparison", tokenizer: Tokenizer | None = None, command: str = "") -> str:
    """The page as text; whatever a prompt or a model wrote is shown as text and never read as markup."""
    environment = Environment(
        loader=PackageLoader("formery.web", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = comparison.rows
    template = environment.get_template("report.html")
    return template.render(
        comparison=comparison,
        headline=headline(rows),
        machine=words.machine_line(comparison.machine),
        versions=versions(),
        metrics=list(metrics(rows[0].quality)),
        notes={name: value for name, value in rows[0].quality.items() if isinstance(value, str)},
        rows=[_row(row) for row in rows],
        named=NAMED if len(rows) > NAMED else 0,
        guarded=sum(row.guarded for row in rows),
        quality_plot=quality_against_speed(comparison),
        accepted_plot=tokens_per_call(comparison) if any(row.accepted_per_call for row in rows) else "",
        examples=[_example(output, tokenizer) for output in comparison.outputs],
        open_examples=OPEN_EXAMPLES,
        command=command,
    )


def headline(rows: Sequence["MethodRow"]) -> str:
    """What the comparison found, in a sentence."""
    kept = [row for row in rows[1:] if promise(row) == IDENTICAL and row.identical == 1]
    if not kept:
        return "No other method wrote what greedy decoding writes."
    best = max(kept, key=lambda row: row.speedup)
    low, high = best.spread
    name = " ".join(words.name_and_options(best.method)).strip()
    if low > 1:
        return f"{name} wrote greedy’s very text, {best.speedup:.2f} times as fast."
    if high < 1:
        nearest = f"{name} came nearest, at {best.speedup:.2f} of its speed."
        return f"No method was faster than greedy and kept its text; {nearest}"
    return f"{name} wrote greedy’s very text about as fast: {low:.2f} to {high:.2f} times its speed."


def _row(row: "MethodRow") -> dict[str, Any]:
    name, options = words.name_and_options(row.method)
    low, high = row.spread
    return {
        "name": name,
        "options": options,
        "summary": find(row.method)[0].summary,
        "promise": promise(row),
        "identical": share(row.identical),
        "broken": promise(row) == IDENTICAL and row.identical < 1,
        "filled": promise(row) != OTHER,
        "rate": rate(row.tokens_per_second),
        "speedup": rate(row.speedup),
        "spread": "" if low == high == 1 else f"{rate(low)}–{rate(high)}",
        "verdict": "faster" if low > 1 else "slower" if high < 1 else "",
        "calls": f"{row.calls_per_token:.2f}",
        "accepted": f"{row.accepted_per_call:.2f}" if row.accepted_per_call else "–",
        "drafting": share(row.drafting) if row.accepted_per_call else "–",
        "state": size(row.state_bytes),
        "held": size(round(row.state_per_layer_token)),
        "quality": [f"{value:.3g}" for value in metrics(row.quality).values()],
    }


def _example(output: "Output", tokenizer: Tokenizer | None) -> dict[str, Any]:
    baseline = next(iter(output.generations.values()))
    tail = "\n".join(output.prompt.splitlines()[-PROMPT_LINES:])[-PROMPT_CHARACTERS:]
    written = []
    for method, one in output.generations.items():
        name, options = words.name_and_options(method)
        difference = first_difference(one.tokens, baseline.tokens)
        facts = [f"{len(one.tokens)} tokens", f"{one.calls} calls"]
        if one.drafted:
            facts.append(f"{one.accepted} of {one.drafted} accepted")
        facts.append(words.STOPS[one.stop])
        written.append(
            Written(name, options, ", ".join(facts), pieces(one, tokenizer, difference), difference is None)
        )
    return {
        "name": output.name,
        "prompt": tail,
        "shortened": len(tail) < len(output.prompt),
        "reference": output.reference,
        "same": sum(one.same for one in written[1:]),
        "written": written,
    }
