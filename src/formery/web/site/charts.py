"""Charts of evidence as SVG in the page's own colours: ranges side by side, and quality over speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from markupsafe import Markup

WIDTH, LINE, LEFT, CHARACTER = 680, 24, 250, 6.6
FOOT = 40


@dataclass(frozen=True)
class Range:
    """A line of a chart: a name, the middle, and both ends."""

    label: str
    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class Spot:
    """A point of a scatter; filled where the text is the plain method's."""

    label: str
    x: float
    low: float
    high: float
    y: float
    filled: bool
    href: str


def ranges(lines: Sequence[Range], axis: str, reference: float | None = None) -> Markup:
    """Each line's middle and range on one axis, with a dashed line at `reference`."""
    if not lines:
        return Markup("")
    ends = [value for one in lines for value in (one.low, one.high)] + ([reference] if reference is not None else [])
    ticks = _ticks(min(0.0, *ends), max(ends))
    low, high = ticks[0], ticks[-1]
    height = LINE * len(lines) + FOOT

    def at(value: float) -> float:
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 30)

    drawn = [_grid(ticks, at, 6, height - FOOT + 6, axis)]
    if reference is not None:
        drawn.append(_line(at(reference), 2, at(reference), height - FOOT + 6, "reference"))
    for number, one in enumerate(lines):
        y = LINE * number + LINE / 2 + 4
        most = int((LEFT - 20) / CHARACTER)
        label = one.label if len(one.label) <= most else f"{one.label[: most - 1]}…"
        drawn.append(_text(LEFT - 12, y + 4, label, "end"))
        drawn.append(_line(at(one.low), y, at(one.high), y, "range"))
        spot = '<circle cx="{:.1f}" cy="{:.1f}" r="4.5" class="spot"><title>{}</title></circle>'
        title = f"{one.label}: {one.middle:.3g} ({one.low:.3g}–{one.high:.3g})"
        drawn.append(Markup(spot).format(at(one.middle), y, title))
    said = "; ".join(f"{one.label}: {one.middle:.3g}, {one.low:.3g} to {one.high:.3g}" for one in lines)
    return _svg(drawn, height, f"{axis}. {said}")


def scatter(spots: Sequence[Spot], x_axis: str, y_axis: str, whole: tuple[float, float] | None = None) -> Markup:
    """Points with their ranges along x, a dashed line at 1, and names in tiers so that none lies on another.

    whole: the ends of the y axis, by default as the points need it.
    """
    if not spots:
        return Markup("")
    left, right = 62, WIDTH - 20
    x_ticks = _ticks(min(one.low for one in spots), max(1.0, *(one.high for one in spots)))
    y_ticks = _ticks(*(whole or (min(one.y for one in spots), max(one.y for one in spots))))

    def at_x(value: float) -> float:
        return left + (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - left)

    tiers = _tiers(spots, at_x, right)
    top = 18 + 15 * (1 + max(tiers))
    bottom = top + 150

    def at_y(value: float) -> float:
        return bottom - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (bottom - top)

    drawn = [_grid(x_ticks, at_x, top, bottom, x_axis), _line(at_x(1), top, at_x(1), bottom, "reference")]
    for tick in y_ticks:
        drawn.append(_line(left, at_y(tick), right, at_y(tick), "grid"))
        drawn.append(_text(left - 8, at_y(tick) + 4, f"{tick:g}", "end", "tick"))
    drawn.append(_text(14, (top + bottom) / 2, y_axis, "middle", "axis", turned=True))
    for one, tier in zip(spots, tiers, strict=True):
        x, y, label_y = at_x(one.x), at_y(one.y), top - 12 - 15 * tier
        drawn += [_line(x, label_y + 4, x, y, "leader"), _line(at_x(one.low), y, at_x(one.high), y, "range")]
    for one, tier in zip(spots, tiers, strict=True):
        x, y, label_y = at_x(one.x), at_y(one.y), top - 12 - 15 * tier
        start = min(x - 4, right - CHARACTER * len(one.label))
        kind = "spot" if one.filled else "spot hollow"
        title = f"{one.label}: {one.x:.3g} ({one.low:.3g}–{one.high:.3g}), {one.y:.4g}"
        linked = '<a href="{}"><circle cx="{:.1f}" cy="{:.1f}" r="5" class="{}"/>{}<title>{}</title></a>'
        drawn.append(Markup(linked).format(one.href, x, y, kind, _text(start, label_y, one.label), title))
    return _svg(drawn, bottom + FOOT, f"{y_axis} over {x_axis}", role="group")


def _tiers(spots: Sequence[Spot], at_x: Callable[[float], float], right: float) -> list[int]:
    """For each point the lowest tier in which its name overlaps none."""
    ends: list[float] = []
    tiers = {}
    for number in sorted(range(len(spots)), key=lambda place: -spots[place].x):
        width = CHARACTER * len(spots[number].label) + 10
        start = min(at_x(spots[number].x) - 4, right - width + 10)
        tier = next((place for place, first in enumerate(ends) if start + width < first), len(ends))
        ends[tier : tier + 1] = [start]
        tiers[number] = tier
    return [tiers[number] for number in range(len(spots))]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from below `low` to above `high`."""
    if high - low < 1e-9:
        low, high = low - max(0.1 * abs(low), 0.1), high + max(0.1 * abs(high), 0.1)
    power = 10 ** floor(log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= 6)
    return [round(step * number, 10) for number in range(floor(low / step + 1e-9), ceil(high / step - 1e-9) + 1)]


def _grid(ticks: Sequence[float], at: Callable[[float], float], top: float, bottom: float, axis: str) -> Markup:
    drawn = Markup("")
    for tick in ticks:
        drawn += _line(at(tick), top, at(tick), bottom, "grid")
        drawn += _text(at(tick), bottom + 15, f"{tick:g}", "middle", "tick")
    return drawn + _text((at(ticks[0]) + at(ticks[-1])) / 2, bottom + 32, axis, "middle", "axis")


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "name", turned: bool = False) -> Markup:
    turn = Markup(' transform="rotate(-90 {:.1f} {:.1f})"').format(x, y) if turned else ""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}" class="{}"{}>{}</text>').format(
        x, y, anchor, kind, turn, text
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    return Markup('<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" class="{}"/>').format(x1, y1, x2, y2, kind)


def _svg(drawn: Sequence[Markup], height: float, said: str, role: str = "img") -> Markup:
    head = '<svg class="chart" viewBox="0 0 {} {:.0f}" role="{}" aria-label="{}">'
    return Markup(head).format(WIDTH, height, role, said) + Markup("").join(drawn) + Markup("</svg>")
