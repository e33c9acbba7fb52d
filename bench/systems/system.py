"""What every system can be asked; it takes part in the works that it says it does."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from bench.cases import Case


class Refused(Exception):
    """A system does not do this case; the sentence says why."""


class System:
    """A program with its model loaded, ready for one case.

    does: the dtypes that it offers for each work. kinds: the models that it knows. detail: what a reader should
    know of how it computes.
    """

    does: ClassVar[Mapping[str, Sequence[str]]] = {}
    kinds: ClassVar[Sequence[str]] = ("gpt2", "llama", "marian")
    detail: str = ""

    def __init__(self, case: Case):
        self.case, self.prompts = case, case.prompts()

    @classmethod
    def takes(cls, case: Case) -> bool:
        """Whether it takes part in a case."""
        return case.dtype in cls.does.get(case.work, ()) and case.shape.kind in cls.kinds

    def write(self) -> list[list[int]]:
        """Decodes greedily from the prompts; the new tokens of each row."""
        raise NotImplementedError

    def read(self) -> list[list[int]]:
        """Reads the prompts afresh; the likeliest next token of each row."""
        raise NotImplementedError

    def rewind(self) -> None:
        """Makes the cache hold the prompt alone, before a call is timed."""

    def extend(self, tokens: list[int]) -> list[list[int]]:
        """Reads these tokens after the prompt in one call; the likeliest token after each."""
        raise NotImplementedError

    def step(self) -> float:
        """One whole step of training; the loss before it."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what the garbage collector would not."""


def everything(*dtypes: str) -> dict[str, Any]:
    """All works of decoders in these dtypes."""
    return dict.fromkeys(("decode", "batch", "prefill", "verify"), dtypes)
