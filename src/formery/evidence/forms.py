"""Forms of a small model that a check compares: each trained from several seeds, and what is found of each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from formery.data import long_text
from formery.data.batching import WindowBatches
from formery.evidence.measured import Row, spread
from formery.evidence.study import grown, losses
from formery.models.decoder import Decoder
from formery.models.louder import louder
from formery.train.plan import Plan


@dataclass(frozen=True)
class Forms:
    """What makes each form, by its name, and how all are trained on WikiText-2.

    study: its name in the cache. plan: of every training, but for its seed. length, rows: of a batch, in tokens and
    rows. times: as in `louder`. sources: the functions whose files tell of what is made.
    """

    study: str
    made: Mapping[str, Callable[[], Decoder]]
    plan: Plan
    length: int
    rows: int
    times: float
    sources: Sequence[Callable[..., Any]]

    def trained(self, form: str, seed: int) -> Decoder:
        """One form, trained from that seed."""
        plan = replace(self.plan, seed=seed, label=f"{form}, seed {seed}")
        batches = WindowBatches(long_text.prose("train"), self.length, self.rows, seed)
        make = partial(louder, self.made[form], self.times)
        return grown(f"{self.study}/{form}/{seed}", make, batches, plan, sources=self.sources)

    def loss(self, form: str, seed: int, batches: int) -> dict[str, float]:
        """Its loss on so many batches that it has not learned from, and how many numbers its weights hold."""
        model = self.trained(form, seed)
        windows = WindowBatches(long_text.prose("test"), self.length, self.rows)
        return {"loss": float(losses(model, windows, batches).mean()), "weights": float(model.parameter_count())}


class Findings:
    """The numbers that were found of each form, by name."""

    def __init__(self, forms: Forms) -> None:
        self.values: dict[str, dict[str, list[float]]] = {form: {} for form in forms.made}

    def note(self, form: str, values: Mapping[str, Any]) -> None:
        """Adds values, each a number or a list of them."""
        for name, value in values.items():
            self.values[form].setdefault(name, []).extend(value if isinstance(value, list) else [value])

    def of(self, form: str, name: str) -> list[float]:
        return self.values[form][name]

    def more(self, form: str, other: str, name: str) -> list[float]:
        """By how much the numbers of one form exceed those of another, seed by seed."""
        return [a - b for a, b in zip(self.of(form, name), self.of(other, name), strict=True)]

    def rows(self, work: str) -> list[Row]:
        """A row for each form."""
        return [
            Row(work, form, 1, {name: spread(numbers) for name, numbers in values.items()})
            for form, values in self.values.items()
        ]
