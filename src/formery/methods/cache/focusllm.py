"""FocusLLM: every chunk of a long text is read with the present question behind it, and says in one token what it has.

Li, Zhang, Pan, Sun, Duan, Fang, Han, Wang and Wang, "FocusLLM: Scaling LLM's Context by Parallel Decoding", 2024. The
text before the local context is cut into chunks. The local context is appended to each of them, and a frozen decoder
reads all in parallel. The last token of each, the candidate, has query, key, value and output maps of its own, which
begin as copies and alone are trained; its keys and values in each layer are what the chunk has to say. Those of all
chunks, in their order and at positions 0, 1, …, stand before the local context, which begins at the position behind
them, and the frozen decoder predicts the next token. Trained with two losses: continuation (the local context goes on
from the chunks) and repetition (it is a piece out of them).

Here each token of the local context has candidates of its own, made of the text up to that token: a token is read once,
and decoding with a cache equals the pass from scratch. (The authors make candidates for the last token, and all of the
local context reads those; a step of theirs trains on one token, one of ours on as many as are near.) The local context
is the token's own chunk and the `window / chunk - 2` before it, so that it fits into the window behind a chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import untestable
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
from formery.methods.cache.short_window import LONG, ROWS, WINDOW, Cut, base, own, repeated
from formery.models import Decoder
from formery.models.beyond import Beyond, Seen
from formery.parts import Attention
from formery.parts.beside import attend_beside
from formery.parts.chunks import Kept
from formery.parts.steered import among, causal_mask, merged, placed, projected, scale_of, steerable
from formery.train.objective import Batch, cross_entropy

CHUNK, TRAINED = 32, 2  # tokens of a chunk; windows of the texts that it is trained on


@dataclass
class Focused(Seen):
    """streams: keys and values of each chunk with what is near behind it; row `chunk · batch + text`."""

    streams: Kept = field(default_factory=Kept)
    chunk: int = 0

    def cut(self, length: int) -> Self:
        return type(self)(self.start, self.near.cut(length), self.streams.cut(self.chunk + length), self.chunk)

    def tensors(self) -> list[Tensor]:
        return [*self.near.tensors(), *self.streams.tensors()]


class FocusLLM(Beyond):
    """candidates: for each layer an attention whose maps the candidate tokens go through."""

    def __init__(self, decoder: Decoder, window: int, chunk: int, candidates: Sequence[Attention]):
        if chunk < 1 or window // chunk < 3:
            raise FormeryError(f"a window of {window} tokens holds no chunk of {chunk} and two more behind it.")
        super().__init__(decoder, window, chunk, near=window // chunk - 1)
        self.candidates = nn.ModuleList(candidates)
        if len(candidates) != len(self.attentions):
            raise FormeryError(f"{len(candidates)} candidates' attentions do not fit {len(self.attentions)} layers.")

    def opened(self, past: Int[Tensor, "batch past"], seen: Seen | None) -> Focused:
        batch, number = len(past), past.shape[1] // self.chunk
        known, streams = 0, Kept()
        if isinstance(seen, Focused):  # what was taken back may have left more chunks than are past now
            known = min(number, seen.start // self.chunk)
            streams = seen.streams.cut(self.chunk).rows(known * batch)
        if known < number:
            chunks = past.view(batch, number, self.chunk).transpose(0, 1)[known:].flatten(0, 1)
            fresh = Kept()
            self._plain(chunks, 0, fresh)
            streams = streams.joined(fresh) if known else fresh
        return Focused(past.shape[1], Kept(), streams, self.chunk)

    def advance(self, seen: Seen, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        assert isinstance(seen, Focused)
        number = seen.start // self.chunk
        said = self._candidates(seen, tokens, number) if number else {}
        first = number + seen.near.length

        def mix(attention: Attention, hidden: Tensor) -> Tensor:
            query, key, value = projected(attention, hidden)
            at = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
            query, key = placed(attention, query, at), placed(attention, key, at)
            keys, values = seen.near.append(attention, key, value)
            if not number:
                return merged(attention, among(attention, query, keys, values))
            allowed = causal_mask(tokens.shape[1], keys.shape[1], tokens.device)
            own = said[attention]
            return merged(attention, attend_beside(query, keys, values, allowed, *own, scale_of(attention)))

        return self.through_layers(tokens, first, mix)

    def _plain(self, tokens: Int[Tensor, "rows time"], first: int, kept: Kept) -> None:
        """Reads tokens as the decoder does, for their keys and values alone: these are not trained."""

        def mix(attention: Attention, hidden: Tensor) -> Tensor:
            query, key, value = projected(attention, hidden)
            at = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
            keys, values = kept.append(attention, placed(attention, key, at), value)
            return merged(attention, among(attention, placed(attention, query, at), keys, values))

        with torch.no_grad():
            self.through_layers(tokens, first, mix)

    def _candidates(
        self, seen: Focused, tokens: Int[Tensor, "batch time"], number: int
    ) -> dict[Attention, tuple[Tensor, Tensor]]:
        """For each attention the candidates' keys, turned to their chunks' places, and values.

        Each [batch time chunk group dim]. A candidate sees its chunk and the plain tokens before it, and itself.
        """
        rows, first = tokens.repeat(number, 1), self.chunk + seen.near.length
        self._plain(rows, first, seen.streams)
        at = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
        places = torch.arange(number, device=tokens.device)[None]
        own = dict(zip(self.attentions, self.candidates, strict=True))
        said: dict[Attention, tuple[Tensor, Tensor]] = {}

        def by_chunk(one: Float[Tensor, "rows time group dim"]) -> Float[Tensor, "batch time chunk group dim"]:
            return one.unflatten(0, (number, len(tokens))).permute(1, 2, 0, 3, 4)

        def mix(attention: Attention, hidden: Tensor) -> Tensor:
            candidate = own[attention]
            assert isinstance(candidate, Attention)
            query, key, value = projected(candidate, hidden)
            keys = by_chunk(key)
            said[attention] = placed(attention, keys.flatten(0, 1), places).view_as(keys), by_chunk(value)
            query, key = placed(attention, query, at), placed(attention, key, at)
            plain = seen.streams.entries[attention]
            allowed = causal_mask(tokens.shape[1], plain[0].shape[1], tokens.device, strict=True)
            mixed = attend_beside(query, *plain, allowed, key[:, :, None], value[:, :, None], scale_of(attention))
            return merged(candidate, mixed)

        self.through_layers(rows, first, mix)
        return said


def focused(decoder: Decoder, window: int, chunk: int) -> FocusLLM:
    """The decoder within a FocusLLM; candidates begin with copies of its maps, and only they learn."""
    candidates = [attention.clone() for attention in steerable(decoder.layers)]
    model = FocusLLM(decoder, window, chunk, candidates)
    decoder.requires_grad_(False)
    return model


def continuation_and_repetition(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """What goes on from the chunks (text, and answers to questions), and pieces of the text that are repeated."""
    assert isinstance(model, FocusLLM)
    tokens = batch["tokens"][~batch["answers"].any(-1)]
    begin = model.chunks.start(tokens.shape[1] - 2)
    again = repeated(tokens, begin, tokens.shape[1] - 1 - begin, int(batch["step"]))
    repetition = cross_entropy(model.logits(model.behind(again[:, :-1], begin)), again[:, begin + 1 :])
    return of_the_end(model, batch) + repetition


@cache
def trained(seed: int) -> FocusLLM:
    """The base within a FocusLLM, trained on texts of twice the window."""
    made = grown(
        "focusllm",
        lambda: focused(own(base()), WINDOW, CHUNK),
        Cut(TRAINED * WINDOW, ROWS, seed),
        replace(LONG, seed=seed),
        continuation_and_repetition,
        sources=(base, of_the_end),
    )
    made.tokenizer = base().tokenizer
    return made


def measured(seed: int) -> dict[str, float]:
    """All numbers of one seed."""
    model = trained(seed)
    contenders = [contender("FocusLLM", model), *rivals(seed)]
    found = contend(contenders, seed) | held(contenders)
    return found | {"departure": departure(model, seed), "moved": moved(model)}


def check(budget: Budget) -> Measured:
    """Recall behind the window and loss by context, against truncation, sinks, interpolation and a smaller model."""
    budget.units.expect(len(budget.seeds) + 1)
    found = by_seed(budget, measured, "trained and measured")
    contenders = [contender("FocusLLM", trained(0)), *rivals(0)]
    times = budget.units.measure("times", lambda: timed(contenders, budget.rounds))

    def over(what: str, other: str, factor: int) -> list[float]:
        return differences(found, what, "FocusLLM", other, factor)

    return Measured(
        [
            *kept_exact(found),
            *beyond_criteria(over),
            untestable(
                "benchmarks",
                "with LLaMA-2 7B it answers more of LongBench and InfiniteBench than earlier methods do",
                ">",
                0.0,
                "needs that model, those documents, and texts of up to 400,000 tokens",
                essential=True,
            ),
        ],
        rows({**found, **times}),
        baseline="the same decoder on the last window of the text",
        notes=[
            *SETTING,
            "FocusLLM is trained on texts of 256 tokens. Its decode state holds the keys and values of each chunk and, "
            "for each chunk again, of the local context behind it: more than a full cache. What stands before the "
            "local context is small; what it is made from is not.",
            "Each token is read once for each chunk, and once more as a candidate: in parallel on a graphics card, one "
            "after the other on a core.",
        ],
    )


PAPER = publish(
    Paper(
        slug="focusllm",
        title="FocusLLM: Scaling LLM's Context by Parallel Decoding",
        year=2024,
        part="cache",
        domain="language",
        does="Reads texts far beyond the trained length: the text is cut into chunks, a frozen model reads each with "
        "the question at its end in parallel, and what each has to say goes as one token into the cache of the answer.",
        claims="Trained at 8,000 tokens, it beats earlier methods on long documents and keeps working up to 400,000.",
        needs="LLaMA-2 7B and long documents.",
        check=check,
        works=("long",),
        name="FocusLLM",
        training="added",
        sought="very long documents with a short-context LLM; context window extension cheaply; 100k tokens and more",
        related={
            "sharedllm": "long text compressed in chunks",
            "masformer": "few layers look far",
            "capu-chunk-merging": "chunks in parallel",
            "differentiable-cache-augmentation": "vectors added to the cache",
            "block-transformer": "blocks condensed",
        },
        added="2026-11-28",
    )
)
