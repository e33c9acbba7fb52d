"""The one exception that a user sees: a sentence that says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class FormeryError(Exception):
    """A mistake in what was asked for or given, told in one sentence; the command line prints it and exits 2."""


def first_line(error: BaseException) -> str:
    """What an error says, as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:300]


def unknown(kind: str, name: str, known: Iterable[str]) -> FormeryError:
    """The error for a name that is not known, with the nearest known names as a suggestion."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names) or 'none'}."
    return FormeryError(f"there is no {kind} named {name!r}; {hint}")
