"""What a work is: a task with real data and a metric, on which models and methods are compared."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Literal, TypeVar

from formery.data.scoring import LanguageModel
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError

Document = TypeVar("Document", covariant=True)
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class Example:
    """A prompt, what a person wrote after it, and where it is from ("argparse.py:1203")."""

    prompt: str
    reference: str
    name: str


class Work(ABC, Generic[Document]):
    """A task, its real data in fixed splits, and how well a model or its outputs do on them.

    `kind` is the kind of model that it is for; `higher_is_better` holds, for each metric, which way is up.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["decoder", "encoder-decoder"]]
    description: ClassVar[str]
    higher_is_better: ClassVar[Mapping[str, bool]]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.higher_is_better)

    @abstractmethod
    def texts(self, split: Split) -> Iterator[Document]:
        """The documents of a split, always in one order; raises FormeryError when the data are not here."""

    @abstractmethod
    def candidates(self, split: Split) -> Iterator[Example]:
        """Every example that the split has, always in one order."""

    def examples(self, split: Split = "test", limit: int | None = None, seed: int = 0) -> list[Example]:
        """At most `limit` examples, shuffled by `seed`: always the same, fewer being a prefix of more."""
        examples = list(self.candidates(split))
        random.Random(seed).shuffle(examples)
        return examples[:limit]

    @abstractmethod
    def quality(self, outputs: Sequence[str], examples: Sequence[Example]) -> dict[str, float | str]:
        """How good the generated `outputs` are, one for each example; fractions are between 0 and 1."""

    def evaluate(
        self, model: LanguageModel, tokenizer: Tokenizer, split: Split = "test", limit: int | None = None
    ) -> dict[str, float]:
        """How well the model predicts the split's first `limit` documents; empty if outputs are judged."""
        return {}


def check_split(split: str) -> None:
    """Raises FormeryError when there is no such split."""
    if split not in SPLITS:
        raise FormeryError(f"there is no split {split!r}; a work has the splits {', '.join(SPLITS)}.")


def check_outputs(outputs: Sequence[str], examples: Sequence[Example]) -> None:
    """Raises FormeryError unless there is one output for each of at least one example."""
    if len(outputs) != len(examples) or not examples:
        raise FormeryError(
            f"{len(outputs)} outputs were given for {len(examples)} examples; give one for each."
        )
