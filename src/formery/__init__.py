"""Formery: the Transformer literature, running.

model = formery.load("code")
for one in formery.generate(model, ["def area(radius):"], method="aggressive-decoding"):
    print(one.text)
"""

from typing import TYPE_CHECKING, Any

from formery.errors import FormeryError

if TYPE_CHECKING:
    from formery.generate import Generation, generate, stream
    from formery.models import load, save
    from formery.models.hub.export import export
    from formery.models.inspection import inspect

__all__ = ["FormeryError", "Generation", "__version__", "export", "generate", "inspect", "load", "save", "stream"]
__version__ = "0.1.0"

_HOMES = {
    "Generation": "formery.generate",
    "export": "formery.models.hub.export",
    "generate": "formery.generate",
    "inspect": "formery.models.inspection",
    "stream": "formery.generate",
    "load": "formery.models",
    "save": "formery.models",
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for, so that `import formery` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'formery' has no attribute {name!r}")
    import importlib

    importlib.import_module("formery.methods").discover()
    return getattr(importlib.import_module(_HOMES[name]), name)
