"""What measurements come to: by what factor something would be faster, how sure that is, and what is worth doing."""

import math
import random
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from statistics import mean, median
from typing import Any, Literal

from formery.evidence.machine import machine, versions
from formery.evidence.profile_cost import BatchCosts, Costs, Profile, between
from formery.evidence.race import Laps
from formery.evidence.replay import Known, Quality, Replay, steady
from formery.generate import generate
from formery.generate.method import find
from formery.models import Guide, Model, Source, load

WORTH = 1.05  # a factor whose lower end is not above this is none
DRAWS = 200
TAIL = 0.05  # of the draws lie below the lower end, and as many above the upper one
ROUNDS = 3  # of running what is confirmed
ENOUGH = 0.9  # of the best batch's factor: the smallest batch that reaches it is the one to take

Kind = Literal["kernels", "weights", "batch", "method"]


@dataclass(frozen=True)
class Factor:
    """How many times as fast: the best guess, and the ends of the interval that holds 90 % of the draws."""

    value: float
    low: float
    high: float


def factor(estimate: Callable[[random.Random | None], float]) -> Factor:
    """The estimate from all that was measured, and its spread when rounds and prompts are drawn with replacement."""
    chance, value = random.Random(0), estimate(None)
    drawn = sorted(estimate(chance) for _ in range(DRAWS))
    low, high = drawn[math.floor(TAIL * (DRAWS - 1))], drawn[math.ceil((1 - TAIL) * (DRAWS - 1))]
    return Factor(value, min(value, low), max(value, high))


def _picked(count: int, chance: random.Random | None) -> list[int]:
    return list(range(count)) if chance is None else [chance.randrange(count) for _ in range(count)]


def drafting(known: Sequence[Known], replays: Sequence[Replay], costs: Costs) -> Factor:
    """Of a drafting method: `Σ plain seconds / Σ (first call + calls + drafting + what each step takes besides)`.

    replays: of the method on each known text. costs: of calls by their width. What a replay called has taken its time;
    else a call of a text costs what its plain ones did, times the measured cost of that width over that of 1.
    """
    counted = [Counter(one.widths) for one in replays]

    def estimate(chance: random.Random | None) -> float:
        seconds = costs.drawn(chance)
        relative = {width: between(costs.at, seconds, width) / seconds[0] for one in counted for width in one}
        plain = method = 0.0
        for i in _picked(len(known), chance):
            text, replay = known[i], replays[i]
            plain += text.seconds
            method += text.prefill + text.extra + replay.begin + replay.drafting + len(replay.widths) * text.rest
            if replay.called:
                method += steady(replay.called) * len(replay.called)
            else:
                method += text.call * sum(times * relative[width] for width, times in counted[i].items())
        return plain / method

    return factor(estimate)


def rewriting(known: Sequence[Known], calls: Costs, prefills: Costs, turned: bool = False) -> Factor:
    """Of another form of the model: its calls and its reading of prompts in place of the model's own.

    turned: how much faster the model is than the other form.
    """

    def estimate(chance: random.Random | None) -> float:
        call, prefill = (seconds[1] / seconds[0] for seconds in (calls.drawn(chance), prefills.drawn(chance)))
        plain = other = 0.0
        for i in _picked(len(known), chance):
            text = known[i]
            plain += text.seconds
            other += text.prefill * prefill + text.extra + text.steps * (text.call * call + text.rest)
        return other / plain if turned else plain / other

    return factor(estimate)


def batching(known: Sequence[Known], costs: BatchCosts, batch: int) -> Factor:
    """Of decoding so many prompts together, against one after the other; rows leave the batch as their texts end."""

    def estimate(chance: random.Random | None) -> float:
        texts = list(islice(cycle(known), batch)) if chance is None else [chance.choice(known) for _ in range(batch)]
        calls, reads, rests = (one.drawn(chance) for one in (costs.calls, costs.prefills, costs.rests))
        prefill, call, rest = (sum(getattr(one, name) for one in texts) / batch for name in ("prefill", "call", "rest"))
        together = prefill * between(costs.prefills.at, reads, batch) / reads[0] + sum(one.extra for one in texts)
        for step in range(max(one.steps for one in texts)):
            alive = sum(one.steps > step for one in texts)
            together += call * between(costs.calls.at, calls, alive) / calls[0]
            together += rest * between(costs.rests.at, rests, alive) / rests[0]
        return sum(one.seconds for one in texts) / together

    return factor(estimate)


@dataclass(frozen=True)
class Option:
    """Something that may be done.

    quality: what it costs, None where the text stays the same. load, method, batch: how it is run. command, python:
    how to apply it; there need not be a command. in_use: whether it is done already. detail: what else was found, by
    name.
    """

    kind: Kind
    name: str
    factor: Factor
    command: str
    python: str
    quality: Quality | None = None
    load: dict[str, Any] = field(default_factory=dict)
    method: str = "greedy"
    batch: int = 1
    in_use: bool = False
    detail: dict[str, float] = field(default_factory=dict)

    @property
    def helps(self) -> bool:
        """Whether it is faster for sure, by more than a trifle."""
        return self.factor.low > WORTH

    @property
    def group(self) -> str:
        """What it is one setting of."""
        return "batch" if self.kind == "batch" else self.name.partition(":")[0]

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data, and whether it helps."""
        return {**asdict(self), "helps": self.helps}


def best_of_each(options: Sequence[Option]) -> list[Option]:
    """One setting of each thing, the fastest first.

    Of a method's settings it is the fastest; of the batches the smallest that is nearly as good as the best.
    """
    groups: dict[str, list[Option]] = {}
    for one in options:
        groups.setdefault(one.group, []).append(one)
    chosen = []
    for name, group in groups.items():
        most = max(one.factor.value for one in group)
        good = [one for one in group if one.factor.value >= (ENOUGH * most if name == "batch" else most)]
        chosen.append(min(good, key=lambda one: one.batch))
    return sorted(chosen, key=lambda one: -one.factor.value)


def recommended(options: Sequence[Option]) -> list[Option]:
    """What would help and is not done yet, the fastest first."""
    return [one for one in best_of_each(options) if one.helps and not one.in_use]


def option(model: str, draft: str | None, kind: Kind, name: str, gained: Factor, **told: Any) -> Option:
    """An option with the ways to apply it to the model of that name; draft: as given, where one was."""
    load, method, batch = told.get("load", {}), told.get("method", "greedy"), told.get("batch", 1)
    found, named = find(method)
    words = ["formery", "generate", "--model", model]
    words += [word for key in ("dtype", "quantize") if key in load for word in (f"--{key}", load[key])]
    words += ["--no-compile"] if load.get("compile") is False else []
    words += [] if method == "greedy" else ["--method", method]
    words += ["--draft", draft] if found.takes_draft and draft is not None else []
    loading = ", ".join([repr(model), *(f"{key}={value!r}" for key, value in load.items())])
    given = [f"formery.load({loading})", "prompts", *([] if method == "greedy" else [repr(found.name)])]
    if found.takes_draft and (own := draft or (found.draft_of(model) if found.needs_draft else None)):
        given.append(f"draft=formery.load({own!r})")
    given += [f"{key}={value!r}" for key, value in named.items()]
    given += [f"batch={batch}"] if batch > 1 else []
    # There is no command for a batch.
    command = "" if batch > 1 else shlex.join(words)
    return Option(kind, name, gained, command, f"formery.generate({', '.join(given)})", **told)


@dataclass(frozen=True)
class Confirmed:
    """What a recommendation came to when it was run: the median of the rounds, the slowest and the fastest."""

    option: Option
    measured: Factor

    @property
    def error(self) -> float:
        """By what share the prediction was off."""
        return abs(self.option.factor.value / self.measured.value - 1)


def mean_error(confirmed: Sequence[Confirmed]) -> float:
    """By what share the predictions were off, on average."""
    return mean(one.error for one in confirmed)


def measured(
    chosen: Option,
    name: str,
    model: Model,
    drafts: Mapping[str, Model | Guide],
    sources: Sequence[Source],
    max_new_tokens: int,
) -> Factor:
    """Runs an option on the prompts, in turn with decoding them one after the other, token by token."""
    other = load(name, **chosen.load) if chosen.load else model
    prompts = list(islice(cycle(sources), chosen.batch)) if chosen.batch > 1 else list(sources)
    method = find(chosen.method)[0]
    own: dict[str, Any] = {"draft": drafts[method.name]} if method.name in drafts else {}

    def rate(plain: bool, some: Sequence[Source]) -> float:
        began = time.perf_counter()
        if plain:
            outputs = generate(model, some, batch=1, max_new_tokens=max_new_tokens)
        else:
            outputs = generate(other, some, chosen.method, chosen.batch, max_new_tokens=max_new_tokens, **own)
        return Laps(outputs, [time.perf_counter() - began]).rates()[0]

    for plain in (True, False):
        rate(plain, prompts[:1])
    ratios = []
    for lap in range(ROUNDS):
        rates = {plain: rate(plain, prompts) for plain in ((True, False) if lap % 2 else (False, True))}
        ratios.append(rates[False] / rates[True])
    return Factor(median(ratios), min(ratios), max(ratios))


@dataclass(frozen=True)
class Advice:
    """What would help, and what it was told from.

    options: all that was looked at. notes: what was not, and why. cache_methods: slugs of papers here that shrink the
    decode state. shortened: how many prompts lost their beginning to fit the model.
    """

    model: str
    prompts: int
    max_new_tokens: int
    tokens: int
    shortened: int
    profile: Profile
    options: list[Option]
    notes: list[str]
    cache_methods: list[str]
    seconds: float
    confirmed: list[Confirmed] = field(default_factory=list)

    @property
    def recommended(self) -> list[Option]:
        """What would help and is not done yet, the fastest first."""
        return recommended(self.options)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        options = [one.to_json() for one in self.options]
        confirmed = [
            {"name": one.option.name, "predicted": asdict(one.option.factor), "measured": asdict(one.measured)}
            for one in self.confirmed
        ]
        profile = {**asdict(self.profile), "bandwidth": self.profile.bandwidth}
        return {
            **asdict(self),
            "profile": profile,
            "options": options,
            "recommended": [one.name for one in self.recommended],
            "confirmed": confirmed,
            "machine": machine(),
            "versions": versions(),
        }
