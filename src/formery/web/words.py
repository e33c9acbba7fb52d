"""How numbers and names are said, the same in the table, the report and the messages."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from formery.evidence.compare import MethodRow
    from formery.generate import Generation

KIBIBYTE = 1024
IDENTICAL, DISTRIBUTION, OTHER = "same text", "same distribution", "another text"

STOPS = {"end": "ended by the model", "stop": "ended at a stop string", "length": "cut at its length"}


def share(value: float) -> str:
    """A fraction as a percentage that is never rounded up to all or down to nothing."""
    percent = 100 * value
    if percent in (0, 100):
        return f"{percent:.0f} %"
    return f"{min(99.9, max(0.1, percent)):.3g} %"


def size(count: int) -> str:
    """A number of bytes in the unit in which it has at most three digits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value /= KIBIBYTE
        del units[0]
    return f"{value:.0f} {units[0]}" if value >= 10 or units[0] == "B" else f"{value:.1f} {units[0]}"


def took(seconds: float) -> str:
    """A time in the unit that fits."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def rate(value: float) -> str:
    """A number with three significant digits, zeros too, and no exponent."""
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def name_and_options(method: str) -> tuple[str, str]:
    """ "speculative-sampling:length=8:draft=x" as its name and "length=8 draft=x"."""
    name, _, options = method.partition(":")
    return name, options.replace(":", " ")


def short(method: str) -> str:
    """A method's name for a narrow place: "parallel-jacobi form=plain"."""
    name, options = name_and_options(method)
    return f"{name.removesuffix('-decoding')} {options}".strip()


def promise(row: "MethodRow") -> str:
    """What a method promises, compared with greedy decoding or, where it draws, with plain sampling."""
    from formery.generate.method import find  # with torch, which a list of papers does without

    if not row.lossless:
        return OTHER
    return DISTRIBUTION if find(row.method)[0].defaults.get("temperature", 0) > 0 else IDENTICAL


def figures(one: "Generation") -> str:
    """What a generation took, in one line."""
    seconds = sum(event.draft_seconds + event.verify_seconds for event in one.trace)
    facts = [
        f"{counted(len(one.tokens), 'token') or 'no tokens'} in {counted(one.calls, 'call') or 'no calls'}"
    ]
    if one.drafted:
        facts.append(f"{one.accepted} of {one.drafted} drafted accepted")
    if seconds:
        facts.append(f"{rate(len(one.tokens) / seconds)} tokens/s")
    return "; ".join([*facts, STOPS[one.stop]])


def metrics(quality: Mapping[str, float | str]) -> dict[str, float]:
    """The numbers among a work's qualities, its main one first."""
    return {name: value for name, value in quality.items() if not isinstance(value, str)}


def counted(number: object, thing: str) -> str:
    """ "1 core", "2 cores"; nothing where the number is not known."""
    return f"{number} {thing}{'' if number == 1 else 's'}" if number else ""


def machine_line(machine: Mapping[str, object]) -> str:
    """What a comparison ran on, as far as it is known, in one line."""
    cores, threads, memory = machine.get("cores"), machine.get("threads"), machine.get("memory_gib")
    facts = [
        str(machine.get("processor") or machine.get("architecture") or "unknown processor"),
        counted(cores, "core"),
        counted(threads, "thread"),
        f"{memory} GiB" if memory else "",
        str(machine.get("system") or ""),
    ]
    return ", ".join(fact for fact in facts if fact)
