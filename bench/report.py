"""The file that a run leaves: machine, versions, rows, and who did not take part."""

import json
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.rows import Row
from formery.errors import FormeryError
from formery.evidence import machine
from formery.files import atomic_write

PACKAGES = (
    "numpy", "torchao", "transformers", "x-transformers", "ctranslate2", "llama-cpp-python", "gguf",
)  # fmt: skip


def document(rows: Sequence[dict[str, Any]], skipped: Sequence[dict[str, str]], rounds: int) -> dict[str, Any]:
    """The run as plain data."""
    versions = {**machine.versions(), **{name: found for name in PACKAGES if (found := _version(name))}}
    return {
        "machine": {**machine.machine(), "versions": versions},
        "rounds": rounds,
        "rows": list(rows),
        "skipped": list(skipped),
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """Writes it beside its place and moves it there."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file; raises FormeryError where it is none."""
    try:
        rows = json.loads(path.read_text())["rows"]
    except OSError as error:
        raise FormeryError(f"cannot read {path}: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FormeryError(f"{path} holds no results of a benchmark.") from error
    names = Row.__dataclass_fields__.keys()
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) and row.keys() >= names for row in rows):
        raise FormeryError(f"{path} holds no results of a benchmark.")
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
