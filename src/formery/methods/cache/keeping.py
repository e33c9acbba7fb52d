"""What checks of eviction share: the model `long` with its cache bounded, on prose and on questions far back.

A unit is one rule, one budget and one seed. All units of a seed read the same texts of 1,024 tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.data.batching import WindowBatches, pad
from formery.data.long import TASKS, Long
from formery.data.long_text import prose
from formery.evidence.accounting import account
from formery.evidence.checks import criterion, model_named
from formery.evidence.measured import Budget, Row, spread
from formery.evidence.verdict import Criterion
from formery.generate import generate
from formery.methods.cache.evict import bounded
from formery.models import Decoder
from formery.parts.bounded import Bounded
from formery.parts.eviction import Anything, Eviction, HeavyHitters, Held, Latest, Sinks

LENGTH, WINDOWS, QUESTIONS = 1024, 4, 24  # tokens of a text; rows of prose, and of questions, for each seed
MODEL, SMALLER = "long", "long-small"  # the smaller one's cache of a text has the bytes of a quarter of the other's
SHARES = (4, 8, 16)  # a budget is that part of the text
RULES: dict[str, Callable[[int], Eviction]] = {
    "window": lambda layer: Latest(),
    "sinks": lambda layer: Sinks(),
    "random": lambda layer: Anything(layer),
    "h2o": lambda layer: HeavyHitters(),
}
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """Rows of one batch: prose first, then questions with their answers, padded on the right.

    due: (row, place, token) of each token of an answer, by task and question.
    """

    tokens: Int[Tensor, "row time"]
    positions: Int[Tensor, "row time"]
    due: dict[str, list[list[tuple[int, int, int]]]] = field(default_factory=dict)


@cache
def texts(seed: int) -> Texts:
    """The texts of a seed."""
    tokenizer = model_named(MODEL).tokenizer
    plain = WindowBatches(prose("test"), LENGTH, WINDOWS, seed).batch(0)["tokens"]
    rows: list[list[int]] = plain.tolist()
    due: dict[str, list[list[tuple[int, int, int]]]] = {task: [] for task in TASKS}
    for one in islice(Long(LENGTH - 1, tokenizer=tokenizer).questions("test", seed), QUESTIONS):
        before, answer = [tokenizer.bos, *tokenizer.encode(one.prompt)], tokenizer.encode(one.answer)
        due[one.task].append([(len(rows), len(before) - 1 + i, token) for i, token in enumerate(answer)])
        rows.append(before + answer)
    return Texts(*pad(rows, tokenizer.bos), due)


@torch.inference_mode()
def measured(model: Decoder, seed: int) -> dict[str, float]:
    """The loss of prose in nats a token, and the share of questions that greedy answers exactly, in all and by task."""
    read = texts(seed)
    logits = model(read.tokens[:, :-1], read.positions[:, :-1])
    plain = logits[:WINDOWS].float().flatten(0, 1)
    found = {"loss": float(torch.nn.functional.cross_entropy(plain, read.tokens[:WINDOWS, 1:].flatten()))}
    # Greedy writes the answer if each of its tokens is the likeliest behind those before it.
    best = logits.argmax(-1)
    right = {
        task: [all(best[r, at] == token for r, at, token in one) for one in ones] for task, ones in read.due.items()
    }
    every = [one for ones in right.values() for one in ones]
    found["answered"] = sum(every) / len(every)
    return found | {f"answered: {task}": sum(ones) / len(ones) for task, ones in right.items()}


def unit(rule: Callable[[int], Eviction] | None, budget: int, seed: int) -> dict[str, float]:
    """One rule with one budget; the whole cache where there is no rule."""
    model = model_named(MODEL)
    limited = model if rule is None else bounded(model, rule, budget)
    held = account(limited, LENGTH)
    return measured(limited, seed) | {"state_bytes": held.total, "bytes_per_token": held.per_token}


def smaller(seed: int) -> dict[str, float]:
    """A dense model whose cache of a text has the bytes of a quarter of the other's."""
    held = account(model_named(SMALLER), LENGTH)
    return measured(model_named(SMALLER), seed) | {"state_bytes": held.total, "bytes_per_token": held.per_token}


def foreseen(budget: int, seed: int) -> dict[str, float]:
    """The oracle: of each head the slots stay that the whole model's coming queries will look at most."""
    model, read = model_named(MODEL), texts(seed)
    worth = coming(model, read)
    limited = bounded(model, lambda layer: Foresight(worth[layer]), budget)
    held = account(bounded(model, HeavyHitters(), budget), LENGTH)
    return measured(limited, seed) | {"state_bytes": held.total, "bytes_per_token": held.per_token}


@torch.inference_mode()
def coming(model: Decoder, read: Texts) -> list[Float[Tensor, "row group time slot"]]:
    """For each layer, the attention that each slot will be paid by all queries from a time on."""
    watched = bounded(model, HeavyHitters(), LENGTH + 1)
    layers = [part for part in watched.modules() if isinstance(part, Bounded)]
    seen: list[list[Tensor]] = [[] for _ in layers]
    for part, notes in zip(layers, seen, strict=True):
        _listen(part, notes)
    watched(read.tokens[:, :-1], read.positions[:, :-1])
    return [_suffix_sums(notes, layer.groups) for notes, layer in zip(seen, layers, strict=True)]


def _listen(part: Bounded, notes: list[Tensor]) -> None:
    reading = part.reading

    def heard(
        heads: slice, query: Tensor, places: Tensor, keys: Tensor, key_places: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        mixed, weights = reading(heads, query, places, keys, key_places, values)
        assert weights is not None
        notes.append(torch.nn.functional.pad(weights, (0, LENGTH - weights.shape[-1])))
        return mixed, weights

    part.reading = heard  # type: ignore[method-assign]


def _suffix_sums(notes: list[Tensor], groups: int) -> Float[Tensor, "row group time slot"]:
    whole = torch.cat(notes, 2)
    means = whole.reshape(len(whole), groups, -1, *whole.shape[2:]).mean(2)
    return means.flip(2).cumsum(2).flip(2).half()


class Foresight(Eviction):
    """Keeps what will be looked at; for texts that are known to the end. worth: as `coming` gives it."""

    apart = True
    forget = 1.0

    def __init__(self, worth: Float[Tensor, "row group time slot"]) -> None:
        self.worth = worth

    def scores(self, held: Held) -> Float[Tensor, "batch group slot"]:
        time = held.now.clamp(max=self.worth.shape[2] - 1)
        ahead = self.worth[held.rows, :, time].float()
        return ahead.gather(2, held.positions.clamp(min=0))


def survey(
    budget: Budget, rules: Mapping[str, Callable[[int], Eviction]], shares: Sequence[int] = SHARES
) -> dict[tuple[str, int], list[Values]]:
    """All units: by rule and share (1: the whole cache), the values of each seed."""
    budget.units.expect(len(budget.seeds) * (len(rules) * len(shares) + 2))
    found: dict[tuple[str, int], list[Values]] = {}

    def note(name: str, share: int, run: Callable[[int], dict[str, float]]) -> None:
        label = f"{name}, 1/{share}" if share > 1 else name
        found[name, share] = [budget.units.measure(f"{label}, seed {s}", partial(run, s)) for s in budget.seeds]

    note("whole cache", 1, lambda seed: unit(None, LENGTH, seed))
    note("smaller dense model", 4, smaller)
    for share in shares:
        for name, rule in rules.items():
            note(name, share, partial(unit, rule, LENGTH // share))
    return found


def rows(found: Mapping[tuple[str, int], Sequence[Values]]) -> list[Row]:
    """A row for each rule and budget."""
    return [
        Row(
            "long",
            f"{name}, 1/{share} of the cache" if share > 1 else name,
            1,
            {key: spread(float(one[key]) for one in values) for key in values[0]},
        )
        for (name, share), values in found.items()
    ]


def gain(
    found: Mapping[tuple[str, int], Sequence[Values]], value: str, one: tuple[str, int], other: tuple[str, int]
) -> list[float]:
    """How much more of a value one setting has than another, for each seed."""
    return [float(a[value]) - float(b[value]) for a, b in zip(found[one], found[other], strict=True)]


def whole_is_whole(budget: Budget, rule: Callable[[int], Eviction]) -> Criterion:
    """With a budget as large as the context the very tokens of the whole cache are written."""
    model = model_named(MODEL)
    examples = Long(512, tokenizer=model.tokenizer, number=24).examples("test")

    def share() -> dict[str, float]:
        prompts = [one.prompt for one in examples[: budget.examples]]
        given: dict[str, Any] = {"batch": 8, "max_new_tokens": min(24, budget.max_new_tokens)}
        plain, limited = (generate(one, prompts, **given) for one in (model, bounded(model, rule, 1024)))
        return {"same": sum(a.tokens == b.tokens for a, b in zip(plain, limited, strict=True)) / len(prompts)}

    values = budget.units.measure("a budget as large as the context", share)
    statement = "with a budget as large as the context, the tokens are those of the whole cache"
    return criterion("exact limit", statement, [float(values["same"])], "==", 1.0, essential=True)


def bytes_saved(found: Mapping[tuple[str, int], Sequence[Values]], name: str, share: int) -> Criterion:
    """The state's bytes, measured from storage, against the whole cache's."""
    ratios = [
        a["state_bytes"] / b["state_bytes"] for a, b in zip(found[name, share], found["whole cache", 1], strict=True)
    ]
    statement = f"at 1/{share} the state takes at most 1/{share} and a twentieth of the bytes of the whole cache"
    return criterion("bytes", statement, ratios, "<=", 1 / share + 0.05)
