"""Writing files so that a reader never sees half of one."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from formery.errors import FormeryError


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; what is written there takes its place when the block ends well.

    Raises FormeryError when the disk refuses (full, read-only, no permission); `path` is then as it was.
    """
    path = Path(path)
    temporary = path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise FormeryError(f"cannot write {path}: {error.strerror or error}; nothing was changed there.") from error
    finally:
        if temporary != path:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Gives an empty temporary folder beside `path`; it takes that folder's place when the block ends well.

    An older folder at `path` is moved aside first and removed last, so that one of the two is always whole.
    Raises FormeryError when the disk refuses; what was at `path` is then as it was.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise FormeryError(f"cannot write {path}: {error.strerror or error}; nothing was changed there.") from error
    try:
        yield temporary
        temporary.chmod(0o755)
        for inner in temporary.rglob("*"):
            inner.chmod(0o755 if inner.is_dir() else 0o644)
        if path.exists():
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
            try:
                os.replace(path, aside)
                os.replace(temporary, path)
            finally:
                if aside.exists() and not path.exists():
                    os.replace(aside, path)
                shutil.rmtree(aside.parent, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise FormeryError(f"cannot write {path}: {error.strerror or error}; nothing was changed there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
