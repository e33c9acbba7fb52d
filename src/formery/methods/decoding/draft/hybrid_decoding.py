"""Hybrid decoding: a light second decoder writes the whole text quickly, the large one corrects it where it must.

Lim, Park, Kim, Lee and Kim, "Hybrid Decoding: Rapid Pass and Selective Detailed Correction for Sequence Models", 2025.
A light decoder, here of one layer, is trained on the frozen encoder of a trained model. Decoding, it writes a whole
hypothesis first. The large decoder reads it in one call and keeps what it agrees with. Where it does not, it writes on
itself, until the rest of the hypothesis can be proposed again.

How the rest is found again is our own: what was written last is looked for in the hypothesis; where it is not found,
one token is taken to stand for one of the hypothesis, since a wrong guess costs no call. The light decoder uses the
model's own embeddings and output and learns from the model's own texts. A token stands only if it is the large
decoder's choice, so that the text is the very same.

The paper reports more than twice the speed on speech at as many wrong words or fewer, and fewer repetitions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import criterion, rows, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.guided import check_guide
from formery.generate.method import Method, drafting, register
from formery.generate.second import started
from formery.generate.settings import Settings
from formery.generate.stopping import end_tokens
from formery.generate.target import Target
from formery.methods.decoding.draft.checks import faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.training import decoder_of, guide_recipe
from formery.models import EncoderDecoder, Model
from formery.models.guide import Guide
from formery.models.second_decoder import SecondDecoder, encoded
from formery.train.objective import Batch, cross_entropy, targets


class FastDecoder(SecondDecoder):
    """`norm(layer(embedded))`, a decoder of one layer between the model's own embeddings and output."""

    def enter(
        self, vectors: Float[Tensor, "batch time width"], embedded: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """The tokens alone."""
        return embedded


class HybridDrafter:
    """Drafts the rest of a hypothesis that was written as a whole.

    length: how many tokens the hypothesis has at most. match: how many of the last written tokens are looked for in it.
    """

    def __init__(self, draft: Guide, length: int = 64, match: int = 3):
        if length < 1 or match < 1:
            raise FormeryError(f"a hypothesis needs length >= 1 and match >= 1, not length {length}, match {match}.")
        self.draft, self.length, self.match = draft, length, match

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        if not isinstance(target.model, EncoderDecoder):
            raise FormeryError("hybrid-decoding is for models with an encoder, to which it adds a second decoder.")
        if not isinstance(self.draft, FastDecoder):
            raise FormeryError("hybrid-decoding needs a second decoder as its guide: take one that was made for it.")
        check_guide(target, self.draft)
        self.at = [0] * len(rows)  # where in its hypothesis each row goes on
        ends = end_tokens(target.model) if settings.stop_tokens is None else settings.stop_tokens
        limit = target.model.max_length
        longest = min(self.length, settings.max_new_tokens)
        if limit is not None:
            longest = min(longest, limit + 1 - len(rows[0].prefix))
        self.hypotheses = self._written(target, [row.prefix for row in rows], ends, longest)

    def _written(
        self, target: Target, prefixes: Sequence[list[int]], ends: frozenset[int], longest: int
    ) -> list[list[int]]:
        """What the light decoder writes behind each prefix, its end included."""
        assert isinstance(self.draft, FastDecoder)
        found: list[list[int]] = [[] for _ in prefixes]
        state = started(target, self.draft, len(prefixes), len(prefixes[0]) + longest)
        tokens = torch.tensor(prefixes, device=state.slots.positions.device)
        for _ in range(longest):
            vectors = self.draft.attend(target.model.embedding.looked_up(tokens), state)
            tokens = target.model.logits(vectors[:, -1:], target.state).argmax(-1)
            for one, token in zip(found, tokens[:, 0].tolist(), strict=True):
                if not one or one[-1] not in ends:
                    one.append(token)
            if all(one[-1] in ends for one in found):
                break
        return found

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [
            Draft(one[at : at + max(0, room)]) for one, at, room in zip(self.hypotheses, self.at, rooms, strict=True)
        ]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        for i, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
            expected = self.at[i] + len(verdict.emitted)
            agreed = self.hypotheses[i][expected - 1 : expected] == verdict.emitted[-1:]
            self.at[i] = expected if agreed else aligned(self.hypotheses[i], row.output, expected, self.match)

    def select(self, rows: Sequence[int]) -> None:
        self.hypotheses, self.at = [self.hypotheses[row] for row in rows], [self.at[row] for row in rows]


def aligned(hypothesis: Sequence[int], written: Sequence[int], expected: int, match: int) -> int:
    """Where in the hypothesis the text goes on: behind its last tokens, as many as are found, else where expected.

    Of several places the one nearest to the expected one counts, and of two such the later.
    """
    for size in range(min(match, len(written)), 0, -1):
        run = list(written[-size:])
        ends = [end for end in range(size, len(hypothesis) + 1) if list(hypothesis[end - size : end]) == run]
        if ends:
            return min(ends, key=lambda end: (abs(end - expected), -end))
    return expected


METHOD = register(
    Method(
        "hybrid-decoding",
        "a light second decoder writes the whole text, the model corrects it where it differs",
        lossless=True,
        make=drafting(HybridDrafter),
        paper="hybrid-decoding",
        kinds=("encoder-decoder",),
    )
)


def make(model: Model) -> FastDecoder:
    """One decoder layer for a model."""
    source = model.encoder.embedding.width if isinstance(model, EncoderDecoder) else None
    return FastDecoder(decoder_of(model).embedding.width, model.vocabulary, 4, 512, source)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The cross entropy of each token that the model wrote."""
    assert isinstance(guide, FastDecoder)
    embedded = decoder_of(model).embedding.looked_up(batch["tokens"])
    vectors = guide.over(embedded, batch["positions"], *encoded(model, batch))
    return cross_entropy(decoder_of(model).logits(vectors[:, :-1]), targets(batch))


guide_recipe("translate", "hybrid-decoding", make, objective, steps=2000)


def check(budget: Budget) -> Measured:
    """The hypothesis as a draft, looked for by 1 and 3 tokens after a difference, against decoding token by token."""
    methods = [f"{METHOD.name}:match={match}" for match in (1, 3)]
    results = surveyed(budget, methods, PAPER.works)
    twice = faster(results, PAPER.works, than=2.0, essential=True)
    saved = criterion(
        "share of calls",
        "one text at a time, the large decoder is called for less than half of the tokens",
        values_of(results, "calls_per_token", batch=1),
        "<",
        0.5,
    )
    words = untestable(
        "words",
        "on speech, as many words are wrong as by the large decoder alone, or fewer",
        "<=",
        0.0,
        "needs a recogniser of Whisper's size and recorded speech",
    )
    loops = untestable(
        "repetitions",
        "fewer texts end in repetitions than by the large decoder alone",
        "<",
        1.0,
        "a token stands only if it is the large decoder's own, so its loops stand too; what avoids them is taking over "
        "tokens that it would not write",
    )
    return Measured(
        [lossless(results), *fewer_calls(results, PAPER.works), saved, *twice, words, loops],
        rows(results),
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(METHOD.draft_of(work) for work in PAPER.works)],
        notes=["A hypothesis that runs into a repetition is cut at its length; what of it is wrong costs one call."],
    )


PAPER = publish(
    Paper(
        slug="hybrid-decoding",
        title="Hybrid Decoding: Rapid Pass and Selective Detailed Correction for Sequence Models",
        year=2025,
        part="decoding",
        domain="speech",
        does="A light second decoder on the frozen encoder writes a whole hypothesis; the large decoder reads it at "
        "once, keeps what it agrees with, writes anew where it does not, and goes on with the rest.",
        claims="More than twice as fast at as many wrong words or fewer, and more robust against repetitions.",
        needs="A recogniser of Whisper's size and recorded speech, for the words and the repetitions.",
        name="Hybrid decoding",
        training="added",
        sought="fast transcription with a light decoder; speed up encoder-decoder ASR; "
        "draft whole transcript then fix errors",
        related={
            "whisper-medusa": "faster speech recognition",
            "specdec": "a second decoder drafts",
            "return-of-the-encoder": "a light decoder on an encoder",
            "efficient-canary-training": "faster speech recognition",
        },
        added="2026-11-27",
        check=check,
        works=("translate",),
    )
)
