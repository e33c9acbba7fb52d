"""Tree Attention: keys and values of one text on several devices, whose partial softmaxes are merged along a tree.

Shyam, Pilault, Shepperd, Anthony and Millidge, "Tree Attention: Topology-aware Decoding for Long-Context Attention on
GPU clusters", 2024. Attention is the gradient of an energy with respect to a source, taken at `source = 0`:

    energy(source) = log Σ_a exp(query · key_a + source · value_a)

and log-sum-exp is associative. So each process looks at its own keys only, and tells the others no more than its
`maximum`, `denominator` and `numerator` (`parts/kernels/partial.py`); after `log2(processes)` exchanges, each with the
process whose rank differs in one bit, all of them hold the same whole answer. A message is as long for a million keys
as for ten. The baseline (`ring.py`) passes keys and values themselves around.

`spread(model)` makes any model of ours with self-attention decode so, with every method of `generate` whose choices
follow from the tokens alone. Under `torchrun --nproc-per-node=4 write.py` this writes what one process writes, each
process with a quarter of the cache:

    world()
    texts = generate(spread(load("code")), prompts)

The processes must compute the same bits from the same numbers, as those of machines of one kind do. Where drafts are as
long as a clock says (`adapt`), they would differ from process to process: leave that off.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial as given
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row
from formery.evidence.measured import spread as spread_of
from formery.evidence.paper import Paper, publish
from formery.methods.runtime.layers import Shape, plain
from formery.methods.runtime.over_processes import Measurement, Way, over_processes
from formery.methods.runtime.ring import RingAttention, around
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.kernels.partial import Partial, merge, partial
from formery.parts.messages import Messages
from formery.parts.mixing import recast
from formery.parts.spread import Share, SpreadAttention

Whole = TypeVar("Whole", bound=nn.Module)


def energy(
    query: Float[Tensor, "batch head time key"],
    key: Float[Tensor, "batch group slot key"],
    value: Float[Tensor, "batch group slot value"],
    source: Float[Tensor, "batch head time value"],
) -> Float[Tensor, "batch head time"]:
    """`log Σ exp(query · key / sqrt(key width) + source · value)`: its gradient at `source = 0` is attention."""
    key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], 1) for one in (key, value))
    return partial(query, key, value, bias=source @ value.transpose(-1, -2)).log_sum_exp


def all_merged(own: Partial, line: Messages) -> Partial:
    """The merge of what all processes have, the same bits in each, in `log2(processes)` exchanges.

    Both sides of an exchange merge the lower ranks' part with the higher ranks', so they get the same. Processes beyond
    a power of two hand their part to another first and are told the result at the end: two steps more.
    """
    rank, size = line.rank, line.size
    whole = 1 << (size.bit_length() - 1)
    packed = own.packed()
    if rank >= whole:
        line.send([packed], rank - whole)
        line.receive([packed], rank - whole)
        return Partial.unpacked(packed)
    if rank + whole < size:
        other = torch.empty_like(packed)
        line.receive([other], rank + whole)
        packed = merge(Partial.unpacked(packed), Partial.unpacked(other)).packed()
    for bit in range(whole.bit_length() - 1):
        other = torch.empty_like(packed)
        line.exchange([packed], rank ^ 1 << bit, [other], rank ^ 1 << bit)
        lower, higher = (other, packed) if rank >> bit & 1 else (packed, other)
        packed = merge(Partial.unpacked(lower), Partial.unpacked(higher)).packed()
    if rank + whole < size:
        line.send([packed], rank + whole)
    return Partial.unpacked(packed)


def along_tree(share: Share) -> Float[Tensor, "batch head time value"]:
    """Attention to the keys of all processes, the same bits in each."""
    return all_merged(share.own(), share.line).value


class TreeAttention(SpreadAttention):
    """Self-attention whose partial softmaxes are merged along a tree."""

    def together(self, share: Share) -> Float[Tensor, "batch head time dim"]:
        return along_tree(share)


def spread(model: Whole, kind: type[SpreadAttention] = TreeAttention) -> Whole:
    """The model with the same weights, whose decode states are spread over the processes that have met (or `through`).

    All processes of the group call the same with the same prompts. What has no decode state runs as before, in each.
    Raises FormeryError for a model without self-attention, or with one that attends in a way of its own.
    """
    return rewritten(model, Attention, lambda part, _: recast(part, kind))


SHAPE, SIZES, CONTEXTS, PROMPTS = Shape(), (2, 4, 8), (1024, 8192, 65536), 3
LONGEST = CONTEXTS[-1]
WAYS = {"tree": Way(along_tree, TreeAttention, at_all=False), "ring": Way(around, RingAttention, at_all=True)}


def formula(one: Measurement) -> dict[str, int]:
    """The bytes that all processes send for one query of one layer, and the steps that this takes."""
    size, rounds = one["size"], int(math.log2(one["size"]))
    if one["way"] == "tree":
        return {"sent": size * rounds * SHAPE.heads * (SHAPE.dim + 2) * 4, "steps": rounds}
    return {"sent": (size - 1) * one["context"] * 2 * SHAPE.groups * SHAPE.dim * 4, "steps": size - 1}


@torch.enable_grad()
def gradient(seed: int) -> float:
    """The largest difference between the energy's gradient and attention, in float64."""
    query, keys, values = (one.double() for one in SHAPE.drawn(512, seed))
    source = torch.zeros(query.shape, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(energy(query, keys, values, source).sum(), source)
    return float((found - plain(query, keys, values)).abs().max())


def check(budget: Budget) -> Measured:
    """The tree and the ring over 2, 4 and 8 processes: exact, and what each sends, holds and takes."""
    units, seeds = budget.units, budget.seeds
    units.expect(1 + len(SIZES))
    gradients = units.measure("gradient of the energy", lambda: {"error": [gradient(seed) for seed in seeds]})
    settings = (WAYS, SHAPE, CONTEXTS, seeds, budget.rounds, min(budget.examples, PROMPTS), budget.max_new_tokens)
    found = [units.measure(f"{size} processes", given(over_processes, size, *settings)) for size in SIZES]
    layers = [one for some in found for one in some["layers"]]
    texts = [one for some in found for one in some["texts"]]
    trees, rings = ([one for one in layers if one["way"] == way] for way in WAYS)
    pairs = list(zip(trees, rings, strict=True))
    longest = [pair for pair in pairs if pair[0]["context"] == LONGEST]

    def over_formula(name: str) -> list[float]:
        return [one[name] / formula(one)[name] for one in layers]

    return Measured(
        [
            criterion(
                "gradient",
                "the energy's gradient is attention, to 1e-10 in float64",
                gradients["error"],
                "<=",
                1e-10,
                True,
            ),
            criterion(
                "exact",
                "attention by tree and by ring is plain attention, to 1e-6 in float32",
                [one["error"] for one in layers],
                "<=",
                1e-6,
                True,
            ),
            criterion(
                "alike",
                "all processes have the same bits of the answer",
                [one["alike"] for one in layers],
                "==",
                1.0,
                True,
            ),
            criterion(
                "tokens",
                "a model spread over the processes writes the very tokens of one process",
                [one["same"] for one in texts],
                "==",
                1.0,
                True,
            ),
            criterion("bytes", "bytes sent, counted, are as many as the formulae say", over_formula("sent"), "==", 1.0),
            criterion(
                "steps", "steps, counted, are log2(p) by tree and p - 1 by ring", over_formula("steps"), "==", 1.0
            ),
            criterion(
                "volume",
                "the ring sends more bytes than the tree, with every context and number of processes",
                [ring["sent"] / tree["sent"] for tree, ring in pairs],
                ">",
                1.0,
                True,
            ),
            criterion(
                "memory",
                f"with {LONGEST} keys a process holds at most half of what it holds with the ring (and 5 % of that)",
                [tree["held"] / ring["held"] for tree, ring in longest],
                "<=",
                0.525,
            ),
            criterion(
                "time here",
                f"with {LONGEST} keys the tree is faster than the ring, on this machine",
                [b / a for tree, ring in longest for a, b in zip(tree["seconds"], ring["seconds"], strict=True)],
                ">",
                1.0,
            ),
            untestable(
                "time",
                "up to 8 times faster than the ring over the graphics cards of a cluster",
                ">=",
                8.0,
                "needs several graphics cards and the links between them",
                essential=True,
            ),
        ],
        [*layer_rows(layers), *text_rows(texts, found[0]["plain"])],
        baseline="Ring Attention over the same processes, and plain attention in one process",
        models=["code"],
        notes=notes(found),
    )


def notes(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers mean."""
    line = "; ".join(
        f"{size} processes {1e3 * one['step']:.3g} ms a step and {1e9 * one['byte']:.3g} ns a byte"
        for size, one in zip(SIZES, found, strict=True)
    )
    return [
        f"One layer, one text: {SHAPE.heads} heads, {SHAPE.groups} of them for keys and values, of {SHAPE.dim} numbers "
        "in float32. Bytes and steps are those of one query, of all processes together.",
        "The paper counts, for each device and text, 2 (p - 1) / p (b d + 2 b heads) numbers by tree, as NCCL reduces, "
        "and 2 p b t d by ring, whose shares come home again. Here the tree exchanges, which takes half the steps for "
        "somewhat more bytes, and the ring stops one step earlier.",
        "A ring of more than two processes holds a third share here, which arrives while another leaves; one that lets "
        "its own share travel holds two, as in the paper, and takes one step more.",
        "Times are of processes of one thread that share the cores of one machine, from a common beginning to the last "
        "one's end; where processes are more than cores they wait for each other.",
        f"Modelled times are those of a look at a share, the steps and the bytes, each measured by itself: {line}.",
    ]


def layer_rows(layers: Sequence[Measurement]) -> Iterable[Row]:
    """A row for each context, number of processes and way, over seeds and rounds."""
    kinds = dict.fromkeys((one["context"], one["size"], one["way"]) for one in layers)
    for context, size, way in kinds:
        some = [one for one in layers if (one["context"], one["size"], one["way"]) == (context, size, way)]
        numbers = {
            "bytes sent": [one["sent"] for one in some],
            "steps": [one["steps"] for one in some],
            "bytes held by a process": [one["held"] for one in some],
            "milliseconds": [1e3 * lap for one in some for lap in one["seconds"]],
            "modelled milliseconds": [1e3 * one["model_seconds"] for one in some],
            "milliseconds in one process": [1e3 * lap for one in some for lap in one["alone_seconds"]],
        }
        spreads = {name: spread_of(values) for name, values in numbers.items()}
        yield Row(f"{context} keys", f"{way}, {size} processes", 1, spreads)


def text_rows(texts: Sequence[Measurement], whole: float) -> Iterable[Row]:
    """The bytes of a process's decode state for each token read, and how many texts are those of one process."""
    yield Row("code", "one process", 1, {"state bytes a token": spread_of([whole])})
    for one in texts:
        numbers = {"state bytes a token": one["bytes_a_token"], "same texts": one["same"]}
        yield Row("code", f"{one['way']}, {one['size']} processes", 1, {n: spread_of([v]) for n, v in numbers.items()})


PAPER = publish(
    Paper(
        slug="tree-attention",
        title="Tree Attention: Topology-aware Decoding for Long-Context Attention on GPU clusters",
        year=2024,
        part="runtime",
        domain="general",
        does="Decodes one long text on several devices: each attends to its own share of the keys and values, and the "
        "partial softmaxes are merged along a tree, in logarithmically many steps rather than around a ring.",
        claims="Up to 8 times faster than ring attention across devices, with less communication and half the peak "
        "memory.",
        needs="Several GPUs for the time saved.",
        name="Tree Attention",
        training="none",
        sought="attention over many GPUs for one long sequence; faster than ring attention; reduce communication",
        related={
            "leanattention": "partial softmaxes merged",
            "fusemax": "softmax in one pass",
            "long-context-attention-benchmark": "attention over several devices",
            "unified-long-sequence-view": "attention spread over GPUs",
        },
        added="2026-11-28",
        check=check,
        works=("code",),
    )
)
