"""The one exception that a user sees: a sentence that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class FormeryError(Exception):
    """A mistake in what was asked for or given, told in one sentence; the command line prints it and exits 2."""


def first_line(error: BaseException) -> str:
    """What an error says, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def brief(value: object) -> str:
    """A value from a file as a part of a sentence: the start of its repr."""
    try:
        return f"{value!r:.200}"
    except (RecursionError, ValueError):
        return f"a {type(value).__name__} too large to show"


def shown(name: str) -> str:
    """A name from a file as a part of a sentence: as it is, unless that would not be one short line."""
    return name if name.isprintable() and 0 < len(name) <= 200 else brief(name)


def unknown(kind: str, name: str, known: Iterable[str]) -> FormeryError:
    """The error for a name that is not known, with the nearest known names as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}."
    return FormeryError(f"there is no {kind} named {name!r}; {hint}")
