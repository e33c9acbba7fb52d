"""What the checks of drafting methods share: the criteria that each of them is held to."""

from collections.abc import Mapping, Sequence
from functools import partial

from formery.data.works import work as work_named
from formery.evidence.card import trained
from formery.evidence.checks import (
    WORKS,
    Result,
    Setting,
    best,
    criterion,
    examples,
    model_named,
    survey,
    values_of,
)
from formery.evidence.measured import Budget, Row, spread
from formery.evidence.race import Laps, fitted
from formery.evidence.verdict import Criterion
from formery.generate import generate
from formery.generate.method import find
from formery.models import Model, load

SCORED = 200  # test examples that are scored, for each example of a budget
TOGETHER = 25  # of them in a batch


def surveyed(
    budget: Budget, methods: Sequence[str], works: Sequence[str] = WORKS, sampled: Sequence[str] = ()
) -> list[Result]:
    """Each method with its options against greedy decoding, and some against sampling at temperature 1."""
    settings = [Setting(method) for method in methods] + [Setting(method, temperature=1.0) for method in sampled]
    return survey(budget, settings, works)


def lossless(results: Sequence[Result]) -> Criterion:
    """Whether the text is greedy decoding's own."""
    return criterion(
        "identical",
        "greedily, the share of texts with the very tokens of greedy decoding is 1",
        values_of(results, "identical"),
        "==",
        1.0,
        essential=True,
    )


def fewer_calls(results: Sequence[Result], works: Sequence[str] = WORKS) -> list[Criterion]:
    """Whether the target is called less than once for each token, in the best setting of each work."""
    found = []
    for work in works:
        label, _ = best(results, "accepted_per_call", work=work, batch=1)
        values = [
            value
            for one in results
            if one.setting.label == label
            for value in values_of([one], "calls_per_token", work=work, batch=1)
        ]
        statement = f"on {work}, the target is called less than once for each token ({label})"
        found.append(criterion(f"calls on {work}", statement, values, "<", 1.0))
    return found


def faster(
    results: Sequence[Result], works: Sequence[str] = WORKS, than: float = 1.0, essential: bool = False
) -> list[Criterion]:
    """Whether one text at a time takes less time than token by token, in the best setting of each work."""
    found = []
    for work in works:
        label, ratios = best(results, "speedup", work=work, batch=1)
        statement = f"one text at a time, {work} is more than {than:g} times as fast as token by token ({label})"
        found.append(criterion(f"faster on {work}", statement, ratios, ">", than, essential))
    return found


def faster_than(
    results: Sequence[Result], method: str, other: str, works: Sequence[str] = WORKS, essential: bool = False
) -> list[Criterion]:
    """Whether one text at a time takes less time than by another method that was surveyed on the same prompts."""
    found = []
    for work in works:
        own, theirs = (_speedup(results, name, work) for name in (method, other))
        statement = f"one text at a time, {work} takes less time by {method} than by {other}; the ratio of speed-ups"
        ratios = [own[seed] / theirs[seed] for seed in own]
        name = f"faster than {other.partition(':')[0]} on {work}"
        found.append(criterion(name, statement, ratios, ">", 1.0, essential))
    return found


def _speedup(results: Sequence[Result], method: str, work: str) -> Mapping[int, float]:
    """The median over rounds of the speed-up over token by token, by seed, one text at a time."""
    chosen = [one for one in results if (one.setting.label, one.work, one.batch) == (method, work, 1)]
    return {one.seed: spread(values_of([one], "speedup")).median for one in chosen}


def accepts_more(
    results: Sequence[Result], method: str, other: str, works: Sequence[str] = WORKS, essential: bool = False
) -> list[Criterion]:
    """Whether a call brings more tokens than by another method that was surveyed on the same prompts."""
    found = []
    for work in works:
        own, theirs = (_accepted(results, name, work) for name in (method, other))
        statement = f"on {work}, a call accepts more guesses by {method} than by {other}; the difference, by seed"
        differences = [own[seed] - theirs[seed] for seed in own]
        found.append(
            criterion(f"more than {other.partition(':')[0]} on {work}", statement, differences, ">", 0, essential)
        )
    return found


def cheaper_drafts(results: Sequence[Result], method: str, other: str, works: Sequence[str] = WORKS) -> list[Criterion]:
    """Whether drafting takes less of the time, for each call of the target, than by another method."""
    found = []
    for work in works:
        own, theirs = (_draft_per_call(results, name, work) for name in (method, other))
        statement = f"on {work}, drafting takes less time, measured in that of a call, by {method} than by {other}"
        ratios = [own[seed] / theirs[seed] for seed in own]
        found.append(criterion(f"cheaper than {other.partition(':')[0]} on {work}", statement, ratios, "<", 1.0))
    return found


def _draft_per_call(results: Sequence[Result], method: str, work: str) -> Mapping[int, float]:
    """Seconds of drafting for each second of verifying, by seed, one text at a time."""
    chosen = [one for one in results if (one.setting.label, one.work, one.batch) == (method, work, 1)]
    return {one.seed: float(one.values["drafting_share"] / one.values["verifying_share"]) for one in chosen}


def by_depth(
    model: Model, draft: Model | None, prompts: Sequence[str | list[int]], laps: Laps, temperature: float
) -> dict[str, float]:
    """For settings' `extra`: of the guesses at each depth whose line had stood so far, the share that stands too."""
    events = [event for one in laps.outputs for event in one.trace]
    found = {}
    for depth in range(max(event.depth for event in events)):
        tried = [event for event in events if event.depth > depth and event.accepted >= depth]
        if tried:
            found[f"stands at depth {depth + 1}"] = sum(event.accepted > depth for event in tried) / len(tried)
    return found


def _accepted(results: Sequence[Result], method: str, work: str) -> Mapping[int, float]:
    """Guesses accepted in a call, by seed, one text at a time."""
    chosen = [one for one in results if (one.setting.label, one.work, one.batch) == (method, work, 1)]
    return {one.seed: float(one.values["accepted_per_call"]) for one in chosen}


def accepts_more_than_without(
    budget: Budget, results: Sequence[Result], method: str, part: str, recipe: str, work: str = "code"
) -> Criterion:
    """Whether a call brings more tokens than with a guide that lacks a part of it, trained by that recipe."""
    own = _accepted(results, method, work)
    budget.units.expect(len(own))
    model, differences = model_named(work), []
    for seed, accepted in own.items():

        def measure(seed: int = seed) -> dict[str, float]:
            guide = load(trained(recipe))
            prompts, _ = fitted(model, [guide], examples(work, budget.examples, seed), budget.max_new_tokens)
            outputs = generate(model, prompts, method, batch=1, draft=guide, max_new_tokens=budget.max_new_tokens)
            calls = sum(one.calls for one in outputs)
            return {"accepted_per_call": sum(one.accepted for one in outputs) / calls}

        without = budget.units.measure(f"{work}, {method} without {part}, seed {seed}", measure)
        differences.append(accepted - without["accepted_per_call"])
    statement = f"on {work}, a call accepts more guesses than without {part}; the difference, by seed"
    return criterion(f"{part} help", statement, differences, ">", 0)


def qualities(budget: Budget, methods: Sequence[str], work: str) -> dict[str, float]:
    """How good the texts of each method are, by the first measure of the work, on many of its test examples."""
    budget.units.expect(len(methods))
    name = next(iter(work_named(work).higher_is_better))
    return {
        method: budget.units.measure(f"{work}, {name} of {method}", partial(_quality, budget, method, work))[name]
        for method in methods
    }


def _quality(budget: Budget, method: str, work: str) -> dict[str, float]:
    found, model = find(method)[0], model_named(work)
    drafts = {"draft": model_named(found.draft_of(work))} if found.needs_draft else {}
    some = examples(work, SCORED * budget.examples, budget.seeds[0])
    prompts, _ = fitted(model, list(drafts.values()), some, budget.max_new_tokens)
    outputs = generate(model, prompts, method, batch=TOGETHER, max_new_tokens=budget.max_new_tokens, **drafts)
    measures = work_named(work).quality([one.text for one in outputs], some)
    return {name: value for name, value in measures.items() if not isinstance(value, str)}


def quality_rows(scores: Mapping[str, float], work: str) -> list[Row]:
    """A row for each method whose texts were scored."""
    name = next(iter(work_named(work).higher_is_better))
    return [Row(work, method, TOGETHER, {name: spread([value])}) for method, value in scores.items()]


def faster_at_little_loss(
    results: Sequence[Result],
    scores: Mapping[str, float],
    methods: Sequence[str],
    work: str,
    faster: float,
    loss: float,
    baseline: str = "greedy",
) -> list[Criterion]:
    """Whether some method loses little against the baseline, and whether the fastest of those that do is fast enough.

    Where none loses so little, the one that loses least is judged.
    """
    lost = {method: scores[baseline] - scores[method] for method in methods}
    least = min(lost, key=lambda one: lost[one])
    good = [method for method in methods if lost[method] < loss] or [least]
    label, ratios = best([one for one in results if one.setting.method in good], "speedup", work=work, batch=1)
    name = next(iter(work_named(work).higher_is_better))
    return [
        criterion(
            f"little loss on {work}",
            f"some setting loses less than {loss:g} {name} against {baseline} on {work} ({least})",
            [lost[least]],
            "<",
            loss,
            essential=True,
        ),
        criterion(
            f"faster at little loss on {work}",
            f"of the settings that lose so little, one text at a time the fastest is at least {faster:g} times as fast "
            f"as token by token ({label})",
            ratios,
            ">=",
            faster,
            essential=True,
        ),
    ]
