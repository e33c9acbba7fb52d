"""RetNet: retention in the place of attention, trained in parallel and decoded with a memory of fixed size.

Sun, Dong, Huang, Ma, Xia, Xue, Wang and Wei, "Retentive Network: A Successor to Transformer for Large Language Models",
2023. The mixer, `parts/mixers/retention.py`, has the paper's three forms (equations 5 to 7), which are equal, heads
that fade at rates of their own, a norm over each head and a gate (equation 8). Values are twice as wide as the model,
and the feed-forward is narrower for it, so that a layer has as many weights as a Transformer's.

The paper reports that from 2 billion parameters on RetNet has the lower perplexity, and that at 8,192 tokens a model
of 7 billion decodes 8.4 times faster and with 70% less memory than a Transformer. Here small ones of equal size are
trained on prose. That a memory of fixed size holds only so much is measured apart from training: how many of n random
pairs can be read back from one head, against attention.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formery.data.batching import WindowBatches
from formery.data.long_text import VOCABULARY, prose
from formery.evidence.accounting import CHUNK, account, layer_bytes
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import grown, losses
from formery.models import Decoder
from formery.models.compose import language_model
from formery.parts import Embedding, GatedMLP, Layer, PreNorm, RMSNorm, Rotary, State, TiedOutput
from formery.parts.mixers.retention import Retention, ages_of, chunkwise, parallel, recurrent
from formery.parts.order import Chain
from formery.train.plan import Plan

SIZES = {"0.15 M": (48, 2, 2), "0.5 M": (96, 3, 4)}  # width, layers, heads
LARGEST = "0.5 M"
WINDOW, ROWS, STEPS = 256, 8, 150  # tokens of a window, windows of a batch, batches
CONTEXTS = (128, 512, 2048, 8192)
WRITTEN, REACH = 16, 16  # tokens that are timed; that a state can take back
PAIRS = (8, 32, 128)


def retnet(
    vocabulary: int, width: int, layers: int, heads: int, hidden: int, max_length: int | None = None, reach: int = 64
) -> Decoder:
    """A decoder with retention in the place of attention, otherwise as `language_model`."""
    embedding = Embedding(vocabulary, width)
    position = Rotary()

    def layer() -> Layer:
        retention = Retention(width, heads, position=position, reach=reach)
        return Layer([PreNorm(RMSNorm(width), retention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])

    return Decoder(embedding, [layer() for _ in range(layers)], RMSNorm(width), TiedOutput(embedding), max_length)


def make(kind: str, size: str) -> Decoder:
    """A RetNet, or a Transformer with as many weights, or that with one head of keys and values ("narrow")."""
    width, layers, heads = SIZES[size]
    if kind == "retnet":
        return retnet(VOCABULARY, width, layers, heads, 4 * width // 3, 2 * CONTEXTS[-1], REACH)
    groups = 1 if kind == "narrow" else heads
    return language_model(VOCABULARY, width, layers, heads, groups, 8 * width // 3, 2 * CONTEXTS[-1])


def trained(kind: str, size: str, seed: int) -> Decoder:
    """Such a model, trained on prose from that seed."""
    plan = Plan(STEPS, 4e-3, warmup=15, evaluate_every=STEPS, checkpoint_every=50, seed=seed, label=f"{kind} {size}")
    return grown(f"retnet/{kind}", partial(make, kind, size), WindowBatches(prose("train"), WINDOW, ROWS, seed), plan)


def held_out(kind: str, size: str, seed: int) -> dict[str, float]:
    """The loss on held-out prose: of all tokens, and of those in the second half of a window."""
    found = losses(trained(kind, size, seed), WindowBatches(prose("valid"), WINDOW, ROWS), 4)
    return {"loss": float(found.mean()), "late loss": float(found[:, WINDOW // 2 :].mean())}


def apart(seed: int, time: int = 200, heads: int = 3) -> dict[str, float]:
    """How far the three forms are apart, relative to the largest value, in outputs and in gradients."""
    draw = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, time, heads, one, generator=draw).requires_grad_() for one in (16, 16, 32))
    rates = Retention(3 * 16, heads).rates(key.device)
    ages, sequences = ages_of(Chain([time] * 2), key)
    memory, lower = torch.zeros(2, heads, 16, 32), torch.ones(1, time, time, dtype=torch.bool).tril()
    outputs = [
        parallel(query, key, value, rates, ages, lower),
        recurrent(query, key, value, rates, memory)[0],
        *(chunkwise(query, key, value, rates, memory, ages, sequences, chunk)[0] for chunk in (16, 64)),
    ]
    toward = torch.randn(outputs[0].shape, generator=draw)
    gradients = [torch.autograd.grad((one * toward).sum(), (query, key, value)) for one in outputs]
    slopes = [torch.cat([one.flatten() for one in some]) for some in gradients]

    def furthest(values: Sequence[Tensor]) -> float:
        return max(float((one - values[0]).abs().max() / values[0].abs().max()) for one in values[1:])

    return {"outputs apart": furthest([one.detach() for one in outputs]), "gradients apart": furthest(slopes)}


def read_back(pairs: int, seed: int, key: int = 24, value: int = 48, trials: int = 64) -> dict[str, float]:
    """The share of `pairs` random pairs whose value is found again by its key, from a memory and by attention.

    Keys and values have the widths of a head of the larger model; the value nearest to what was read counts as found.
    The memory does not fade, so that it is only its size that counts; attention is as sharp as training could make it.
    """
    draw = torch.Generator().manual_seed(1000 * seed + pairs)
    keys, values = (torch.randn(trials, pairs, width, generator=draw) for width in (key, value))
    keys = torch.nn.functional.normalize(keys, dim=-1)
    memory = torch.einsum("bmk,bmv->bkv", keys, values)
    sharp = (64 * keys @ keys.mT).softmax(-1)
    found = {"found in a memory": keys @ memory, "found by attention": sharp @ values}
    target = torch.arange(pairs)
    return {
        name: float(((read @ values.mT - values.square().sum(-1)[:, None] / 2).argmax(-1) == target).double().mean())
        for name, read in found.items()
    }


def filled(model: Decoder, length: int) -> State:
    """A state that has read so many random tokens, the last one by itself, as while decoding."""
    tokens = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(0))
    state = model.start(1, length + WRITTEN)
    for piece in [*tokens[:, :-1].split(CHUNK, 1), tokens[:, -1:]]:
        model.read(piece, state)
    return state


@torch.inference_mode()
def decoding(budget: Budget) -> dict[str, Any]:
    """Bytes of states while decoding, and tokens a second in interleaved rounds, against the tokens read before."""
    models = {kind: make(kind, LARGEST).eval() for kind in ("retnet", "transformer")}
    found: dict[str, Any] = {}
    states = {(kind, length): filled(model, length) for kind, model in models.items() for length in CONTEXTS}
    for (kind, length), state in states.items():
        found[f"{kind} {length}"] = {"bytes of layers": sum(layer_bytes(state)), "tokens a second": []}
    for _ in range(budget.rounds):
        for (kind, length), state in states.items():
            began = time.perf_counter()
            for _ in range(WRITTEN):
                models[kind].step(torch.zeros(1, 1, dtype=torch.long), state)
            found[f"{kind} {length}"]["tokens a second"].append(WRITTEN / (time.perf_counter() - began))
            state.rollback([length])
    return found


def check(budget: Budget) -> Measured:
    """Equal forms, decoding against the context, models of equal size trained alike, and what a memory holds."""
    kinds = [(kind, size) for size in SIZES for kind in ("retnet", "transformer")] + [("narrow", LARGEST)]
    budget.units.expect(2 + len(budget.seeds) * (len(kinds) + len(PAIRS)))

    def forms() -> dict[str, list[float]]:
        each = [apart(seed) for seed in budget.seeds]
        return {name: [one[name] for one in each] for name in each[0]}

    equal, speed = budget.units.measure("forms", forms), budget.units.measure("decoding", partial(decoding, budget))
    found: dict[str, list[float]] = {}
    for seed in budget.seeds:
        for kind, size in kinds:
            unit = budget.units.measure(f"{kind} {size}, seed {seed}", partial(held_out, kind, size, seed))
            for name, value in unit.items():
                found.setdefault(f"{kind} {size}: {name}", []).append(value)
        for pairs in PAIRS:
            unit = budget.units.measure(f"{pairs} pairs, seed {seed}", partial(read_back, pairs, seed))
            for name, value in unit.items():
                found.setdefault(f"{pairs} pairs: {name}", []).append(value)

    def less(first: str, other: str) -> list[float]:
        return [one - two for one, two in zip(found[first], found[other], strict=True)]

    def rate(kind: str, length: int) -> list[float]:
        return list(speed[f"{kind} {length}"]["tokens a second"])

    def held(kind: str, length: int) -> float:
        return float(speed[f"{kind} {length}"]["bytes of layers"])

    def share(pairs: int) -> list[float]:
        both = (found[f"{pairs} pairs: found {how}"] for how in ("in a memory", "by attention"))
        return [one / two for one, two in zip(*both, strict=True)]

    first, last, loss = CONTEXTS[0], CONTEXTS[-1], "loss"
    ratio = [one / two for one, two in zip(rate("retnet", last), rate("transformer", last), strict=True)]
    steady = [one / two for one, two in zip(rate("retnet", last), rate("retnet", first), strict=True)]
    criteria = [
        criterion("outputs", "the three forms are at most 1e-5 apart", equal["outputs apart"], "<=", 1e-5, True),
        criterion("gradients", "and so are their gradients", equal["gradients apart"], "<=", 1e-5, True),
        criterion(
            "memory", "a state after 8,192 tokens holds as many bytes in its layers as after 128",
            [held("retnet", last) / held("retnet", first)], "==", 1.0,
        ),
        criterion("latency", "it decodes at least 0.8 as fast after 8,192 tokens as after 128", steady, ">=", 0.8),
        criterion("speed", "after 8,192 tokens it decodes faster than a Transformer of equal size", ratio, ">", 1.0),
        *(
            criterion(
                f"loss, {size}", "the held-out loss is at most 0.02 nats above that of a Transformer of equal size",
                less(f"retnet {size}: {loss}", f"transformer {size}: {loss}"), "<=", 0.02,
            )
            for size in SIZES
        ),
        criterion(
            "small cache", "the loss is below that of a Transformer whose keys and values are cut to one head",
            less(f"retnet {LARGEST}: {loss}", f"narrow {LARGEST}: {loss}"), "<", 0.0,
        ),
        *(
            criterion(
                f"recall, {pairs} pairs", "a head's memory gives back at least 0.95 of what attention does",
                share(pairs), ">=", 0.95,
            )
            for pairs in PAIRS
        ),
        untestable(
            "scale", "from 2 billion parameters on its perplexity is below a Transformer's", "<=", 0.0,
            "needs training models of 1 to 7 billion parameters", essential=True,
        ),
    ]  # fmt: skip
    rows = [Row("prose", name, 1, {"value": spread(values)}) for name, values in found.items()]
    rows += [
        Row("random tokens", name, 1, {
            "bytes of layers": spread([unit["bytes of layers"]]), "tokens a second": spread(unit["tokens a second"]),
        })
        for name, unit in speed.items()
    ]  # fmt: skip
    for kind in ("retnet", "transformer", "narrow"):
        held_by = account(make(kind, LARGEST).eval(), WINDOW)
        row = {"total bytes": spread([held_by.total]), "bytes of layers": spread([sum(held_by.layers)])}
        rows.append(Row("random tokens", f"{kind} {LARGEST}, after one pass of {WINDOW} tokens", 1, row))
    return Measured(criteria, rows, baseline="Transformers of equal size and training", notes=NOTES)


NOTES = [
    f"Sizes are parameters. Each model learned from {STEPS} batches of {ROWS} windows of {WINDOW} tokens: little.",
    "What a RetNet state holds beside its memory (a second copy of it, and the inputs of the last tokens) is there so "
    f"that {REACH} tokens can be taken back: half of it at least. While decoding it is as large as the keys and values "
    "of 96 tokens of the Transformer, or of 384 of the one with a single head of them; right after a long pass the "
    "inputs of all of it are held. Book-keeping of 8 bytes a token, the same for all, is in the total only.",
    "The Transformer's steps run in compiled kernels, the RetNet's in PyTorch, some 30 small operations a layer: on a "
    "processor that costs more than the keys and values that it saves, until the context is long.",
    "Recall is of random pairs in one head, without training: a Transformer of 0.2 M parameters answered 1% of the "
    "work `long` (recall) after 400 steps, so that at this budget recall that was learned cannot be compared.",
]

PAPER = publish(
    Paper(
        slug="retnet",
        title="Retentive Network: A Successor to Transformer for Large Language Models",
        year=2023,
        part="attention",
        domain="language",
        does="Replaces attention by retention, which can be computed in parallel for training, step by step with a "
        "state of fixed size for decoding, or chunk by chunk for long texts, with the same result.",
        claims="Scales like a transformer, trains in parallel, and decodes with constant memory and time a token.",
        needs="1 to 7 billion parameters for the claim on scale.",
        name="RetNet",
        training="whole",
        sought="linear-time alternative to the transformer; recurrent inference with constant memory; train in "
        "parallel",
        related={
            "rmt": "decay with distance",
            "atlas": "recurrence in place of attention",
            "apriel-h1": "state-space layers in place of attention",
            "tova": "a state that does not grow",
            "stree": "drafts through recurrent states",
        },
        added="2026-11-28",
        check=check,
    )
)
