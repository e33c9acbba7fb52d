"""No position encoding: a causal decoder that is told no positions, on inputs longer than those it learned from.

Kazemnejad, Padhi, Natesan Ramamurthy, Das and Reddy, "The Impact of Positional Encoding on Length Generalization in
Transformers", 2023. One decoder is trained with each of several position schemes on short inputs of small tasks and
asked for longer ones; schemes are ranked in each task. The paper finds the model without any scheme (NoPE) first and
T5's relative bias next, before ALiBi, rotary and absolute positions; that NoPE's attention resembles that of T5's
bias most; and that a scratchpad helps only in some tasks and formats.

The causal mask alone tells positions (theorem 1): where all scores are equal, a head reads the mean of all values so
far, so that a value of 1 at `<bos>` and 0 elsewhere comes out as `1 / t` at the t-th token, which a feed-forward turns
into `t`. From there (theorem 2) queries `[t, 1]` and keys `[-1, t]` score the distance, `t_key - t_query`.
`counting.py` has just these weights.

Patterns of heads P and Q are compared by the mean of their Jensen-Shannon divergences over queries, and models
in a layer by the nearest pair of their heads (section 5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor

from formery.data.sequences import Sequences
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, Spread, spread
from formery.evidence.paper import Paper, publish
from formery.methods.position.schemes import PLAN, SCHEMES, SCRATCHPADS, TRAINED, WITH_SCRATCHPAD, trained
from formery.models import Decoder
from formery.models.attention_maps import Maps, attention_maps

EXAMPLES = 100  # fresh inputs of each length
LONGER = (1.25, 1.5, 2.0)  # times the longest trained input
MATTERS = 0.05  # of exact answers: a difference that is called one


def divergence(first: Float[Tensor, "... key"], second: Float[Tensor, "... key"]) -> Float[Tensor, "..."]:
    """The Jensen-Shannon divergence of distributions over keys, in bits: from 0 (equal) to 1 (apart)."""
    middle = (first + second) / 2
    return (_relative_entropy(first, middle) + _relative_entropy(second, middle)) / 2


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    return torch.where(p > 0, p * (p / q.clamp(min=torch.finfo(q.dtype).tiny)).log2(), 0.0).sum(-1)


def between_heads(first: Maps, second: Maps) -> Float[Tensor, "layer head other"]:
    """The mean divergence over rows and queries of each head of one model and each of another, layer by layer."""
    pairs = [divergence(p[:, :, None], q[:, None]).mean((0, 3)) for p, q in zip(first, second, strict=True)]
    return torch.stack(pairs)


@torch.no_grad()
def right(made: Decoder, task: str, length: int, seed: int) -> tuple[float, float]:
    """The share of fresh inputs of that length whose whole answer greedy decoding writes, and of answer tokens that
    the model finds likeliest where it is given those before them."""
    batch = Sequences(task, length, length, EXAMPLES, seed + 1000).batch(0)
    tokens, due = batch["tokens"], batch["answers"][:, 1:]
    same = made(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
    return float((same | ~due).all(1).double().mean()), float(same[due].double().mean())


def measured(scheme: str, task: str, seed: int) -> dict[str, float]:
    """Answers at the longest trained length and at longer ones."""
    made, longest = trained(scheme, task, seed), TRAINED[task.partition("-")[0]]
    shares = {times: right(made, task, round(times * longest), seed) for times in (1.0, *LONGER)}
    found = {f"exact at {times:g} x": whole for times, (whole, _) in shares.items()}
    found["exact, longer"] = mean(shares[times][0] for times in LONGER)
    found["tokens right, longer"] = mean(shares[times][1] for times in LONGER)
    return found


def likeness(task: str, seed: int) -> dict[str, float]:
    """The divergence of NoPE's attention from each other scheme's, on inputs twice as long as in training.

    nearest: of the nearest pair of heads, as the paper has it; heads: of each of NoPE's heads and the nearest to it.
    Means over layers.
    """
    tokens = Sequences(task, 2 * TRAINED[task], 2 * TRAINED[task], 16, seed + 1000).batch(0)["tokens"][:, :-1]
    maps = {scheme: attention_maps(trained(scheme, task, seed), tokens)[0] for scheme in SCHEMES}
    found = {}
    for scheme in SCHEMES[1:]:
        pairs = between_heads(maps["nope"], maps[scheme])
        found[f"nearest, {scheme}"] = float(pairs.amin((1, 2)).mean())
        found[f"heads, {scheme}"] = float(pairs.amin(2).mean())
    return found


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value, 1 for the largest; equal ones share the mean of their places."""
    return [sum(b > a for b in values) + (1 + sum(b == a for b in values)) / 2 for a in values]


@dataclass(frozen=True)
class Outcome:
    """What all models did. answers: by scheme, task and seed, as `measured`; alike: by task and seed, as `likeness`."""

    seeds: Sequence[int]
    answers: Mapping[tuple[str, str, int], Mapping[str, float]]
    alike: Mapping[tuple[str, int], Mapping[str, float]]

    def rank(self, scheme: str) -> list[float]:
        """The mean rank of a scheme over the tasks, in each seed."""
        return [mean(self.place(scheme, task, seed) for task in TRAINED) for seed in self.seeds]

    def place(self, scheme: str, task: str, seed: int) -> float:
        """Its rank by exact answers on longer inputs."""
        return ranks([self.answers[one, task, seed]["exact, longer"] for one in SCHEMES])[SCHEMES.index(scheme)]

    def ahead(self, scheme: str, others: Sequence[str]) -> list[float]:
        """By how much the mean rank of a scheme is better than the best of the others, in each seed."""
        return [min(values) - own for own, *values in zip(self.rank(scheme), *map(self.rank, others), strict=True)]

    def nearer(self) -> list[float]:
        """By how much T5's attention is nearer to NoPE's than the nearest of the others is, in each seed."""
        found = []
        for seed in self.seeds:
            means = {one: mean(self.alike[task, seed][f"nearest, {one}"] for task in TRAINED) for one in SCHEMES[1:]}
            own = means.pop("t5")
            found.append(min(means.values()) - own)
        return found

    def gain(self, scheme: str, scratchpad: str) -> list[float]:
        """What a scratchpad adds to the share of longer sums that are right, in each seed."""
        return [
            self.answers[scheme, scratchpad, seed]["exact, longer"] - self.answers[scheme, "add", seed]["exact, longer"]
            for seed in self.seeds
        ]

    def rows(self) -> list[Row]:
        """A row for each task and scheme, the mean ranks, and how near attention is."""
        made = [
            Row(task, scheme, 1, _spreads([self.answers[scheme, task, seed] for seed in self.seeds]))
            for scheme, task in dict.fromkeys((scheme, task) for scheme, task, _ in self.answers)
        ]
        made += [Row("all tasks", scheme, 1, {"mean rank": spread(self.rank(scheme))}) for scheme in SCHEMES]
        return made + [
            Row(task, "attention, from nope", 1, _spreads([self.alike[task, seed] for seed in self.seeds]))
            for task in TRAINED
        ]


def _spreads(values: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    return {name: spread(one[name] for one in values) for name in values[0]}


def survey(budget: Budget) -> Outcome:
    """Trains and asks all models, and compares their attention."""
    asked = [(scheme, task) for task in TRAINED for scheme in SCHEMES]
    asked += [(scheme, task) for task in SCRATCHPADS for scheme in WITH_SCRATCHPAD]
    seeds, measure = budget.seeds, budget.units.measure
    budget.units.expect((len(asked) + len(TRAINED)) * len(seeds))
    answers = {
        (scheme, task, seed): measure(f"{task}, {scheme}, seed {seed}", partial(measured, scheme, task, seed))
        for seed in seeds
        for scheme, task in asked
    }
    alike = {
        (task, seed): measure(f"attention, {task}, seed {seed}", partial(likeness, task, seed))
        for seed in seeds
        for task in TRAINED
    }
    return Outcome(seeds, answers, alike)


def check(budget: Budget) -> Measured:
    """Position schemes ranked on longer inputs, NoPE's attention beside that of the others, and scratchpads."""
    found = survey(budget)
    explicit = [scheme for scheme in SCHEMES if scheme not in ("nope", "t5")]
    gains = {one: [found.gain(scheme, one) for scheme in WITH_SCRATCHPAD] for one in SCRATCHPADS}
    least = [min(values) for values in zip(*(one for some in gains.values() for one in some), strict=True)]
    apart = [
        [abs(a - b) for a, b in zip(first, second, strict=True)] for first, second in zip(*gains.values(), strict=True)
    ]
    large = untestable(
        "large",
        "a model of 1.3 billion parameters trained on code extrapolates best without position encoding",
        ">",
        0.0,
        "needs pretraining models of that size",
    )
    return Measured(
        [
            criterion(
                "first",
                "without position encoding the mean rank over tasks on longer inputs is better than with ALiBi, "
                "rotary, sinusoidal and learned positions",
                found.ahead("nope", explicit),
                ">",
                0.0,
                essential=True,
            ),
            criterion("before T5", "and better than with T5's relative bias", found.ahead("nope", ["t5"]), ">", 0.0),
            criterion(
                "T5 next", "T5's relative bias ranks better than those four", found.ahead("t5", explicit), ">", 0.0
            ),
            criterion(
                "like T5",
                "of all schemes' attention T5's is the nearest to that without position encoding (nearest heads)",
                found.nearer(),
                ">",
                0.0,
            ),
            criterion(
                "not always",
                "with some format and scheme a scratchpad adds less than 0.05 to the share of longer sums done right",
                least,
                "<",
                MATTERS,
            ),
            criterion(
                "format",
                "in some scheme two formats of scratchpad differ by at least 0.05 in that share",
                [max(values) for values in zip(*apart, strict=True)],
                ">=",
                MATTERS,
            ),
            large,
        ],
        found.rows(),
        baseline="the same decoder without position encoding, trained alike",
        notes=NOTES,
    )


NOTES = [
    f"Decoders of 0.1 M parameters, 3 layers of 4 heads, {PLAN.steps} steps of 32 inputs of one task; trained to "
    "length 8 (copy, reverse, sort) or 5 digits (add), asked at 1, 1.25, 1.5 and 2 times that, 100 inputs each.",
    "The paper trains 107 M parameters for 40,000 steps to length 20. Without positions a model learns more slowly: "
    "where its row at 1 x is below 1 it is not done, and its rank says that too.",
    "A rank is a place among six schemes by exact answers on longer inputs; equal ones share a place. Divergences "
    "are in bits, 0 to 1: `nearest` of the nearest pair of heads in a layer, `heads` of each head of NoPE's and the "
    "nearest to it, means over layers.",
    "Sums are of binary numbers. add-carries notes each digit and carry from the last on, add-steps the digits "
    "that are added too.",
]

PAPER = publish(
    Paper(
        slug="nope-length-generalisation",
        title="The Impact of Positional Encoding on Length Generalization in Transformers",
        year=2023,
        part="position",
        domain="language",
        does="Compares five choices of position encoding in decoder-only transformers (absolute, rotary, ALiBi, "
        "T5's relative bias, none) on inputs longer than those in training, and shows how the causal mask alone can "
        "convey order.",
        claims="Using no encoding beats absolute positions, ALiBi and rotary on longer inputs at no extra compute, "
        "with T5's bias next, which its attention resembles; scratchpads help only sometimes and depend on format.",
        needs="Models of 107 million parameters trained for 40,000 steps on ten tasks, and one of 1.3 billion on code.",
        name="NoPE length generalisation",
        training="whole",
        sought="model fails on longer inputs than in training; which positional encoding extrapolates; ALiBi versus "
        "rotary versus none",
        related={
            "masformer": "longer than trained",
            "deberta": "how positions are told",
            "cot-expressivity": "scratchpads",
            "rasp": "what decoder transformers can express",
            "position-context-decomposition": "positions inside a model",
            "addition-circuit": "small transformers on arithmetic-like tasks",
            "phd-transformer": "training and use at longer length",
            "mp3": "what a transformer knows about position",
        },
        added="2026-11-28",
        check=check,
    )
)
