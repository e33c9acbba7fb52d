"""The compiled kernels: built from the sources beside this file by the machine's own compiler, once, and kept.

What is built is named after all that it was built from (sources, compiler, processor), so that a change of any of them
builds anew, and two programs may build at the same time: each writes beside the place and moves its file there.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from formery.errors import FormeryError

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-w")
SECONDS = 120  # a compiler that takes longer is given up


def folder() -> Path:
    """Where built kernels are kept."""
    import platformdirs

    return Path(os.environ.get("FORMERY_CACHE") or platformdirs.user_cache_dir("formery")) / "kernels"


@functools.cache
def compiler() -> str | None:
    """The C++ compiler of this machine: the one that CXX names, or a usual one."""
    return next((found for name in (os.environ.get("CXX"), *COMPILERS) if name and (found := shutil.which(name))), None)


@functools.cache
def target() -> Path:
    """The file that holds the kernels for this machine, whether it is there yet or not."""
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp")]):
        digest.update(source.read_bytes())
    found = compiler()
    version = "" if found is None else subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    digest.update("\n".join((*FLAGS, version, platform.machine(), _processor())).encode())
    return folder() / f"kernels-{digest.hexdigest()[:20]}.so"


def _processor() -> str:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def command(output: Path) -> list[str]:
    """The call of the compiler; FormeryError where there is none."""
    found = compiler()
    if found is None:
        raise FormeryError(
            "there is no C++ compiler here to build the fast kernels with: install one (g++ or clang++), or load the "
            "model with compile=False."
        )
    return [found, *FLAGS, str(SOURCES / "program.cpp"), "-o", str(output), *_threads()]


def _threads() -> list[str]:
    """PyTorch's own thread library, so that both share one set of threads; the system's where it is not found."""
    home = getattr(sys.modules.get("torch"), "__file__", None)
    found = [] if home is None else sorted((Path(home).parent / "lib").glob("libgomp*.so*"))
    return [str(one) for one in found[:1]]


def build() -> Path:
    """The kernels' file, built now if it is not there. Raises FormeryError where that fails."""
    path = target()
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, name = tempfile.mkstemp(prefix=".kernels-", suffix=".so", dir=path.parent)
        os.close(handle)
        try:
            done = subprocess.run(command(Path(name)), capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
                raise FormeryError(f"the fast kernels could not be built: {reason.strip()}; use compile=False.")
            with open(name, "ab") as file:
                file.write(_digest(Path(name).read_bytes()))  # behind the library, where no loader looks
            os.replace(name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise FormeryError(f"the fast kernels could not be built ({error}); use compile=False.") from error
    return path


@functools.cache
def begin() -> bool:
    """Starts to build in a process of its own, for a later use; whether there was anything to start."""
    if target().is_file() or compiler() is None:
        return False
    code = "import torch; from formery.parts.native import build; build.build()"
    null = subprocess.DEVNULL
    with contextlib.suppress(OSError):
        subprocess.Popen([sys.executable, "-c", code], stdin=null, stdout=null, stderr=null, start_new_session=True)
    return True


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


_loaded: dict[Path, ctypes.CDLL | None] = {}


def library(wait: bool = False) -> ctypes.CDLL | None:
    """The kernels, if they are built; with `wait` they are built first. None where they cannot be used.

    Raises FormeryError where they are waited for and cannot be built.
    """
    path = target()
    if path not in _loaded or (wait and _loaded[path] is None):
        if not wait and not path.is_file():
            return None
        build()
        try:
            content = path.read_bytes()
            if _digest(content[:-32]) != content[-32:]:
                raise OSError("it is damaged")  # the system would end the program
            found = ctypes.CDLL(str(path))
            _declare(found)
            _loaded[path] = found
        except (OSError, AttributeError) as error:
            if wait:
                raise FormeryError(f"{path} cannot be loaded ({error}); remove that file.") from error
            _loaded[path] = None
    return _loaded[path]


def _declare(library: ctypes.CDLL) -> None:
    """Says which arguments the functions take; raises AttributeError where one is not there."""
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.formery_room.restype, library.formery_room.argtypes = number, [number, number]
    library.formery_run.restype, library.formery_run.argtypes = None, [pointer, number, pointer]
    library.formery_weights.restype = None
    library.formery_weights.argtypes = [pointer, pointer, number, number, pointer, number, pointer]
