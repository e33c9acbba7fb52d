"""Sparse Frontier: ways to leave out attention without training, compared in reading prompts and in writing.

Nawrot, Li, Huang, Ruder, Marchisio and Ponti, "The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
2025. Methods differ in what they leave out (columns and diagonals, blocks, pages, single tokens), how they estimate
what matters, whether all heads get the same budget, and whether what is left out is gone. Compared are, each at 2 to 16
times fewer pairs of a query and a key:

- while the prompt is read: `Lines` (vertical-slash), `CoveringLines` (the same with budgets of their own for each head,
  in the manner of FlexPrefill), `Blocks`, and `Near` (window and sinks);
- while tokens are written: `Pages` (Quest), `Kept` (SnapKV), `KeptUnevenly` (Ada-SnapKV), `Recent` (window and sinks),
  and `Largest`, which knows the true weights and is what could be reached.

The paper runs Qwen 2.5 of 7 to 72 billion parameters on nine tasks at 16,000 to 128,000 tokens.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from itertools import pairwise, product
from typing import Any

import torch

from formery.evidence.checks import model_named, untestable
from formery.evidence.choices import Counting
from formery.evidence.intervals import bootstrap
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.verdict import Criterion
from formery.methods.attention.comparing import ENOUGH, TASKS, TEXT, due, layers_of, less, on_answers, plainly, survey
from formery.methods.attention.sizes import SMALL, trained
from formery.models import Decoder
from formery.models.phased import Phased, phased
from formery.parts import Attention
from formery.parts.reading import Blocks, CoveringLines, Lines, Near
from formery.parts.selection import Kept, KeptUnevenly, Largest, Pages, Recent, Rule
from formery.parts.selective import Observing, Selective

LENGTH, COMPRESSIONS = 1024, (2, 4, 8, 16)
READING: dict[str, Callable[[float], Rule]] = {
    "columns and diagonals": Lines,
    "columns and diagonals, uneven": CoveringLines,
    "blocks": Blocks,
    "window and sinks": Near,
}
WRITING: dict[str, Callable[[int], Rule]] = {
    "pages": Pages,
    "kept after the prompt": Kept,
    "kept after the prompt, uneven": KeptUnevenly,
    "window and sinks": Recent,
    "largest weights": Largest,
}
PHASES: dict[str, tuple[str, ...]] = {"reading": tuple(READING), "writing": tuple(WRITING)}
SIZES, ORACLE, FULL = ("long", "long-small", SMALL.name), "largest weights", "full attention"
LOST = 0.1  # of all answers, that may be lost where a compression is called safe


@cache
def sized(name: str) -> Decoder:
    """The model of that size."""
    if name == SMALL.name:
        return trained(SMALL, LENGTH)
    model: Decoder = model_named(name)
    return model


def named(phase: str, method: str, times: int) -> str:
    """What a setting is called."""
    return f"{phase}, {method}, {times}x"


def counted(model: Decoder, rule: Rule, phase: str) -> tuple[Phased, Counting]:
    """A twin with that rule in one phase and everything in the other, and what counts its choices."""
    counting = Counting(rule, phase == "writing")
    if phase == "reading":
        return plainly(phased(model, lambda part, _: Selective(part, counting))), counting
    return plainly(phased(model, lambda part, _: Observing(part, None, counting))), counting


def measured(size: str, seed: int, number: int) -> dict[str, Any]:
    """What each setting answers, one value for each question, its losses on text, and the part that it looks at."""
    model = sized(size)
    dues = due(model, LENGTH, seed, number)
    reader = plainly(phased(model, lambda part, _: Observing(part)))
    writing, counts = {FULL: reader}, dict[str, Counting]()
    for (method, rule), times in product(WRITING.items(), COMPRESSIONS):
        name = named("writing", method, times)
        writing[name], counts[name] = counted(model, rule(LENGTH // times), "writing")
    found: dict[str, Any] = survey(reader, writing, dues)
    for (method, make), times in product(READING.items(), COMPRESSIONS):
        name = named("reading", method, times)
        own, counts[name] = counted(model, make(1 / times), "reading")
        found |= survey(own, {name: own}, dues)
    return found | {f"{name}|share": one.share for name, one in counts.items()}


def products(model: Decoder, phase: str, share: float) -> float:
    """Multiplications for a token, read in a prompt or written behind it, of `LENGTH` tokens."""
    part = next(part for part in model.modules() if isinstance(part, Attention))
    context = LENGTH if phase == "writing" else (LENGTH + 1) / 2
    return model.parameter_count() + 2 * layers_of(model) * part.heads * part.dim * context * share


class Grid:
    """All that was measured: answers of a setting by size, seed and task."""

    def __init__(self, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Iterable[int]):
        self.found, self.seeds = found, tuple(seeds)

    def values(self, size: str, name: str, task: str) -> list[float]:
        """One value for each question of all seeds."""
        return [value for seed in self.seeds for value in self.found[size, seed][f"{name}|{task}"]]

    def all(self, size: str, name: str) -> list[float]:
        """Those of all tasks."""
        return [value for task in TASKS for value in self.values(size, name, task)]

    def answered(self, size: str, name: str) -> list[float]:
        """The share of right answers, for each seed."""
        by_seed = [[v for task in TASKS for v in self.found[size, seed][f"{name}|{task}"]] for seed in self.seeds]
        return [mean(values) for values in by_seed]

    def share(self, size: str, name: str) -> float:
        """The part of all pairs that a setting looks at."""
        return 1.0 if name == FULL else mean([self.found[size, seed][f"{name}|share"] for seed in self.seeds])

    def lost(self, size: str, name: str, task: str | None = None) -> list[float]:
        """What full attention answers and the setting does not, question by question."""
        if task is None:
            return less(self.all(size, FULL), self.all(size, name))
        return less(self.values(size, FULL, task), self.values(size, name, task))

    def safe(self, size: str, phase: str) -> int:
        """The largest compression at which some method surely loses no more than `LOST` of all answers."""
        safe = [1]
        for method, times in product(PHASES[phase], COMPRESSIONS):
            if method != ORACLE and bootstrap(self.lost(size, named(phase, method, times)))[1] <= LOST:
                safe.append(times)
        return max(safe)

    def best(self, size: str, phase: str, times: int, task: str | None) -> set[str]:
        """The methods that lose least, several where they are even; the one that knows the weights apart."""
        methods = [one for one in PHASES[phase] if one != ORACLE]
        losses = {one: mean(self.lost(size, named(phase, one, times), task)) for one in methods}
        return {one for one, value in losses.items() if value == min(losses.values())}


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def affordable(grid: Grid, phase: str) -> list[float]:
    """What the best sparse setting of `long` that costs no more than the next smaller dense model answers beyond it."""
    bound = products(sized("long-small"), phase, 1.0)
    settings = [
        named(phase, method, times) for method, times in product(PHASES[phase], COMPRESSIONS) if method != ORACLE
    ]
    cheap = [one for one in settings if products(sized("long"), phase, grid.share("long", one)) <= bound]
    if not cheap:
        return []
    best = max(cheap, key=lambda one: mean(grid.answered("long", one)))
    return less(grid.answered("long", best), grid.answered("long-small", FULL))


def judged(grid: Grid) -> list[Criterion]:
    """The claims, on what was measured."""
    iso = [value for phase in PHASES for value in affordable(grid, phase)]
    phases = [grid.safe("long", "writing") / grid.safe("long", "reading")]
    everywhere = [
        float(len(set.intersection(*(grid.best("long", phase, 8, task) for task in TASKS)))) for phase in PHASES
    ]
    harm = []
    for phase in PHASES:
        best = min(grid.best("long", phase, 4, None))
        harm.append(max(mean(grid.lost("long", named(phase, best, 4), task)) for task in TASKS))
    able = {size: mean(grid.all(size, FULL)) >= ENOUGH for size in SIZES}
    safe = [float(a - b) for a, b in pairwise([grid.safe(size, "writing") for size in SIZES])]
    larger = "a larger model stands at least as much compression in writing as the next smaller one"
    equal = "`long` made sparse answers more than a smaller dense model of the same cost"
    fine, every = able["long"], all(able.values())
    return [
        on_answers(fine, "equal cost", equal, iso, ">", 0.0)
        if iso
        else untestable("equal cost", equal, ">", 0.0, "no sparse setting costs as little as the smaller model"),
        on_answers(fine, "phases", "writing stands more compression than reading", phases, ">", 1.0),
        on_answers(every, "size", larger, safe, ">=", 0.0),
        on_answers(fine, "no best", "no method is best at every task at 8x, in either phase", everywhere, "==", 0.0),
        on_answers(fine, "harm", "at 4x the best method loses over 5 of 100 answers of a task", harm, ">", 0.05),
        untestable("law", "the loss follows a scaling law", ">=", 0.0, "sizes from 0.6 to 3 million span too little"),
    ]


@torch.inference_mode()
def check(budget: Budget) -> Measured:
    """All settings on three sizes of model: answers, loss on text, and what they cost."""
    budget.units.expect(len(SIZES) * len(budget.seeds))
    found = {
        (size, seed): budget.units.measure(f"{size}, seed {seed}", partial(measured, size, seed, budget.examples))
        for size, seed in product(SIZES, budget.seeds)
    }
    grid, rows = Grid(found, budget.seeds), []
    settings = [named(phase, *one) for phase in PHASES for one in product(PHASES[phase], COMPRESSIONS)]
    for size, name in product(SIZES, [FULL, *settings]):
        phase, share = name.split(",")[0], grid.share(size, name)
        numbers = {task: spread([mean(grid.values(size, name, task))]) for task in TASKS}
        numbers |= {
            "answered": spread(grid.answered(size, name)),
            "loss of text": spread(grid.values(size, name, TEXT)),
        }
        low, high = bootstrap(grid.lost(size, name))
        numbers |= {"lost, low": spread([low]), "lost, high": spread([high]), "pairs": spread([share])}
        costs = PHASES if name == FULL else (phase,)
        numbers |= {f"million products, {one}": spread([products(sized(size), one, share) / 1e6]) for one in costs}
        rows.append(Row("long", f"{size}: {name}", 1, numbers))
    for size in SIZES:
        numbers = {f"safe in {phase}": spread([grid.safe(size, phase)]) for phase in PHASES}
        rows.append(Row("long", f"{size}: largest safe compression", 1, numbers))
    best = [
        f"Best at 8x in {phase}: "
        + "; ".join(f"{task}: {' and '.join(sorted(grid.best('long', phase, 8, task)))}" for task in TASKS)
        for phase in PHASES
    ]
    return Measured(
        judged(grid),
        rows,
        baseline="full attention of the same model",
        models=["long", "long-small"],
        notes=[
            *best,
            f"Questions are of {LENGTH} tokens. `lost` are the bounds of a bootstrap interval (95 of 100) of the share "
            "of answers that full attention gives and the setting does not. A compression is safe where the upper one "
            f"is at most {LOST}.",
            "`pairs` is the measured part of query and key pairs, `million products` the multiplications of a token "
            "with it. What choosing costs is not counted, and keys left out are masked: nothing here is timed.",
            f"`long` has 3.0 M parameters, `long-small` 0.9 M, `{SMALL.name}` 0.6 M; the last had half the steps. At "
            "equal cost that favours the larger ones; three sizes in a factor of five tell of no law.",
            f"`{ORACLE}` knows the true weights; it is no method that saves anything and counts as none.",
        ],
    )


PAPER = publish(
    Paper(
        slug="sparse-frontier",
        title="The Sparse Frontier: Sparse Attention Trade-offs in Transformer LLMs",
        year=2025,
        part="attention",
        domain="language",
        does="Compares ways to make attention sparse without training, for reading prompts and for decoding, over "
        "tasks, model sizes and lengths, and says what each costs.",
        claims="For very long texts larger and sparser models win; decoding stands more sparsity than reading; no "
        "method is best everywhere, and moderate sparsity already hurts some task.",
        needs="Qwen models of 7 to 72 billion parameters at 16,000 to 128,000 tokens for the whole study.",
        name="Sparse Frontier",
        training="none",
        sought="is sparse attention safe; how much sparsity for long context; compare training-free sparse attention",
        related={
            "tidaldecode": "attention to few tokens",
            "tova": "which cached tokens stay",
            "long-context-attention-benchmark": "long attention compared",
            "a2sf": "which cached tokens stay",
        },
        added="2026-11-28",
        check=check,
        works=("long",),
    )
)
