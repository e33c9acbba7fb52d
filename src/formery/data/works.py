"""All works by name."""

from typing import Any

from formery.data.base import Example, Split, Work
from formery.data.code import Code
from formery.data.translate import Translate
from formery.data.write import Shakespeare, WikiText
from formery.errors import unknown

__all__ = ["WORKS", "Example", "Split", "Work", "work"]

WORKS: dict[str, type[Work[Any]]] = {kind.name: kind for kind in (Code, Translate, WikiText, Shakespeare)}


def work(name: str) -> Work[Any]:
    """The work of that name; raises FormeryError, with the nearest names, when there is none."""
    if name not in WORKS:
        raise unknown("work", name, WORKS)
    return WORKS[name]()
