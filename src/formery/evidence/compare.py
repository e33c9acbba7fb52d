"""Methods side by side on one work: what they write, how good that is, and how fast."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from formery.data.base import Example, Work
from formery.data.works import work as work_named
from formery.errors import FormeryError
from formery.evidence.accounting import per_layer_and_token
from formery.evidence.machine import machine
from formery.evidence.measured import Progress, quiet
from formery.evidence.race import Entrant, Laps, fitted, identical, race, seconds_in_calls, speedups
from formery.generate import Generation
from formery.generate.method import find
from formery.models import Guide, Model, guides, load, shipped

BASELINE = "greedy"


@dataclass(frozen=True)
class MethodRow:
    """One method's figures.

    lossless: what it promises. identical: the share of outputs with greedy's very tokens, as measured.
    quality: the work's metrics, empty where there is nothing to compare with. tokens_per_second: median over
    the rounds. calls_per_token: target calls that rows took part in, over the tokens decided. speedup: its
    rate over greedy's in the same round, median; spread: smallest and largest. state_bytes: the largest
    decode state, measured from its storage; state_per_layer_token: that for each layer and token of its longest row.
    guarded: near ties that were decided apart. drafting, verifying: the shares of the first round's time
    that guessing and calling the target took; the rest is reading prompts and book-keeping.
    """

    method: str
    lossless: bool
    identical: float
    quality: dict[str, float | str]
    tokens_per_second: float
    calls_per_token: float
    speedup: float
    state_bytes: int
    state_per_layer_token: float
    spread: tuple[float, float]
    accepted_per_call: float
    guarded: int
    drafting: float
    verifying: float


@dataclass(frozen=True)
class Output:
    """What each method wrote for one example."""

    name: str
    prompt: str
    reference: str
    generations: dict[str, Generation]


@dataclass(frozen=True)
class Comparison:
    """A table of methods, and the outputs it was made from.

    settings: what all methods were given. shortened: how many prompts lost their beginning to fit the model.
    """

    work: str
    model: str
    machine: dict[str, Any]
    rows: list[MethodRow]
    outputs: list[Output]
    settings: dict[str, Any]
    shortened: int

    def to_json(self) -> dict[str, Any]:
        """The table as plain data, without the outputs."""
        return {
            "work": self.work,
            "model": self.model,
            "machine": self.machine,
            "rows": [asdict(row) for row in self.rows],
            "settings": self.settings,
            "shortened": self.shortened,
        }


def compare(
    model: Model | str,
    work: str | Work[Any] | Sequence[Example],
    methods: Sequence[str],
    draft: Model | str | None = None,
    limit: int = 20,
    batch: int = 1,
    max_new_tokens: int = 64,
    seed: int = 0,
    rounds: int = 3,
    progress: Progress = quiet,
) -> Comparison:
    """Runs greedy and `methods` on the test examples of a work, or on given examples, and measures.

    methods: names, with options behind them where wanted ("speculative-sampling:length=8"). draft: for
    methods that need one; by default the one that ships with a shipped model. seed: chooses the examples, and
    draws the tokens. Raises FormeryError for an unknown name, a work of another kind of model, no examples,
    or a missing draft.
    """
    for value, what in ((limit, "examples"), (batch, "prompts in a batch"), (rounds, "rounds")):
        if value < 1:
            raise FormeryError(f"a comparison needs at least 1 of its {what}, not {value}.")
    label = model if isinstance(model, str) else _described(model)
    names = list(dict.fromkeys([BASELINE, *methods]))
    known = work_named(work) if isinstance(work, str) else work if isinstance(work, Work) else None
    model = load(model) if isinstance(model, str) else model
    examples = _examples(model, known, work, limit, seed)
    drafts = drafts_for(label, draft, names)

    prompts, shortened = fitted(model, list(drafts.values()), examples, max_new_tokens)
    entrants = [Entrant(name, {"draft": drafts[name]} if name in drafts else {}) for name in names]
    settings = {"max_new_tokens": max_new_tokens, "seed": seed}
    laps = race(model, prompts, entrants, rounds, batch, settings, progress)
    runs = dict(zip(names, laps, strict=True))
    return Comparison(
        work="given prompts" if known is None else known.name,
        model=label,
        machine=machine(),
        rows=[
            _row(name, run, laps[0], known, examples, batch, per_layer_and_token(model, prompts, run.outputs, batch))
            for name, run in runs.items()
        ],
        outputs=[
            Output(one.name, one.prompt, one.reference, {name: run.outputs[i] for name, run in runs.items()})
            for i, one in enumerate(examples)
        ],
        settings={**settings, "examples": len(examples), "batch": batch, "rounds": rounds},
        shortened=shortened,
    )


def drafts_for(model: str, draft: Model | Guide | str | None, names: Sequence[str]) -> dict[str, Model | Guide]:
    """What each method that takes one drafts with: the given draft where it is of the method's kind, or the shipped."""
    given = load(draft) if isinstance(draft, str) else draft
    found = {}
    for name in names:
        method = find(name)[0]
        if method.takes_draft:
            fits = given is not None and method.guided == isinstance(given, Guide)
            own = draft_for(model, given if fits else None, name)
            if own is not None:
                found[name] = own
    return found


def draft_for(model: str, draft: Model | Guide | str | None, name: str) -> Model | Guide | None:
    """What a method drafts with: the given draft, or the one that ships with the shipped model of that name.

    None where there is none and it can do without.
    """
    method = find(name)[0]
    if draft is None:
        draft = method.draft_of(model)
        if draft not in (*shipped(), *guides()):
            if not method.needs_draft:
                return None
            raise FormeryError(
                f"{method.name} drafts with a guide that is trained on the model, and none ships for {model}; "
                "train one, and name it as the draft."
                if method.guided
                else f"{method.name} needs a smaller model to draft with, and none ships for {model}; "
                "give one with the same tokenizer as the draft."
            )
    drafting: Model | Guide = load(draft) if isinstance(draft, str) else draft
    return drafting


def _examples(model: Model, known: Work[Any] | None, given: Any, limit: int, seed: int) -> list[Example]:
    examples = list(given)[:limit] if known is None else known.examples("test", limit=limit, seed=seed)
    if not examples:
        raise FormeryError("there are no prompts to compare methods on; give at least one.")
    kind = "encoder-decoder" if model.reads_apart else "decoder"
    if known is not None and known.kind != kind:
        raise FormeryError(f"the work {known.name} is for a model that is a {known.kind}; this is a {kind}.")
    return examples


def _row(
    name: str,
    laps: Laps,
    baseline: Laps,
    work: Work[Any] | None,
    examples: Sequence[Example],
    batch: int,
    held: float,
) -> MethodRow:
    ratios = speedups(laps, baseline)
    drafting, verifying = seconds_in_calls(laps.outputs, batch)
    return MethodRow(
        method=name,
        lossless=find(name)[0].lossless,
        identical=identical(laps.outputs, baseline.outputs),
        quality={} if work is None else work.quality([one.text for one in laps.outputs], examples),
        tokens_per_second=statistics.median(laps.rates()),
        calls_per_token=laps.calls / laps.tokens,
        speedup=statistics.median(ratios),
        state_bytes=max(one.state_bytes for one in laps.outputs),
        state_per_layer_token=held,
        spread=(min(ratios), max(ratios)),
        accepted_per_call=sum(one.accepted for one in laps.outputs) / laps.calls,
        guarded=sum(one.guarded for one in laps.outputs),
        drafting=drafting / laps.seconds[0],
        verifying=verifying / laps.seconds[0],
    )


def _described(model: Model) -> str:
    return f"{type(model).__name__} of {model.parameter_count() / 1e6:.2g} M parameters"
