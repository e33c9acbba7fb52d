"""Comparisons, papers and recipes as tables that read well at 80 columns."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from formery.web.words import IDENTICAL, machine_line, metrics, name_and_options, promise, rate, share, size

if TYPE_CHECKING:
    from formery.evidence.compare import Comparison, MethodRow


def console(stderr: bool = False) -> Console:
    """Where tables and messages go; colours only where a terminal shows them and NO_COLOR does not forbid."""
    return Console(stderr=stderr, highlight=False, soft_wrap=False)


def listing(
    columns: Sequence[str], rows: Iterable[Sequence[RenderableType]], numbers: int = 0, whole: int = 0
) -> Table:
    """A table without a frame; the last `numbers` columns are set to the right, the first `whole` are never folded."""
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for place, column in enumerate(columns):
        right = place >= len(columns) - numbers
        table.add_column(column, justify="right" if right else "left", no_wrap=right or place < whole, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def comparison_table(comparison: "Comparison") -> RenderableType:
    """The comparison with a line above on what was run, and below on how to read it."""
    settings, rows = comparison.settings, comparison.rows
    quality = next(iter(metrics(rows[0].quality)), None)
    head = ["method", "same as\ngreedy", "tokens\n/s", "× greedy\n(range)", "calls\n/token", "state"]
    if quality is not None:
        head.append(quality.replace("_", "\n"))
    above = (
        f"{comparison.model} on {comparison.work}: {settings['examples']} examples, at most "
        f"{settings['max_new_tokens']} new tokens, batch {settings['batch']}, seed {settings['seed']}"
    )
    below = [
        "same as greedy: the share of outputs with greedy's very tokens. × greedy: median and range of",
        f"{settings['rounds']} interleaved rounds.",
    ]
    if comparison.shortened:
        below.append(
            f"{comparison.shortened} prompts lost their beginning, so that the new tokens fit the model."
        )
    if guarded := sum(row.guarded for row in rows):
        below.append(f"{guarded} near ties between two tokens were decided by a plain step.")
    return Group(
        Text(above, style="bold"),
        Text(machine_line(comparison.machine), style="dim"),
        Text(),
        listing(head, [_cells(row, quality) for row in rows], numbers=len(head) - 1),
        Text(),
        Text(" ".join(below), style="dim"),
    )


def _cells(row: "MethodRow", quality: str | None) -> list[RenderableType]:
    name, options = name_and_options(row.method)
    method = Text(name)
    if options:
        method.append(f"\n  {options}", style="dim")
    low, high = row.spread
    style = "green" if low > 1 else "red" if high < 1 else ""
    speed = Text("1" if low == high == 1 else f"{rate(row.speedup)} ({rate(low)}–{rate(high)})", style=style)
    cells: list[RenderableType] = [
        method,
        Text(
            share(row.identical), style="bold red" if row.identical < 1 and promise(row) == IDENTICAL else ""
        ),
        Text(rate(row.tokens_per_second)),
        speed,
        Text(f"{row.calls_per_token:.2f}"),
        Text(size(row.state_bytes)),
    ]
    if quality is not None:
        cells.append(Text(f"{metrics(row.quality)[quality]:.3g}"))
    return cells


def profile_table(rows: Sequence[tuple[str, float, int]], seconds: float) -> RenderableType:
    """Where the time of a generation went."""
    cells = [
        (name, f"{spent * 1000:.1f}", f"{spent / seconds:.0%}" if seconds else "", str(times) if times else "")
        for name, spent, times in rows
    ]
    head = ("where the time went", "ms", "share", "times")
    return listing(head, [*cells, ("in all", f"{seconds * 1000:.1f}", "100%", "")], numbers=3)
