"""What checks of methods that read beyond a short window share: what they are measured on, and against what.

The last tokens of a text are predicted with 1, 2, 4, 8 and 16 windows of it in sight, the same tokens each time;
questions are asked about facts that lie behind the window, in texts of as many windows.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from formery.data.batching import WindowBatches
from formery.data.long import Long
from formery.data.long_text import prose, tokenizer
from formery.evidence.accounting import account
from formery.evidence.checks import criterion
from formery.evidence.measured import Budget, Row, spread
from formery.evidence.verdict import Criterion
from formery.methods.cache.short_window import FACTOR, LONG, ROWS, TASKS, WINDOW, base, dense, interpolated, stretched
from formery.models import Decoder
from formery.models.beyond import Beyond
from formery.train.answering import answering
from formery.train.objective import Batch

FACTORS = (1, 2, 4, 8, 16)
LAST = 32  # tokens of a text that are predicted
TEXTS, QUESTIONS, TOGETHER = 24, 32, 8
SINKS = 4
TIMED, STEPS = 8, 16  # windows that are read, and tokens that are written after them, where time is taken

SETTING = [
    f"One decoder of a third of a million weights learns prose (WikiText-2), repeated prose, recall and copying "
    f"at a window of {WINDOW} tokens. On top of it all is trained on longer texts for {LONG.steps} steps of {ROWS} "
    f"texts, from three seeds: the method; and, all their weights, interpolation and the smaller dense model (half of "
    f"the layers, half of the keys and values, a quarter of the bytes of a full cache), on {FACTOR} windows.",
    "Losses are of the same 32 tokens at each number of windows. Questions are about facts behind the last window, but "
    "for 1 window. Attention sinks are the first 4 tokens and the last 124, read anew as one text.",
    "Times are multiples of those of a full cache (interpolation) in the same round, on a processor.",
]

Look = Callable[[Int[Tensor, "batch time"], int], Float[Tensor, "batch last vocabulary"]]
"""The logits after the last tokens of texts, so many of them."""


@dataclass(frozen=True)
class Contender:
    """A way to deal with texts beyond the window. at: how it looks at texts of so many windows.

    model: whose decode state is measured, and which is timed; None where that says nothing of its own.
    """

    name: str
    at: Callable[[int], Look]
    model: Callable[[int], Decoder] | None = None


def whole(model: Decoder) -> Look:
    """All of the text is looked at."""
    if isinstance(model, Beyond):
        return lambda tokens, last: model.logits(model.stretch(tokens, tokens.shape[1] - last))
    return lambda tokens, last: model.logits(model.hidden(tokens)[:, -last:])


def truncated(tokens: Int[Tensor, "batch time"], last: int) -> Float[Tensor, "batch last vocabulary"]:
    """The base looks at the last window."""
    return whole(base())(tokens[:, -WINDOW:], last)


def with_sinks(tokens: Int[Tensor, "batch time"], last: int) -> Float[Tensor, "batch last vocabulary"]:
    """The base looks at the first four tokens and the last others of a window (Xiao et al., 2023), read anew as one."""
    kept = torch.cat((tokens[:, :SINKS], tokens[:, SINKS - WINDOW :]), 1)
    return whole(base())(kept, last)


def squeezed(seed: int, factor: int) -> Decoder:
    """The interpolated base; beyond the texts that it was trained on, with its positions squeezed further."""
    model = interpolated(seed)
    return model if factor <= FACTOR else stretched(model, factor).eval()


def rivals(seed: int) -> list[Contender]:
    """What every method is compared with."""
    return [
        Contender("truncation", lambda _: truncated, lambda _: base()),
        Contender("attention sinks", lambda _: with_sinks),
        Contender("interpolation", lambda factor: whole(squeezed(seed, factor)), lambda f: squeezed(seed, f)),
        Contender("smaller dense model", lambda _: whole(dense(seed)), lambda _: dense(seed)),
    ]


def contender(name: str, model: Beyond) -> Contender:
    """A model that reads beyond the window."""
    return Contender(name, lambda _: whole(model), lambda _: model)


@cache
def texts(seed: int) -> Int[Tensor, "texts time"]:
    """Held-out prose of 16 windows and a token."""
    windows = WindowBatches(prose("test"), FACTORS[-1] * WINDOW, TEXTS, seed)
    return windows.batch(0)["tokens"]


@cache
def questions(seed: int, task: str, factor: int) -> tuple[Int[Tensor, "questions time"], Int[Tensor, "questions"]]:
    """Texts of so many windows that end in a question about what stands behind the last one; the answers' first tokens.

    Where one window is all there is, about anything in it.
    """
    vocabulary, length = tokenizer(), factor * WINDOW
    work = Long(length - 8, (task,), tokenizer=vocabulary)
    far = (one for one in work.questions("test", seed) if one.distance > WINDOW or factor == 1)
    filling, begin = prose("valid")[:length].tolist(), vocabulary.bos
    rows, answers = [], []
    for one in islice(far, QUESTIONS):
        ids = vocabulary.encode(one.prompt)[1 - length :]
        rows.append([begin, *filling[: length - 1 - len(ids)], *ids])
        answers.append(vocabulary.encode(one.answer)[0])
    return torch.tensor(rows), torch.tensor(answers)


@torch.inference_mode()
def contend(contenders: Sequence[Contender], seed: int, factors: Sequence[int] = FACTORS) -> dict[str, float]:
    """With so many windows in sight, for each the loss and the share of right answers to each task: "loss, NAME, 4"."""
    found: dict[str, float] = {}
    for factor in factors:
        tokens = texts(seed)[:, -factor * WINDOW - 1 :]
        for one in contenders:
            look, costs = one.at(factor), []
            for some in tokens.split(TOGETHER):
                logits, following = look(some[:, :-1], LAST), some[:, -LAST:]
                costs.append(cross_entropy(logits.flatten(0, 1), following.flatten()))
            found[f"loss, {one.name}, {factor}"] = float(torch.stack(costs).mean())
            for task in TASKS:
                parts = (part.split(TOGETHER) for part in questions(seed, task, factor))
                right = [look(asked, 1)[:, -1].argmax(-1) == due for asked, due in zip(*parts, strict=True)]
                found[f"{task}, {one.name}, {factor}"] = float(torch.cat(right).double().mean())
    return found


def held(contenders: Sequence[Contender], factors: Sequence[int] = FACTORS) -> dict[str, float]:
    """The bytes of each decode state after so many windows. Truncation holds one window at most."""
    found = {}
    for one in contenders:
        for factor in factors if one.model is not None else ():
            assert one.model is not None
            length = WINDOW if one.name == "truncation" else factor * WINDOW
            found[f"bytes, {one.name}, {factor}"] = float(account(one.model(factor), length).total)
    return found


@torch.inference_mode()
def timed(contenders: Sequence[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of reading 8 windows, and of each token after them, as multiples of a full cache's (interpolation)."""
    text = texts(0)[:1, : TIMED * WINDOW]
    seconds: dict[str, list[tuple[float, float]]] = {}
    models = [(one.name, one.model(TIMED)) for one in contenders if one.model is not None and one.name != "truncation"]
    for _ in range(rounds):
        for name, model in models:
            state, began = model.start(1, text.shape[1] + STEPS), time.perf_counter()
            model.read(text, state)
            read = time.perf_counter()
            for step in range(STEPS):
                model.step(text[:, step : step + 1], state)
            seconds.setdefault(name, []).append((read - began, time.perf_counter() - read))
    whole_cache = seconds["interpolation"]
    found = {}
    for name, laps in seconds.items():
        for place, what in enumerate(("reading", "a token")):
            found[f"{what}, {name}"] = [own[place] / other[place] for own, other in zip(laps, whole_cache, strict=True)]
    return found


class Given(nn.Module):
    """Logits that are known already."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits


def of_the_end(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """`answering` of what stands before the decoder at the end of each text, all before it past."""
    assert isinstance(model, Beyond)
    tokens, begin = batch["tokens"], model.chunks.start(batch["tokens"].shape[1] - 2)
    logits = model.logits(model.behind(tokens[:, :-1], begin))
    return answering(Given(logits), {"tokens": tokens[:, begin:], "answers": batch["answers"][:, begin:]})


@torch.inference_mode()
def departure(model: Beyond, seed: int) -> float:
    """The largest difference of its logits from the base's on texts that fit the window."""
    tokens = texts(seed)[:, :WINDOW]
    return max(float((model(tokens[:, :n]) - base()(tokens[:, :n])).abs().max()) for n in (1, WINDOW // 2 + 1, WINDOW))


def moved(model: Beyond) -> float:
    """The largest change of a weight of the base within the model."""
    pairs = zip(model.decoder.parameters(), base().parameters(), strict=True)
    return max(float((own - other).abs().max()) for own, other in pairs)


def differences(found: Mapping[str, Sequence[float]], what: str, first: str, second: str, factor: int) -> list[float]:
    """first - second, for each seed."""
    pairs = zip(found[f"{what}, {first}, {factor}"], found[f"{what}, {second}, {factor}"], strict=True)
    return [one - other for one, other in pairs]


def kept_exact(found: Mapping[str, Sequence[float]]) -> list[Criterion]:
    """That texts within the window are the base's business, and the base is as it was."""
    return [
        criterion(
            "within the window",
            "texts that fit the window have the very logits of the base",
            found["departure"],
            "==",
            0.0,
            essential=True,
        ),
        criterion("frozen", "no weight of the base changed in training", found["moved"], "==", 0.0, essential=True),
    ]


def beyond_criteria(over: Callable[[str, str, int], list[float]]) -> list[Criterion]:
    """What a method that reads beyond the window should be better at.

    over: (what, rival, windows) -> by how much the method's number is above the rival's, for each seed.
    """
    told = {"recall": "answers what was said", "copy": "goes on with a list that stands"}
    recalled = [
        criterion(
            f"{task}, {factor} windows",
            f"in {factor} windows it {does} behind the last one more often than truncation does",
            over(task, "truncation", factor),
            ">",
            0.0,
            essential=(task, factor) == ("recall", 4),
        )
        for task, does in told.items()
        for factor in (4, 16)
    ]
    rivals = {"interpolation": "a full cache with squeezed positions", "smaller dense model": "a smaller dense model"}
    more = [
        criterion(
            f"recall, {rival}",
            f"in 16 windows it answers what was said behind the last one more often than {what} does",
            over("recall", rival, 16),
            ">",
            0.0,
        )
        for rival, what in rivals.items()
    ]
    text = [
        criterion(
            "text, 4 windows",
            "with 4 windows of prose in sight the loss is lower than with the last one alone",
            over("loss", "truncation", 4),
            "<",
            0.0,
        ),
        criterion(
            "text, 16 windows",
            "with 16 windows of prose in sight the loss is at most that of the last one alone",
            over("loss", "truncation", 16),
            "<=",
            0.0,
        ),
        criterion(
            "text, interpolation",
            "with 16 windows in sight the loss is lower than with squeezed positions and a full cache",
            over("loss", "interpolation", 16),
            "<",
            0.0,
        ),
    ]
    return [*recalled, *more, *text]


def rows(found: Mapping[str, Sequence[float]], work: str = "long") -> list[Row]:
    """A row for each contender and number of windows."""
    grouped: dict[str, dict[str, Any]] = {}
    for name, values in found.items():
        what, *rest = name.split(", ")
        where = ", ".join([*rest[:-1], f"{rest[-1]} windows"]) if rest and rest[-1].isdigit() else ", ".join(rest)
        grouped.setdefault(where or "base within", {})[what] = spread(values)
    return [Row(work, setting, 1, numbers) for setting, numbers in grouped.items()]


def by_seed(budget: Budget, measure: Callable[[int], Mapping[str, float]], name: str) -> dict[str, list[float]]:
    """What `measure` finds, a value for each seed."""
    found: dict[str, list[float]] = {}
    for seed in budget.seeds:
        for key, value in budget.units.measure(f"{name}, seed {seed}", partial(measure, seed)).items():
            found.setdefault(key, []).append(value)
    return found
