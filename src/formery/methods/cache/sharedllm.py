"""SharedLLM: a model's own lowest layers condense past chunks into trees of keys and values, read by its lowest layers.

Han, Zhou, Poria and Yan, "Two are better than one: Context window extension with multi-grained self-injection", 2024
(section 3). The lower model, a copy of the first M layers of a short-context decoder, reads each past chunk by itself;
the upper model is the whole decoder, in whose first M layers a cross-attention follows self-attention and reads the
lower model's keys and values of the same layer ("self-injection"). A chunk is the root of a binary tree; a node is
halved into two (eq. 1 without its noise in training). From the root down the child that is more like the query is gone
into; its sibling is preserved, and of the last pair both. Likeness is the cosine of two vectors after one self-
attention, at the last token of the node and of the running text. Of a preserved node of level w, read by itself, every
α_w-th key and value is kept, α_w = 2 α_(w+1): few of much text above, many of little below. Keys of chunk i take the
position i, queries the position n behind all of them (eq. 2).

Here the query is the running text up to the token at hand, so that each token searches each tree; that is causal, and
decoding with a cache equals the pass from scratch. It means that the nodes of all levels are remembered, not only those
that one query preserves. Cross-attention and the lower copy are trained, the upper model is frozen, so that texts
within its window keep its very logits (the authors, in language modelling, train cross-attention and the upper layers
above M).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.study import grown
from formery.methods.cache.beyond_window import (
    SETTING,
    beyond_criteria,
    by_seed,
    contend,
    contender,
    departure,
    differences,
    held,
    kept_exact,
    moved,
    of_the_end,
    rivals,
    rows,
    timed,
)
from formery.methods.cache.short_window import WINDOW, base, longer, own
from formery.models import Decoder
from formery.models.beyond import Beyond, Seen
from formery.parts import Attention, Context, Part
from formery.parts.chunks import Kept
from formery.parts.condenser import Condenser
from formery.parts.crossing import Crossing
from formery.parts.grain import BlindTree, Even, Grain, Tree
from formery.parts.steered import among, attends, merged, placed, projected, steerable, sublayers, through

CHUNK, DEPTH, TREE = 64, 2, Tree()  # tokens of a chunk; layers that are injected into; what is kept


@dataclass
class Condensed(Seen):
    """Of the past: for each layer that is injected into, keys and values of all nodes; vectors of the nodes.

    Entries lie chunk by chunk, in it level by level and node by node.
    """

    entries: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    vectors: Float[Tensor, "batch chunk node width"] | None = None

    def cut(self, length: int) -> Self:
        return type(self)(self.start, self.near.cut(length), self.entries, self.vectors)

    def tensors(self) -> list[Tensor]:
        found = [*self.near.tensors(), *(one for pair in self.entries for one in pair)]
        return found if self.vectors is None else [*found, self.vectors]


class SharedLLM(Beyond):
    """lower: the layers that condense past chunks. crossings: the cross-attention of the decoder's lowest layers."""

    def __init__(self, decoder: Decoder, window: int, lower: Condenser, crossings: Sequence[Crossing]):
        super().__init__(decoder, window, lower.chunk, near=window // max(1, lower.chunk))
        self.lower, self.crossings = lower, nn.ModuleList(crossings)
        if not 0 < len(lower.layers) == len(crossings) <= len(decoder.layers):
            raise FormeryError(
                f"{len(lower.layers)} lower layers, {len(crossings)} crossings: give as many, 1 or more."
            )

    def opened(self, past: Int[Tensor, "batch past"], seen: Seen | None) -> Condensed:
        batch, number = len(past), past.shape[1] // self.chunk
        known, entries, vectors = 0, [], None
        if isinstance(seen, Condensed) and seen.vectors is not None:
            # What was taken back may have left more chunks than are past now.
            known = min(number, seen.start // self.chunk)
            slots = known * self.lower.slots
            entries, vectors = [(k[:, :slots], v[:, :slots]) for k, v in seen.entries], seen.vectors[:, :known]
        if known < number:
            made, fresh = self.lower(self.embedding, past[:, known * self.chunk :].reshape(-1, self.chunk))
            new = [(k.reshape(batch, -1, *k.shape[2:]), v.reshape(batch, -1, *v.shape[2:])) for k, v in made]
            fresh = fresh.reshape(batch, -1, *fresh.shape[1:])
            if vectors is None:
                entries, vectors = new, fresh
            else:
                pairs = zip(entries, new, strict=True)
                entries = [(torch.cat((k, key), 1), torch.cat((v, value), 1)) for (k, v), (key, value) in pairs]
                vectors = torch.cat((vectors, fresh), 1)
        return Condensed(past.shape[1], Kept(), entries, vectors)

    def advance(self, seen: Seen, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        assert isinstance(seen, Condensed)
        first = seen.near.length
        at = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        context = Context(at)

        def mix(attention: Attention, hidden: Tensor) -> Tensor:
            query, key, value = projected(attention, hidden)
            keys, values = seen.near.append(attention, placed(attention, key, at), value)
            return merged(attention, among(attention, placed(attention, query, at), keys, values))

        hidden = self.embedding(tokens, context)
        allowed: Bool[Tensor, "batch time slot"] | None = None
        number = seen.start // self.chunk
        places = torch.arange(number, device=tokens.device).repeat_interleave(self.lower.slots)
        for depth, layer in enumerate(self.decoder.layers):
            for part in sublayers(layer):
                hidden = through(part, hidden, context, mix)
                if number and depth < len(self.crossings) and attends(part):
                    if allowed is None:
                        assert seen.vectors is not None
                        allowed = self.lower.searched(hidden, seen.vectors)
                    hidden = hidden + self.crossings[depth](hidden, *seen.entries[depth], places, number, allowed)
        return hidden if self.norm is None else self.norm(hidden)


def shared(decoder: Decoder, window: int, chunk: int, depth: int, grain: Grain) -> SharedLLM:
    """The decoder within a SharedLLM whose lower model, and query maps, begin as copies of its first `depth` layers."""
    attentions = steerable(decoder.layers)
    if not 1 <= depth <= len(attentions):
        raise FormeryError(f"{depth} layers cannot be injected into: the decoder has {len(attentions)}.")
    crossings = []
    for attention in attentions[:depth]:
        query, position = attention.query.clone(), attention.position
        assert position is not None
        crossings.append(Crossing(query, attention.heads, attention.groups, position, attention.scale))
    lower = [cast(Part, layer).clone() for layer in list(decoder.layers)[:depth]]
    decoder.requires_grad_(False)
    return SharedLLM(decoder, window, Condenser(lower, grain, chunk), crossings)


@cache
def trained(seed: int, depth: int = DEPTH, grain: Grain = TREE) -> SharedLLM:
    """The base within a SharedLLM, trained on texts of 4 windows."""
    made = grown(
        f"sharedllm-{type(grain).__name__.lower()}-{depth}",
        lambda: shared(own(base()), WINDOW, CHUNK, depth, grain),
        *longer(seed),
        of_the_end,
        sources=(base,),
    )
    made.tokenizer = base().tokenizer
    return made


VARIANTS: dict[str, Callable[[int], SharedLLM]] = {
    "SharedLLM": trained,
    "no tree": lambda seed: trained(seed, grain=Even(8)),
    "blind to the query": lambda seed: trained(seed, grain=BlindTree()),
    "into 1 layer": lambda seed: trained(seed, depth=1),
    "into all layers": lambda seed: trained(seed, depth=4),
}


def measured(seed: int) -> dict[str, float]:
    """All numbers of one seed; variants in 4 and 16 windows only."""
    own_, *others = [contender(name, model(seed)) for name, model in VARIANTS.items()]
    contenders = [own_, *rivals(seed)]
    found = contend(contenders, seed) | contend(others, seed, (4, 16)) | held(contenders) | held(others, (16,))
    return found | {"departure": departure(trained(seed), seed), "moved": moved(trained(seed))}


def check(budget: Budget) -> Measured:
    """Recall behind the window and loss by context, against what is usual, a smaller model, and its own variants."""
    budget.units.expect(len(budget.seeds) + 1)
    found = by_seed(budget, measured, "trained and measured")
    contenders = [contender("SharedLLM", trained(0)), *rivals(0)]
    times = budget.units.measure("times", lambda: timed(contenders, budget.rounds))

    def over(what: str, other: str, factor: int) -> list[float]:
        return differences(found, what, "SharedLLM", other, factor)

    pairs = zip(found["bytes, SharedLLM, 16"], found["bytes, interpolation, 16"], strict=True)
    return Measured(
        [
            *kept_exact(found),
            *beyond_criteria(over),
            criterion(
                "bytes",
                "after 16 windows its decode state takes at most a third of a full cache's bytes",
                [one / whole for one, whole in pairs],
                "<=",
                1 / 3,
            ),
            criterion(
                "tree",
                "in 4 windows it answers more often than with every eighth token of a chunk, without a tree",
                over("recall", "no tree", 4),
                ">",
                0.0,
            ),
            criterion(
                "query",
                "in 4 windows it answers more often than when it always goes into the nearer half",
                over("recall", "blind to the query", 4),
                ">",
                0.0,
            ),
            criterion(
                "depth",
                "with 4 windows of prose in sight, injection into 2 layers costs at most 0.01 nats more than into 4",
                over("loss", "into all layers", 4),
                "<=",
                0.01,
            ),
            untestable(
                "benchmarks",
                "with LLaMA-2 7B, trained on 8,000 tokens, it is ahead of earlier methods on texts of 128,000",
                ">",
                0.0,
                "needs that model, 20 billion tokens to train on and a graphics card",
                essential=True,
            ),
        ],
        rows({**found, **times}),
        baseline="the same decoder on the last window of the text",
        notes=[
            *SETTING,
            f"Trees: chunks of {CHUNK} tokens, three levels that keep 1 of 16, 8 and 4; a token reads 8 entries of a "
            f"chunk. Entries of all nodes, 28 of a chunk, are remembered, since the next token may search otherwise.",
            "Each token is compared with all nodes, and its attention reads all entries under a mask: a core does not "
            "gain from those that it does not need.",
        ],
    )


PAPER = publish(
    Paper(
        slug="sharedllm",
        title="Two are better than one: Context window extension with multi-grained self-injection",
        year=2024,
        part="cache",
        domain="language",
        does="Extends a language model's context cheaply: its own first layers compress past chunks into a tree of "
        "coarse and fine keys and values, and the whole model reads those that the question needs.",
        claims="Reads far beyond its trained window with little data and computation, and fast.",
        needs="LLaMA-2 or LLaMA-3 and long documents.",
        check=check,
        works=("long",),
        name="SharedLLM",
        training="added",
        sought="extend context window of an existing LLM; compress past context; long document question answering",
        related={
            "focusllm": "long text in chunks",
            "masformer": "long context at low cost",
            "block-transformer": "coarse and fine",
        },
        added="2026-11-28",
    )
)
