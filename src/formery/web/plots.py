"""The report's two plots, as SVG that takes its colours and font from the page."""

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from formery.web.words import OTHER, metrics, promise, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from formery.evidence.compare import Comparison, MethodRow

# Stand-ins that are replaced by the page's own colours.
COLOURS = {
    "#010203": "var(--ink)",
    "#020304": "var(--faint)",
    "#030405": "var(--accepted)",
    "#040506": "var(--target)",
    "#050607": "var(--rejected)",
    "#060708": "var(--paper)",
}
INK, FAINT, ACCEPTED, TARGET, REJECTED, PAPER = COLOURS
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "formery",
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.8,
}
POINTS_PER_CHARACTER, POINTS_PER_LINE = 5.0, 13.0
NAMED = 12  # methods whose names have room in a plot


def quality_against_speed(comparison: "Comparison") -> str:
    """Each method's main quality over its speed relative to greedy; the bar is the range over the rounds.

    The fastest are named, as many as have room.
    """
    rows = comparison.rows
    metric = next(iter(metrics(rows[0].quality)), None)
    heights = [100 * row.identical if metric is None else metrics(row.quality)[metric] for row in rows]
    label = "outputs identical to greedy, %" if metric is None else metric.replace("_", " ")
    figure, axes = _figure(3.3)
    for row, height in zip(rows, heights, strict=True):
        low, high = row.spread
        axes.plot([low, high], [height, height], color=FAINT, linewidth=3, solid_capstyle="round", zorder=1)
        filled = ACCEPTED if promise(row) != OTHER else PAPER
        axes.plot(row.speedup, height, "o", markersize=8, color=filled, markeredgecolor=ACCEPTED, zorder=3)
    axes.axvline(1, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    left, right = min(row.spread[0] for row in rows), max(row.spread[1] for row in rows)
    margin = 0.12 * (right - left) + 0.02
    axes.set_xlim(left - margin, right + margin)
    room = 0.9 * (max(heights) - min(heights)) or 0.1 * max(map(abs, heights)) or 1.0
    axes.set_ylim(min(heights) - room, max(heights) + room)
    axes.set_xlabel("speed, × greedy")
    axes.set_ylabel(label)
    axes.set_yticks([tick for tick in axes.get_yticks() if _within(tick, heights)])
    fastest = sorted(zip(rows, heights, strict=True), key=lambda one: -one[0].speedup)[:NAMED]
    _label(axes, [(row.speedup, height) for row, height in fastest], [row for row, _ in fastest])
    return _svg(figure, "quality")


def tokens_per_call(comparison: "Comparison") -> str:
    """What a target call brings in the mean: accepted guesses, its own token; behind them rejected ones."""
    rows = [
        row
        for row in comparison.rows
        if any(one.generations[row.method].drafted for one in comparison.outputs)
    ]
    figure, axes = _figure(1.1 + 0.42 * max(1, len(rows)))
    means = [_means(comparison, row) for row in rows]
    # Guesses at a whole text would leave no room to see anything else.
    widest = 4 * max((written for _, written, _ in means), default=1.0)
    for place, (accepted, written, drafted) in enumerate(means):
        rejected = drafted - accepted
        axes.barh(place, accepted, 0.5, color=ACCEPTED)
        axes.barh(place, written - accepted, 0.5, left=accepted, color=TARGET)
        shown = min(rejected, widest - written)
        axes.barh(
            place, shown, 0.5, left=written, color=PAPER, edgecolor=REJECTED, hatch="////", linewidth=0.8
        )
        label = (
            f" {accepted:.2f} of {drafted:.3g}" if shown == rejected else f"… {accepted:.2f} of {drafted:.3g}"
        )
        axes.annotate(label, (written + shown, place), va="center", color=INK)
    axes.set_yticks(range(len(rows)), [short(row.method).replace(" ", "\n", 1) for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    furthest = max(
        (min(widest, written + drafted - accepted) for accepted, written, drafted in means), default=1.0
    )
    axes.set_xlim(0, 1.35 * furthest)
    axes.set_xlabel("tokens per call of the model")
    return _svg(figure, "accepted")


def _means(comparison: "Comparison", row: "MethodRow") -> tuple[float, float, float]:
    """Accepted, written and drafted tokens per call."""
    outputs = [one.generations[row.method] for one in comparison.outputs]
    calls = sum(one.calls for one in outputs)
    accepted, drafted = sum(one.accepted for one in outputs), sum(one.drafted for one in outputs)
    return accepted / calls, sum(len(one.tokens) for one in outputs) / calls, drafted / calls


def _figure(height: float) -> tuple["Figure", "Axes"]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(5.0, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
    return figure, axes


def _within(tick: float, heights: Sequence[float]) -> bool:
    slack = 0.5 * (max(heights) - min(heights)) + 0.03 * max(map(abs, heights))
    return min(heights) - slack <= tick <= max(heights) + slack


def _label(axes: "Axes", points: Sequence[tuple[float, float]], rows: Sequence["MethodRow"]) -> None:
    """Writes each method's name near its point, where no other name is yet."""
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    scale = 72 / axes.figure.dpi
    frame = axes.get_window_extent()
    taken: list[tuple[float, float, float, float]] = []
    places = [axes.transData.transform(point) * scale for point in points]
    blocked = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    for (x, y), row, point in sorted(
        zip(places, rows, points, strict=True), key=lambda one: (one[0][0], one[0][1])
    ):
        width = POINTS_PER_CHARACTER * len(short(row.method))
        left = min(max(x - width / 2, frame.x0 * scale), frame.x1 * scale - width)
        for step in range(40):
            offset = (1 if step % 2 == 0 else -1) * (14 + POINTS_PER_LINE * (step // 2))
            box = (left, y + offset - 5, left + width, y + offset + 6)
            if not any(_overlap(box, other) for other in [*taken, *blocked]):
                break
        taken.append(box)
        axes.annotate(
            short(row.method),
            point,
            ((left + width / 2 - x), offset),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=9,
            color=INK,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 5},
        )


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _svg(figure: "Figure", name: str) -> str:
    """The figure as an element to put into a page: no header, its own names, the page's colours and font."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    nothing: dict[str, Any] = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"| (?:width|height)="[\d.]+pt"', "", text)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    return text
