"""The loops that turn a model into text."""

import sys
from types import ModuleType
from typing import Any

import formery.generate.plain  # noqa: F401  (registers greedy, sampling and beam)
from formery.generate.draft import Draft, Drafter, NoDraft, Row, Verdict
from formery.generate.method import METHODS, Method, drafting, register
from formery.generate.run import Generation, generate, stream
from formery.generate.settings import Settings
from formery.generate.verify import Event, draft_and_verify

__all__ = [
    "METHODS",
    "Draft",
    "Drafter",
    "Event",
    "Generation",
    "Method",
    "NoDraft",
    "Row",
    "Settings",
    "Verdict",
    "draft_and_verify",
    "drafting",
    "generate",
    "register",
    "stream",
]


class _Room(ModuleType):
    """Lets `formery.generate(...)` mean the function, also once the room of that name has been imported."""

    def __call__(self, *arguments: Any, **options: Any) -> list[Generation]:
        return generate(*arguments, **options)


sys.modules[__name__].__class__ = _Room
