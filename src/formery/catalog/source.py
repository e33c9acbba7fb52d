"""What the papers' files say of themselves, read without running them.

A card lies where the code lies: in the `Paper(...)` of the paper's file, beside the `Method(...)` that it registers.
Both are read from the source's syntax, so that a list of papers imports neither the papers nor torch.
"""

import ast
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from formery.errors import FormeryError
from formery.evidence.kept import Kept

PACKAGE = Path(__file__).parents[1]
METHODS = PACKAGE / "methods"
MADE = ("check", "make")  # arguments that are code
KEPT = Kept("papers", str(Path(__file__).stat().st_mtime_ns))


@dataclass(frozen=True)
class MethodCard:
    """A method that a paper's file registers, as `formery.generate.method.Method` has it."""

    name: str
    summary: str
    lossless: bool
    guide: str | None = None
    kinds: tuple[str, ...] = ("decoder", "encoder-decoder")


@dataclass(frozen=True)
class Written:
    """A paper's card as its file has it: the arguments of its `Paper`, the module, and its methods."""

    card: dict[str, Any]
    module: str
    methods: tuple[MethodCard, ...]


def written() -> list[Written]:
    """The cards in all papers' files, in the files' order."""
    found = []
    for path in sorted(METHODS.rglob("*.py")):
        papers, methods = KEPT.of(path, _read)
        named = ".".join(["formery", *path.relative_to(PACKAGE).with_suffix("").parts])
        for card in papers:
            own = tuple(MethodCard(**{**one, "kinds": tuple(one["kinds"])}) for one in methods[card["slug"]])
            found.append(Written(card, named, own))
    KEPT.save()
    return found


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The cards of a file, and the methods by the paper that they name."""
    papers: list[dict[str, Any]] = []
    methods: dict[str, list[dict[str, Any]]] = {}
    for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        if node.func.id == "Paper":
            papers.append(_arguments(node, path, ()))
        elif node.func.id == "Method":
            given = _arguments(node, path, ("name", "summary"))
            names = [one.name for one in fields(MethodCard)]
            one = {"kinds": MethodCard.kinds, **{key: value for key, value in given.items() if key in names}}
            methods.setdefault(given.get("paper", ""), []).append(one)
    return papers, {card["slug"]: methods.get(card["slug"], []) for card in papers}


def _arguments(call: ast.Call, path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of a call by name; all but code must be written out."""
    given = dict(zip(names, call.args, strict=False))
    given |= {one.arg: one.value for one in call.keywords if one.arg and one.arg not in MADE}
    try:
        return {name: ast.literal_eval(value) for name, value in given.items()}
    except ValueError as error:
        raise FormeryError(
            f"{path}, line {call.lineno}: a card is read without running it, so its values are written out there."
        ) from error
