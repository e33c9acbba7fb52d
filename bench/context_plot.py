"""The two pictures of docs/long-context.md: speed over the context, and quality over the bytes that are kept."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from formery.evidence.record import Record, read
from formery.files import atomic_write

RECORDS = ("tova", "a2sf")  # which rules say what stays, on one model and the same texts
BASELINES = {"whole cache": ("black", "*"), "smaller dense model": ("dimgray", "D")}


def draw(found: dict[str, Any], out: Path) -> None:
    """Draws what `python -m bench context` measured, and what records say of bounded caches, into a picture."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    _speed(left, found["speed"])
    records = [record for record in map(read, RECORDS) if record is not None]
    _quality(middle, records, "loss", "prose: nats a token")
    _quality(right, records, "answered", "questions answered")
    for axes in (left, middle, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(out) as path:
        figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


def _speed(axes: Axes, rows: list[dict[str, Any]]) -> None:
    for name in dict.fromkeys(one["system"] for one in rows):
        own = [one for one in rows if one["system"] == name]
        line = "--" if name.startswith("whole cache") else "-"
        axes.plot(
            [one["context"] for one in own], [one["tokens_per_second"] for one in own], line, marker="o", label=name
        )
    axes.set(xscale="log", xlabel="tokens of context", ylabel="tokens a second, one row", ylim=(0, None))
    contexts = sorted({one["context"] for one in rows})
    axes.set_xticks(contexts, [f"{one:,}" for one in contexts])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)


def _quality(axes: Axes, records: list[Record], value: str, label: str) -> None:
    """Median and range over seeds of each rule, by the bytes of its state."""
    lines: dict[str, list[tuple[float, float, float, float]]] = {}
    for row in (row for record in records for row in record.rows if value in row.numbers):
        held, found = row.numbers["state_bytes"].median / 2**20, row.numbers[value]
        point = (held, found.median, found.median - found.low, found.high - found.median)
        own = lines.setdefault(row.setting.partition(", 1/")[0], [])
        if all(other[0] != held for other in own):
            own.append(point)
    for name, points in lines.items():
        places, medians, below, above = zip(*sorted(points), strict=True)
        colour, marker = BASELINES.get(name, (None, "o"))
        axes.errorbar(places, medians, (below, above), label=name, color=colour, marker=marker, capsize=2, linewidth=1)
    axes.set(xscale="log", xlabel="state of a text of 1,024 tokens, MiB", ylabel=label)
    axes.legend(frameon=False, fontsize=7)
