"""A bar chart of results: each case a group, our bar among its peers', in shares of the fastest peer's speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report import read
from bench.systems import OURS
from formery.errors import FormeryError
from formery.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN, PEER, INK, FAINT = "#1f6f54", "#b9c2c9", "#22282c", "#7b858c"
KEYS = ("work", "model", "dtype", "batch", "width")
ROW, TITLE = 0.24, 0.36  # inches
FORMATS = ("png", "svg", "pdf")


def plot(results: Sequence[Path], out: Path) -> None:
    """Draws the rows of all these files into `out`; raises FormeryError for files that are no results."""
    if out.suffix.removeprefix(".") not in FORMATS:
        raise FormeryError(f"{out} should end in one of {', '.join(f'.{one}' for one in FORMATS)}.")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run, path in enumerate(results):  # rows of different runs are not mixed
        for row in read(path):
            groups.setdefault((run, *(row[key] for key in KEYS)), []).append(row)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(TITLE + ROW * len(rows) for rows in groups.values()) + 0.8
    figure, axes = pyplot.subplots(figsize=(8, height), layout="constrained")
    place = 0.0
    for rows in groups.values():
        place = _group(axes, place, sorted(rows, key=lambda row: -row["tokens_per_second"]))
    axes.set_ylim(place, -0.1)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.25)
    axes.axvline(1, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("speed, in times the fastest peer's (line: the range over the rounds)", color=INK)
    axes.set_yticks([])
    axes.spines[["left", "top", "right"]].set_visible(False)
    with atomic_write(out) as temporary:
        figure.savefig(temporary, dpi=150, format=out.suffix.removeprefix("."))
    pyplot.close(figure)


def _group(axes: "Axes", place: float, rows: Sequence[dict[str, Any]]) -> float:
    """The bars of one case below `place`; where the next may begin."""
    first = rows[0]
    calls = "" if first["width"] is None else f", calls of {first['width']}"
    title = f"{first['work']}, {first['model']}, {first['dtype']}, batch {first['batch']}{calls}"
    axes.text(0, place + 0.6 * TITLE, title, va="center", color=INK, weight="bold", fontsize=9)
    place += TITLE
    best = max((row["tokens_per_second"] for row in rows if row["system"] != OURS), default=first["tokens_per_second"])
    for row in rows:
        middle, own = place + ROW / 2, row["system"] == OURS
        share, low, high = (value / best for value in (row["tokens_per_second"], *row["spread"]))
        axes.barh(middle, share, 0.8 * ROW, color=OWN if own else PEER)
        axes.plot([low, high], [middle, middle], color=INK, linewidth=1)
        label = f"{row['system']}  {row['tokens_per_second']:,.0f} tokens/s"
        axes.text(
            max(share, high) + 0.015, middle, label, va="center", fontsize=8, color=OWN if own else INK,
            weight="bold" if own else "normal", bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
        place += ROW
    return place
