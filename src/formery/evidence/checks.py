"""The shape that checks of decoding methods share: each setting on two works, in two batch sizes.

A unit is one work, batch size, setting and seed: the baseline and the setting in interleaved rounds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from formery.data.base import Example
from formery.data.works import work as work_named
from formery.evidence.accounting import per_layer_and_token
from formery.evidence.card import trained
from formery.evidence.measured import Budget, Row, spread
from formery.evidence.race import Entrant, Laps, fitted, identical, race, seconds_in_calls, speedups
from formery.evidence.verdict import Criterion, Relation
from formery.generate.method import find
from formery.models import Model, load
from formery.train.recipe import recipes

WORKS = ("code", "translate")
BATCHES = (1, 8)
Values = Mapping[str, Any]
Extra = Callable[[Model, Model | None, Sequence[str | list[int]], Laps, float], dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """A method with its options ("speculative-sampling:length=4"), and a temperature, its baseline's too.

    extra: further numbers from what was written: (model, draft, prompts, laps, temperature) -> name: value.
    model: the recipe of another model than the work's shipped one ("code/layerskip"), its baseline's too.
    """

    method: str
    temperature: float = 0.0
    extra: Extra | None = None
    model: str | None = None

    @property
    def baseline(self) -> str:
        return "sampling" if self.temperature else "greedy"

    @property
    def label(self) -> str:
        at = f" at temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.method}{at}" + (f" on {self.model}" if self.model else "")


@dataclass(frozen=True)
class Result:
    """What one unit measured; a value is a number, or a list of one for each round."""

    work: str
    batch: int
    setting: Setting
    seed: int
    values: Values


def survey(
    budget: Budget,
    settings: Sequence[Setting],
    works: Sequence[str] = WORKS,
    batches: Sequence[int] = BATCHES,
) -> list[Result]:
    """All units of a check; the model of each work is the shipped one of its name, and so is its draft."""
    plan = [(w, b, s, seed) for w in works for b in batches for s in settings for seed in budget.seeds]
    budget.units.expect(len(plan))
    results = []
    for work, batch, setting, seed in plan:
        name = f"{work}, batch {batch}, {setting.label}, seed {seed}"
        values = budget.units.measure(name, partial(unit, budget, work, batch, setting, seed))
        results.append(Result(work, batch, setting, seed, values))
    return results


def unit(budget: Budget, work: str, batch: int, setting: Setting, seed: int) -> dict[str, Any]:
    """One setting against its baseline on one work, in batches of one size, with one seed."""
    model = model_named(setting.model or work)
    method = find(setting.method)[0]
    draft = model_named(method.draft_of(work)) if method.takes_draft else None
    prompts, _ = fitted(model, [draft], examples(work, budget.examples, seed), budget.max_new_tokens)
    entrants = [Entrant(setting.baseline), Entrant(setting.method, {} if draft is None else {"draft": draft})]
    common = {"max_new_tokens": budget.max_new_tokens, "seed": seed, "temperature": setting.temperature}
    baseline, laps = race(model, prompts, entrants, budget.rounds, batch, common)
    values: dict[str, Any] = {"speedup": speedups(laps, baseline), **counts(laps, batch)}
    values["state_bytes"] = max(one.state_bytes for one in laps.outputs)
    values["state_bytes_per_layer_and_token"] = per_layer_and_token(model, prompts, laps.outputs, batch)
    if setting.temperature == 0:
        values["identical"] = identical(laps.outputs, baseline.outputs)
    if setting.extra is not None:
        values |= setting.extra(model, draft, prompts, laps, setting.temperature)
    return values


def counts(laps: Laps, batch: int) -> dict[str, float]:
    """Calls, acceptance, and where the seconds of the first round went."""
    drafted = sum(one.drafted for one in laps.outputs)
    accepted = sum(one.accepted for one in laps.outputs)
    drafting, verifying = seconds_in_calls(laps.outputs, batch)
    return {
        "calls_per_token": laps.calls / laps.tokens,
        "accepted_per_call": accepted / laps.calls,
        "share_of_drafts_accepted": accepted / max(drafted, 1),
        "drafting_share": drafting / laps.seconds[0],
        "verifying_share": verifying / laps.seconds[0],
        "other_share": max(0.0, 1 - (drafting + verifying) / laps.seconds[0]),
    }


@cache
def model_named(name: str) -> Any:
    """The model, or guide, that ships under that name or that a recipe of that name makes, loaded once."""
    return load(trained(name) if name in recipes() else name)


@cache
def examples(work: str, limit: int, seed: int) -> list[Example]:
    """The test examples that a seed chooses."""
    return work_named(work).examples("test", limit=limit, seed=seed)


def values_of(results: Iterable[Result], name: str, **where: Any) -> list[float]:
    """All values of that name, over rounds and seeds, where the results' fields are as given."""
    found: list[float] = []
    for result in results:
        if name in result.values and all(getattr(result, key) == value for key, value in where.items()):
            value = result.values[name]
            found += value if isinstance(value, list) else [value]
    return found


def rows(results: Sequence[Result]) -> list[Row]:
    """A row for each work, batch size and setting, with the spread over seeds and rounds."""
    groups: dict[tuple[str, int, str], list[Result]] = {}
    for one in results:
        groups.setdefault((one.work, one.batch, one.setting.label), []).append(one)
    return [
        Row(work, setting, batch, {name: spread(values_of(group, name)) for name in group[0].values})
        for (work, batch, setting), group in groups.items()
    ]


def criterion(
    name: str,
    statement: str,
    values: Sequence[float],
    relation: Relation,
    threshold: float,
    essential: bool = False,
) -> Criterion:
    """A criterion on measured values: all of them must meet the threshold."""
    found = spread(values)
    return Criterion(name, statement, relation, threshold, found.median, found.low, found.high, essential)


def untestable(
    name: str, statement: str, relation: Relation, threshold: float, reason: str, essential: bool = False
) -> Criterion:
    """A criterion that cannot be tested here."""
    return Criterion(name, statement, relation, threshold, essential=essential, untestable=reason)


def best(results: Sequence[Result], name: str, **where: Any) -> tuple[str, list[float]]:
    """The setting with the largest median of that name, and its values: for a claim of the kind "up to"."""
    labels = dict.fromkeys(one.setting.label for one in results)
    found = {
        label: values_of([one for one in results if one.setting.label == label], name, **where)
        for label in labels
    }
    label = max(found, key=lambda one: spread(found[one]).median)
    return label, found[label]


def pooled(results: Sequence[Result], sums: str, expected: str | None, variance: str) -> list[float]:
    """Standard errors between `sums` and `expected` (0 where None), seeds pooled, for each work and setting.

    Rows draw from streams of their own, so that other batch sizes write the same again: only the first
    counts.
    """
    found = []
    first = min(one.batch for one in results)
    for work, label in dict.fromkeys((one.work, one.setting.label) for one in results if sums in one.values):
        some = [one for one in results if (one.work, one.setting.label, one.batch) == (work, label, first)]

        def total(name: str, some: list[Result] = some) -> float:
            return math.fsum(values_of(some, name))

        difference = abs(total(sums) - (total(expected) if expected else 0.0))
        found.append(difference / max(math.sqrt(total(variance)), 1e-12))
    return found
