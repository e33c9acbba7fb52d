"""Where results go: files that are whole or not there, stdout, and a word to the person on stderr."""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from formery.errors import FormeryError
from formery.files import atomic_write


def note(sentence: str) -> None:
    """A line for the person, beside what the program gives."""
    print(sentence, file=sys.stderr, flush=True)


def check_targets(*paths: str | None) -> None:
    """Raises FormeryError, before any work is done, where a result could not be written."""
    for path in paths:
        if path is None or path == "-":
            continue
        if Path(path).is_dir():
            raise FormeryError(f"cannot write {path}: it is a folder; name a file.")
        folder = next(one for one in Path(path).absolute().parents if one.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()  # what an administrator may do is not told by asking
        except OSError as error:
            raise FormeryError(f"cannot write {path}: {folder} does not take new files.") from error


def write_json(data: Any, path: str) -> None:
    """Writes to a file, whole or not at all, or to stdout for "-"."""
    write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str) -> None:
    """Writes to a file, whole or not at all, or to stdout for "-"."""
    if path == "-":
        sys.stdout.write(text)
        return
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
