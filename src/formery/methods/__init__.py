"""One file a paper, in the room of the part that it changes."""

import functools
import importlib
import pkgutil


@functools.cache
def discover() -> None:
    """Imports every paper's file, so that its card and its methods are registered."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        importlib.import_module(module.name)
