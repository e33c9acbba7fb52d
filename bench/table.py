"""What a person sees: progress while it runs, then a table for each case."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.race import Tell
from bench.rows import Row
from bench.systems import OURS

WIDTH = 80


@contextmanager
def progress(console: Console, title: str) -> Iterator[Tell]:
    """A line that tells what runs now, gone when the case is over; on a pipe, one line for the case."""
    if not console.is_terminal:
        console.print(f"{title} …")
        yield lambda done, total, what: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), TimeElapsedColumn())
    # Drawn only between runs: a clock that ticks would take time from what is timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(title, total=None)

        def tell(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=f"{title}: {what}", refresh=True)

        yield tell


def tables(title: str, rows: Sequence[Row]) -> Iterator[Table]:
    """A table for what did the same: one for the case, or one for each width of its calls."""
    for width in dict.fromkeys(row.width for row in rows):
        calls = "" if width is None else f" · calls of {width}"
        yield table(f"{title}{calls}", [row for row in rows if row.width == width])


def table(title: str, rows: Sequence[Row]) -> Table:
    """The systems, fastest first."""
    drawn = Table(title=title, title_justify="left", box=None, pad_edge=False)
    last = "one token" if rows[0].width else "limit"
    for heading in ("system", "tokens/s", "(range)", "× peer", "× HF", last):
        drawn.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    drawn.add_column("same", justify="left", no_wrap=True)
    for row in sorted(rows, key=lambda one: -one.tokens_per_second):
        drawn.add_row(*cells(row), style="bold" if row.system == OURS else "")
    return drawn


def cells(row: Row) -> tuple[str, ...]:
    """A row's cells."""
    low, high = row.spread
    return (
        row.system,
        figure(row.tokens_per_second),
        f"{figure(low)}–{figure(high)}",
        ratio(row.ratio_to_best_peer),
        ratio(row.ratio_to_transformers),
        f"{ratio(row.ratio_to_one_token)} ×" if row.width else f"{100 * row.ratio_to_limit:.0f} %",
        agreement(row),
    )


def agreement(row: Row) -> str:
    """Whether it wrote what transformers wrote, or where it first did not."""
    if row.agrees is None:
        return "–"
    if row.first_difference is None:
        return "yes"
    place = row.first_difference.get("place")
    return "no" if place is None else f"to {row.first_difference['row']}:{place}"


def figure(value: float) -> str:
    """Three digits where it is small, whole where it is large."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ratio(value: float | None) -> str:
    """Two decimals, a dash where there is none."""
    return "–" if value is None else f"{value:.2f}"
