"""The house rules that a machine can check: arrows point downward, and the package speaks of nothing but itself."""

import ast
from pathlib import Path

import pytest

import formery

ROOT = Path(formery.__file__).parent
ROOMS = ["parts", "models", "data", "train", "generate", "evidence", "methods", "catalog", "web", "cli"]
# Rooms side by side: data feeds training and generation, models carry a tokenizer along.
SIDE_BY_SIDE = {("models", "data")}
FILES = sorted(ROOT.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("formery.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_downward(path: Path) -> None:
    own = room(path)
    if own not in ROOMS:
        return
    upward = {
        other
        for other in imported(path) & set(ROOMS)
        if ROOMS.index(other) > ROOMS.index(own) and (own, other) not in SIDE_BY_SIDE
    }
    assert not upward, f"{own} may not import from {', '.join(sorted(upward))}"


def test_the_check_sees_an_upward_arrow(tmp_path: Path) -> None:
    file = tmp_path / "part.py"
    file.write_text("from formery.generate import verify\nimport formery.web.report\n")
    assert imported(file) >= {"generate", "web"}
