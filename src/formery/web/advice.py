"""Advice in a terminal: what would help, how to apply it, and what it was told from."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from formery.web.table import listing
from formery.web.words import counted, machine_line, name_and_options, rate, share, size

if TYPE_CHECKING:
    from formery.evidence.prediction import Advice, Factor, Option

SHARE = 0.2  # of a call; where reading the state takes that much, a smaller state would be worth something
WAVERING = 1.5  # between the slow and the fast times of one call: more, and something else was running
SHOWN = (1, 2, 4, 8, 17, 33, 65)  # widths of calls


def advice(one: "Advice") -> RenderableType:
    """The advice, at 80 columns: a table of all that was looked at, commands, and what was measured."""
    from formery.evidence.machine import machine
    from formery.evidence.prediction import best_of_each

    above = (
        f"{one.model}: {counted(one.prompts, 'prompt')}, {one.tokens} tokens of its own greedy text, "
        f"at most {one.max_new_tokens} each; {one.seconds:.0f} s"
    )
    if one.shortened:
        above += f"; {counted(one.shortened, 'prompt')} lost their beginning"
    helpful = one.recommended
    rest = [each for each in best_of_each(one.options) if each not in helpful]
    return Group(
        Text(above, style="bold"),
        Text(machine_line(machine()), style="dim"),
        Text(),
        Text(headline(helpful), style="bold"),
        Text(),
        _table(helpful, [each for each in rest if each.in_use], [each for each in rest if not each.in_use]),
        *_section("To apply it", [_apply(each) for each in helpful]),
        *_section("If it is run", _confirmed(one)),
        *_section("What was measured", _measured(one)),
        *_section("To bear in mind", [*_busy(one), *one.notes]),
    )


def headline(helpful: "Sequence[Option]") -> str:
    """What to do, in a sentence."""
    if not helpful:
        return "Nothing here will help: token by token decoding is as fast as anything that was looked at."
    alone = [each for each in helpful if each.kind != "batch"]
    same = [each for each in alone if each.quality is None]
    sentences = []
    if alone:
        sentences.append(f"{_called(alone[0])} helps most, about {rate(alone[0].factor.value)} times as fast.")
    if same and same[0] is not alone[0]:
        sentences.append(f"With the very same text: {_called(same[0])}, {rate(same[0].factor.value)} times.")
    if batches := [each for each in helpful if each.kind == "batch"]:
        sentences.append(f"Many prompts at once: {_called(batches[0])}, {rate(batches[0].factor.value)} times.")
    return " ".join(sentences)


def _called(one: "Option") -> str:
    return " ".join(name_and_options(one.name)).strip()


def _table(helpful: "Sequence[Option]", used: "Sequence[Option]", useless: "Sequence[Option]") -> Table:
    """All options, those that help first."""
    from formery.evidence.prediction import WORTH

    rows: list[tuple[RenderableType, ...]] = []
    for title, options, style in (
        ("would help", helpful, "green"),
        ("in use already", used, ""),
        ("may help, or may not", [each for each in useless if each.factor.value > WORTH], ""),
        ("would not help", [each for each in useless if each.factor.value <= WORTH], "dim"),
    ):
        if options:
            rows.append((Text(title, style="bold"), "", ""))
            rows += [(_name(each), Text(factor(each.factor), style=style), Text(_note(each))) for each in options]
    table = listing(("", "× as fast (90 %)", "what comes with it"), rows)
    table.columns[1].no_wrap = True
    table.columns[0].width, table.columns[1].width = 27, 17
    return table


def _name(one: "Option") -> Text:
    name, options = name_and_options(one.name)
    text = Text(f"  {name}")
    if options:
        text.append(f"\n    {options}", style="dim")
    return text


def factor(one: "Factor") -> str:
    """A factor with the ends of its interval."""
    return f"{rate(one.value)} ({rate(one.low)}–{rate(one.high)})"


def _note(one: "Option") -> str:
    """What an option costs and brings besides, in words."""
    detail = one.detail
    if one.kind == "kernels":
        return "same text" if one.in_use else "same text, but for near ties"
    if one.kind == "batch":
        return (
            f"same text; one batch takes {rate(detail['one_takes'])} × as long as one prompt, and "
            f"{size(int(detail['state_bytes']))} of state"
        )
    if one.kind == "method":
        return f"same text; {detail['calls_per_token']:.2f} calls a token, {share(detail['accepted'])} of guesses stand"
    assert one.quality is not None
    nats, same = one.quality.nats, one.quality.same
    return (
        f"not exact: {nats:+.4f} nats a token, {share(same)} of choices the same; "
        f"{size(int(detail['weight_bytes']))} of weights"
    )


def _apply(one: "Option") -> str:
    return one.command or one.python


def _confirmed(one: "Advice") -> list[RenderableType]:
    """Predicted against measured."""
    from formery.evidence.prediction import mean_error

    if not one.confirmed:
        return []
    rows = [
        (_name(each.option), factor(each.option.factor), factor(each.measured), f"{100 * each.error:.0f} %")
        for each in one.confirmed
    ]
    return [
        listing(("", "predicted (90 %)", "measured (range)", "off by"), rows, numbers=3),
        Text(f"off by {100 * mean_error(one.confirmed):.0f} % on average", style="dim"),
    ]


def _measured(one: "Advice") -> list[RenderableType]:
    """What the predictions were made from."""
    profile = one.profile
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    seconds = dict(zip(profile.calls.at, profile.calls.medians(), strict=True))
    calls = ", ".join(f"{width}: {rate(1000 * seconds[width])}" for width in SHOWN if width in seconds)
    facts.add_row("calls", f"milliseconds by tokens read at once, behind {profile.context}: {calls}")
    facts.add_row(
        "step",
        f"{rate(1000 * profile.step_seconds)} ms a token in all; {rate(1000 * profile.prefill_seconds)} ms before the "
        "first",
    )
    bandwidth = f"{profile.read_bytes / seconds[1] / 1e9:.1f} GB/s of weights"
    facts.add_row(
        "bandwidth",
        f"{bandwidth}; a plain read of memory takes {profile.streaming / 1e9:.1f} GB/s",
    )
    facts.add_row("memory", f"{size(profile.weight_bytes)} of weights")
    facts.add_row(
        "text",
        f"{rate(profile.nats / math.log(2))} bits a token on {profile.on}; {share(profile.sure)} of written "
        "tokens had more than half of the probability",
    )
    facts.add_row("state", _state(one))
    return [facts]


def _busy(one: "Advice") -> list[str]:
    """A warning where the same call took very different times."""
    taken = sorted(row[0] for row in one.profile.calls.seconds)
    fast, slow = taken[len(taken) // 10], taken[-1 - len(taken) // 10]
    if slow <= WAVERING * fast:
        return []
    return [
        f"This machine was busy with other things: the same call took {rate(1000 * fast)} to {rate(1000 * slow)} ms. "
        "Ask again when it is idle."
    ]


def _state(one: "Advice") -> str:
    """What the decode state costs, and whether a method that shrinks it is here."""
    each, once, memory = one.profile.state
    parts = [f"{size(each or 0)} a token and row"]
    parts += [f"{size(once)} a row besides"] if once else []
    parts += [f"{size(memory)} for each place that the encoder read"] if memory else []
    words = ", ".join(parts)
    words += f"; {_reading(one)}" if one.profile.contexts is not None else ""
    if not one.cache_methods:
        return f"{words}. No method that shrinks it is here yet."
    return f"{words}. Methods that shrink it: {', '.join(one.cache_methods)} (`formery show NAME`)."


def _reading(one: "Advice") -> str:
    profile = one.profile
    assert profile.contexts is not None
    longest = profile.contexts.at[1]
    taken = profile.state_share(longest)
    words = (
        f"reading it takes {share(taken)} of a call behind {longest} tokens"
        if taken > 0
        else (f"reading it takes nothing that can be measured behind {longest} tokens")
    )
    place = profile.context_of(SHARE)
    if place is None:
        return words
    beyond = profile.positions is not None and place > profile.positions
    return f"{words}, {share(SHARE)} {'only ' if beyond else ''}at about {place:,.0f}" + (
        f", more than the {profile.positions:,} that the model takes" if beyond else ""
    )


def _section(title: str, lines: Sequence[RenderableType]) -> list[RenderableType]:
    """A title with lines below it; nothing where there are none."""
    if not lines:
        return []
    return [
        Text(),
        Text(title, style="bold"),
        *(Padding(each if not isinstance(each, str) else Text(each), (0, 0, 0, 2)) for each in lines),
    ]
