"""LeanAttention: in decoding the tiles of all heads in one line, dealt out evenly, and heads merged that were cut.

Sanovar, Bharadwaj, St. Amant, Rühle and Rajmohan, "Lean Attention: Hardware-Aware Scalable Attention Mechanism for the
Decode-Phase of Transformers", 2024. One query per text gives attention few pieces of work: one for each head and text.
Where these are fewer than the workers, or of unlike lengths, workers idle. A fixed split of each head (FlashDecoding)
gives more pieces, but not as many as workers. Here worker `w` of `W` gets the tiles `w · T / W` to `(w + 1) · T / W` of
all `T`, whichever heads and texts they are of; the partial softmaxes of a head that was cut are merged.

`lean(model)` makes any model of ours with self-attention decode so, with threads for workers:

    torch.set_num_threads(1)
    texts = generate(lean(load("code"), workers=2), prompts)

The first version of the paper compares with FlashAttention-2, later ones with FlashDecoding (1.73 times on average).
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial as given
from itertools import product
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import criterion, examples, model_named, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.generate import generate
from formery.methods.runtime.layers import Shape, plain, reach
from formery.methods.runtime.schedules import Deal, check_deal, dealt, fixed_split, makespan, per_head, stream_k, tiles
from formery.models.rewrite import rewritten
from formery.parts import Attention, Mask, Part, Position, causal
from formery.parts.context import Visibility
from formery.parts.kernels import attend
from formery.parts.mixing import Mixing, recast
from formery.parts.state import KeyValues, LayerState

Whole = TypeVar("Whole", bound=nn.Module)
FEW = 16  # queries that a pass of decoding has at most, drafts too; reading a prompt leaves no worker idle


class LeanAttention(Mixing):
    """Self-attention that decodes by `stream_k`; the arguments before `workers` are those of Attention.

    workers: threads that the tiles are dealt to. tile: keys in a tile.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        position: Position | None = None,
        mask: Mask = causal,
        bias: bool = False,
        output_bias: bool | None = None,
        query_norm: Part | None = None,
        key_norm: Part | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        dropout: float = 0.0,
        workers: int = 2,
        tile: int = 256,
    ):
        super().__init__(
            width, heads, key_value_heads, head_width, position, mask, bias, output_bias, query_norm, key_norm,
            scale, soft_cap, dropout,
        )  # fmt: skip
        check_deal(workers, tile)
        self.workers, self.tile = workers, tile

    def mix(
        self,
        query: Float[Tensor, "batch head time dim"],
        key: Float[Tensor, "batch time group dim"],
        value: Float[Tensor, "batch time group dim"],
        own: LayerState,
        visibility: Visibility,
        bias: Float[Tensor, "#batch head time slot"] | None,
    ) -> Float[Tensor, "batch head time dim"]:
        assert isinstance(own, KeyValues)
        keys, values = own.append(key, value)
        time, slots, allowed = query.shape[2], own.slots.filled, None
        if time > FEW:
            return attend(query, keys, values, visibility, bias, self.scale, self.soft_cap)
        if visibility.causal or visibility.allowed is not None:
            allowed = visibility.tensor(time, slots, query.device)
        lengths, sees = own.slots.used, (allowed, bias, self.scale, self.soft_cap)
        return dealt(stream_k, query, keys, values, lengths, self.workers, self.tile, *sees)


def lean(model: Whole, workers: int = 2, tile: int = 256) -> Whole:
    """The model with the same weights, whose self-attention decodes with so many threads in tiles of so many keys.

    Raises FormeryError for a model without self-attention, or with one that attends in a way of its own, and for
    workers or a tile below 1.
    """
    return rewritten(model, Attention, lambda part, _: recast(part, LeanAttention, workers=workers, tile=tile))


DEALS: dict[str, Deal] = {"per head": per_head, "fixed split": fixed_split, "stream-K": stream_k}
UNITS, TILE = 108, 256  # multiprocessors of an A100; keys in a tile
HEADS, BATCHES, CONTEXTS = (8, 16, 32, 64), (1, 4, 16), (*(1024 * 4**n for n in range(5)), 512 * 1024)
OVERHEADS = (0.0, 0.25)  # of a tile's time, to begin a span and to merge two partials: none, and an assumption
LONG, PROMPTS = 65536, 3
LAYERS = {  # by name the key heads and the lengths of texts that threads attend to
    "1 head": (1, (LONG,)),
    "3 heads": (3, (LONG,)),
    "3 heads, ragged": (3, (LONG, LONG // 16, LONG // 3, LONG // 64)),
}


def exactness(seed: int) -> dict[str, float]:
    """By deal the largest difference from plain attention, over the largest value: ragged texts, 1 to 9 workers."""
    draw = random.Random(seed)
    found = dict.fromkeys(DEALS, 0.0)
    for workers in range(1, 10):
        lengths = [draw.randint(1, 3000) for _ in range(draw.randint(1, 4))]
        groups = draw.choice((1, 2, 3))
        layer = Shape(groups * draw.choice((1, 4)), groups).drawn(max(lengths), seed, len(lengths))
        wanted = plain(*layer, reach(lengths))
        for name, deal in DEALS.items():
            made = dealt(deal, *layer, lengths, workers, draw.choice((16, 256)))
            found[name] = max(found[name], float((made - wanted).abs().max() / layer[-1].abs().max()))
    return found


def modelled(seeds: Sequence[int]) -> list[dict[str, Any]]:
    """For each number of heads, texts and keys, texts of one length and of unlike ones: when each deal is done."""
    found = []
    for heads, batch, context in product(HEADS, BATCHES, CONTEXTS):
        lots = [[context] * batch, *([random.Random(seed).randint(1, context) for _ in range(batch)] for seed in seeds)]
        for counts in (tiles(lengths, TILE) for lengths in lots):
            schedules = {name: deal(counts, heads, UNITS) for name, deal in DEALS.items()}
            most = max(sum(map(len, spans)) for spans in schedules["stream-K"])
            for overhead in OVERHEADS:
                spans = {name: makespan(one, overhead) for name, one in schedules.items()}
                which = {"heads": heads, "batch": batch, "context": context, "overhead": overhead}
                found.append({**which, **spans, "over even": most - sum(counts) * heads / UNITS})
    return found


@contextmanager
def threads(number: int) -> Iterator[None]:
    """PyTorch computes with so many threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def raced(groups: int, lengths: Sequence[int], seed: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each deal with one thread and with two, and of PyTorch's own attention, in interleaved rounds."""
    query, keys, values = Shape(groups, groups).drawn(max(lengths), seed, len(lengths))
    runs: dict[str, tuple[int, Callable[[], Tensor]]] = {}
    for workers, number in ((1, "one thread"), (2, "two threads")):
        for name, deal in DEALS.items():
            runs[f"{name}, {number}"] = 1, given(dealt, deal, query, keys, values, lengths, workers, TILE)
        runs[f"PyTorch, {number}"] = workers, given(attend, query, keys, values, reach(lengths))
    laps: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(rounds + 1):  # of which the first warms up
        for turn in range(len(runs)):
            name, (count, run) = [*runs.items()][(lap + turn) % len(runs)]
            with threads(count):
                began = time.perf_counter()
                run()
                laps[name].append(time.perf_counter() - began)
    return {name: found[1:] for name, found in laps.items()}


def texts(seeds: Sequence[int], number: int, tokens: int) -> dict[str, float]:
    """The share of texts of the model `code` that are the same with its attention dealt out to 1, 2 and 5 threads."""
    model = model_named("code")
    prompts = [one.prompt for seed in seeds for one in examples("code", number, seed)]
    wanted = [one.tokens for one in generate(model, prompts, max_new_tokens=tokens)]
    found = {}
    for workers in (1, 2, 5):
        own = generate(lean(model, workers, tile=32), prompts, max_new_tokens=tokens)
        found[str(workers)] = sum(a.tokens == b for a, b in zip(own, wanted, strict=True)) / len(wanted)
    return found


@torch.inference_mode()
def check(budget: Budget) -> Measured:
    """Three deals of the same work: exact, how long they should take with many workers, and take with two threads."""
    units, seeds = budget.units, budget.seeds
    units.expect(2 + len(seeds) * (1 + len(LAYERS)))
    exact = [units.measure(f"exactness, seed {seed}", given(exactness, seed)) for seed in seeds]
    model = units.measure("schedules", lambda: {"found": modelled(seeds)})["found"]
    same = units.measure("texts", given(texts, seeds, min(budget.examples, PROMPTS), budget.max_new_tokens))
    laps = {
        name: [units.measure(f"{name}, seed {seed}", given(raced, *layer, seed, budget.rounds)) for seed in seeds]
        for name, layer in LAYERS.items()
    }

    def gains(over: str, overhead: float, longest: bool = False) -> list[float]:
        some = [one for one in model if one["overhead"] == overhead]
        return [one[over] / one["stream-K"] for one in some if not longest or one["context"] == CONTEXTS[-1]]

    def means(over: str) -> list[float]:
        return [statistics.mean(gains(over, overhead)) for overhead in OVERHEADS]

    def times(layer: str) -> list[float]:
        upper, lower = "per head, two threads", "stream-K, two threads"
        return [a / b for one in laps[layer] for a, b in zip(one[upper], one[lower], strict=True)]

    return Measured(
        [
            criterion(
                "exact",
                "attention dealt out to 1 to 9 workers is plain attention, to 1e-6 of the largest value in float32",
                [error for one in exact for error in one.values()],
                "<=",
                1e-6,
                True,
            ),
            criterion("tokens", "a model that decodes so writes the very tokens", [*same.values()], "==", 1.0, True),
            criterion(
                "level",
                "no worker has a whole tile more than its even share",
                [one["over even"] for one in model],
                "<",
                1.0,
                True,
            ),
            criterion(
                "modelled mean",
                f"of {UNITS} workers the last is done 2.6 times sooner than with heads dealt whole, on average",
                means("per head"),
                ">=",
                2.6,
            ),
            criterion(
                "modelled most",
                f"with {CONTEXTS[-1]} keys up to 8.33 times sooner",
                [max(gains("per head", overhead, longest=True)) for overhead in OVERHEADS],
                ">=",
                8.33,
            ),
            criterion(
                "modelled never slower",
                "with no heads, texts or lengths is the last worker done later than with heads dealt whole",
                [gain for overhead in OVERHEADS for gain in gains("per head", overhead)],
                ">=",
                1.0,
            ),
            criterion(
                "modelled over fixed split",
                "nor on average later than with every head in as many pieces",
                means("fixed split"),
                ">=",
                1.0,
            ),
            criterion(
                "time here",
                "with two threads and three heads stream-K is faster than heads dealt whole",
                times("3 heads"),
                ">",
                1.0,
            ),
            criterion(
                "time here, ragged",
                "so it is with texts of unlike lengths",
                times("3 heads, ragged"),
                ">",
                1.0,
            ),
            untestable(
                "time",
                "2.6 times faster on average than FlashAttention-2, in kernels of a graphics card",
                ">=",
                2.6,
                "needs such kernels and a card to run them on",
                essential=True,
            ),
        ],
        [*model_rows(model), *time_rows(laps)],
        baseline="heads dealt whole (FlashAttention-2), every head in as many pieces (FlashDecoding), plain attention",
        models=["code"],
        notes=[
            f"Modelled times are in units of what a worker takes for a tile of {TILE} keys. To begin a span, and to "
            f"merge two partial softmaxes, takes nothing, or {OVERHEADS[-1]} of that, which is assumed; a mean is of "
            "all heads, texts and keys of the table, as many with texts of one length as for each seed of unlike ones.",
            f"Each of {UNITS} workers, as many as an A100 has, looks at one span at a time; what they share, memory "
            "above all, is left out, and so is all that makes one kernel faster than another.",
            "Two threads are weak evidence: with three heads dealt whole, one of them idles for half of the time that "
            "the other takes. A span is looked at in one go, so that threads have few and large pieces.",
            "PyTorch's own attention deals out rows and heads, and looks at the padding of shorter rows too.",
        ],
    )


def model_rows(model: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """How much sooner stream-K's last worker is done: by heads and texts, and by keys."""
    kinds = (("heads", "batch"), ("context",))
    for names in kinds:
        for key in dict.fromkeys(tuple(one[name] for name in names) for one in model):
            some = [one for one in model if tuple(one[name] for name in names) == key]
            gains = {f"over {name}": spread(one[name] / one["stream-K"] for one in some) for name in [*DEALS][:2]}
            if names == ("context",):
                yield Row(f"{key[0]} keys", "modelled, all heads and texts", 1, gains)
            else:
                yield Row("all numbers of keys", f"modelled, {key[0]} heads", key[1], gains)


def time_rows(laps: Mapping[str, Sequence[Mapping[str, Sequence[float]]]]) -> Iterator[Row]:
    """A row for each layer and way: milliseconds, and how much faster than PyTorch's own with as many threads."""
    for layer, found in laps.items():
        for name in found[0]:
            peer = f"PyTorch, {name.rpartition(', ')[2]}"
            times = [1e3 * lap for one in found for lap in one[name]]
            gains = [b / a for one in found for a, b in zip(one[name], one[peer], strict=True)]
            yield Row(
                layer, name, len(LAYERS[layer][1]), {"milliseconds": spread(times), "over PyTorch": spread(gains)}
            )


PAPER = publish(
    Paper(
        slug="leanattention",
        title="Lean Attention: Hardware-Aware Scalable Attention Mechanism for the Decode-Phase of Transformers",
        year=2024,
        part="runtime",
        domain="hardware",
        does="Speeds up attention while decoding with long contexts: the work of all heads is dealt out evenly in "
        "tiles, and partial softmaxes are merged where a head was split, so that no core idles.",
        claims="2.6 times faster than FlashAttention-2 on average in decoding, up to 8.33 times at 512,000 tokens.",
        needs="A GPU for the factor.",
        name="LeanAttention",
        training="none",
        sought="GPU underused when decoding long contexts with few heads; flash-decoding alternative; stream-K",
        related={
            "tree-attention": "partial softmaxes merged",
            "fusemax": "online softmax",
            "bytetransformer": "attention for ragged lengths",
            "long-context-attention-benchmark": "kernels for long contexts",
        },
        added="2026-11-28",
        check=check,
        works=("code",),
    )
)
