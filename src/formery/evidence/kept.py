"""What was worked out of a file and stays true as long as the file is the same, kept between runs.

A list of papers needs the digest of some two hundred sources and the verdict of every record: working them out
takes seconds, looking them up does not. A cache that cannot be read or written is one that is empty.
"""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import platformdirs

from formery.errors import FormeryError
from formery.files import atomic_write


def folder() -> Path:
    """Where all of it lies: within the folder of the data."""
    return Path(os.environ.get("FORMERY_CACHE") or platformdirs.user_cache_dir("formery")) / "kept"


class Kept:
    """Values by file, in one file of the cache folder.

    name: of that file. version: of what works the values out; with another one everything is worked out anew.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name, self.version = name, version
        self.values: dict[str, list[Any]] | None = None
        self.changed = False

    @property
    def path(self) -> Path:
        """Where the values lie."""
        return folder() / f"{self.name}.json"

    def of(self, path: Path, work_out: Callable[[Path], Any]) -> Any:
        """The value of the file as it is now: plain JSON data that `work_out` gives."""
        status = path.stat()
        mark = [status.st_mtime_ns, status.st_size]
        values = self._read()
        found = values.get(str(path))
        if found is None or found[:2] != mark:
            found = values[str(path)] = [*mark, json.loads(json.dumps(work_out(path)))]
            self.changed = True
        return found[2]

    def save(self) -> None:
        """Writes what is new; what cannot be written is worked out again next time."""
        if self.changed and self.values is not None:
            there = {key: one for key, one in self.values.items() if Path(key).exists()}
            with suppress(FormeryError), atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps([self.version, there]), encoding="utf-8")
            self.changed = False

    def _read(self) -> dict[str, list[Any]]:
        if self.values is None:
            self.values = {}
            with suppress(OSError, ValueError, TypeError):
                version, values = json.loads(self.path.read_text(encoding="utf-8"))
                if version == self.version and isinstance(values, dict):
                    self.values = {key: one for key, one in values.items() if isinstance(one, list) and len(one) == 3}
        return self.values
