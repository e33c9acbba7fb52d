"""The digest of the code that a record holds for, so that the record goes stale by itself.

It covers the paper's module and every module of this package that it imports, directly or not, as far as the
source says so; not the `__init__` of a package of which only an inner module is imported, and not what is `APART`:
rooms that only measure, list or show; the reading and writing of other people's checkpoints, since records are of
models that ship; and the loop that trains. (What is learnt follows from a recipe, its objective and its plan, which
count; that the loop makes the same weights of them, however it runs, tests hold.)
What counts is the meaning of the source: comments, docstrings and layout don't, nor do the words of a paper's card.
Sources in C++ beside a module count too.
"""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from formery.errors import FormeryError
from formery.evidence.kept import Kept

PACKAGE = "formery"
ROOT = Path(__file__).parents[1]
MEASURED = ("check", "works")  # of a card; the rest of it is words
KEPT = Kept("sources", hashlib.sha256(Path(__file__).read_bytes()).hexdigest())
APART = (
    "formery.evidence", "formery.catalog", "formery.cli", "formery.web",
    "formery.models.hub", "formery.train.loop", "formery.train.stages", "formery.train.checkpoint",
)  # fmt: skip


@dataclass
class Sources:
    """The sources as they are now, each looked at once: what a list of papers would look at over and over.

    found: by module its file, the digest of what it says and what it imports of this package; None where there is no
    such module. beside: by folder the sources in C++ there, as lines of a digest.
    """

    found: dict[str, tuple[Path, str, list[str]] | None] = field(default_factory=dict)
    beside: dict[Path, list[str]] = field(default_factory=dict)

    def of(self, module: str) -> tuple[Path, str, list[str]] | None:
        """A module's file, the digest of what it says, and what it imports."""
        if module not in self.found:
            path = source_of(module)
            self.found[module] = None if path is None else (path, *KEPT.of(path, _parsed))
        return self.found[module]

    def compiled(self, folder: Path) -> list[str]:
        """The sources in C++ in a folder, which its modules build."""
        if folder not in self.beside:
            paths = sorted([*folder.glob("*.h"), *folder.glob("*.cpp")])
            self.beside[folder] = [f"{path.name} {KEPT.of(path, _compiled)}\n" for path in paths]
        return self.beside[folder]


def digest(module: str, sources: Sources | None = None) -> str:
    """sha256 over the names and the meaning of `module` and all that it imports of this package."""
    sources = sources or Sources()
    found = modules(module, sources)
    lines = []
    for name in sorted(found):
        source = sources.of(name)
        assert source is not None
        lines.append(f"{name} {source[1]}\n")
    for folder in sorted({path.parent for path in found.values()}):
        lines += sources.compiled(folder)
    KEPT.save()
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def modules(module: str, sources: Sources | None = None) -> dict[str, Path]:
    """The module and those of this package that it imports, directly or not, with their files."""
    sources = sources or Sources()
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or (source := sources.of(name)) is None:
            continue
        found[name] = source[0]
        waiting += [one for one in source[2] if one not in found and not _apart(one)]
    if not found:
        raise FormeryError(f"the source of the module {module} is not here, so it has no digest.")
    return found


def source_of(module: str) -> Path | None:
    """The file of a module: of this package without importing it, else of what is loaded or found."""
    if module == PACKAGE or module.startswith(f"{PACKAGE}."):
        base = ROOT.joinpath(*module.split(".")[1:])
        places = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in places if path.is_file()), None)
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is None:
        spec = importlib.util.find_spec(module)
        file = spec.origin if spec else None
    return Path(file) if file else None


def _compiled(path: Path) -> str:
    """A digest of what a source in C++ says, comments and layout aside."""
    lines = [line.partition("//")[0] for line in path.read_text(encoding="utf-8").splitlines()]
    return hashlib.sha256(" ".join(" ".join(lines).split()).encode()).hexdigest()


def _apart(module: str) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in APART)


def _parsed(path: Path) -> tuple[str, list[str]]:
    """The digest of a file's meaning, and which modules of this package it imports, if there are such."""
    tree = ast.parse(path.read_bytes())
    return hashlib.sha256(meaning(tree).encode()).hexdigest(), list(dict.fromkeys(imported(tree)))


def imported(tree: ast.AST) -> Iterator[str]:
    """The names that could be modules of this package; what is imported only for its type is left out."""
    if isinstance(tree, ast.If) and isinstance(tree.test, ast.Name) and tree.test.id == "TYPE_CHECKING":
        return
    if isinstance(tree, ast.Import):
        yield from (one.name for one in tree.names if one.name.split(".")[0] == PACKAGE)
    elif isinstance(tree, ast.ImportFrom):
        if tree.module and tree.module.split(".")[0] == PACKAGE:
            yield tree.module
            yield from (f"{tree.module}.{one.name}" for one in tree.names)
    else:
        for child in ast.iter_child_nodes(tree):
            if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                yield from imported(child)


def meaning(node: object) -> str:
    """The source as a text of its syntax, bare strings left out; the same in all versions of Python."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Paper":
        return f"Paper({','.join(meaning(one) for one in node.keywords if one.arg in MEASURED)})"
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in ("ctx", "kind"))
        # Later versions of Python add fields, which are empty for older syntax.
        inner = (f"{name}={meaning(value)}" for name, value in fields if value is not None and value != [])
        return f"{type(node).__name__}({','.join(inner)})"
    if isinstance(node, list):
        return f"[{','.join(meaning(one) for one in node if not _bare_string(one))}]"
    return repr(node)


def _bare_string(node: object) -> bool:
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)
