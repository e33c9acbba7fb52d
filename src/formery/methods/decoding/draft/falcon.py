"""Falcon: a block of guesses in one pass, taught to depend on each other by glancing at some of the answers.

Gao, Xie, Xiang and Ji, "Falcon: Faster and Parallel Inference of Large Language Models through Enhanced
Semi-Autoregressive Drafting and Custom-Designed Decoding Tree", 2024. For each token t of the text the guide reads the
frozen model's vector and the token after it, and behind the last of them, n, it puts a block of k places:

    text_t  = enter [x_t, e_{t+1}]
    place_i = text_n + offset_i,  i = 1 … k
    y_i     = norm(layer(place_i))              attends to the text before the block and to all of the block
    guess_i = y_i + carry_i ⊙ guess_{i-1}       from left to right, guess_0 = x_n

Attention is causal but for the block, in which all places see all. The model's own output makes tokens of the guesses.
By `blocks` a further pass goes on from the likeliest line: its guesses are then read in the place of vectors.

Coupled sequential glancing distillation: the guide first guesses as when drafting. Then, in each block, some answers
are shown at places drawn by chance, a share of as many as guesses were wrong, which falls from `REVEALED` to nothing
while it learns: `place_i` becomes what would be read at the true vector and token, and the next guess is made from the
true vector. The other places learn the model's distribution, its token and its vector.

The paper mixes the text by an LSTM before attention, takes the last k places of the text for the block, and checks some
hundred tokens in blocks of two; here the recurrence runs over the block alone. The paper reports 2.91 to 3.51 times
faster decoding, more than by Eagle, Medusa and Lookahead.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.attending import AttendingGuided, Growing
from formery.generate.draft import Draft, Row
from formery.generate.headed import hang
from formery.generate.method import Method, drafting, register
from formery.methods.decoding.draft.checks import (
    accepts_more,
    accepts_more_than_without,
    cheaper_drafts,
    faster,
    fewer_calls,
    lossless,
    surveyed,
)
from formery.methods.decoding.draft.training import behind, decoder_of, distilled_loss, guide_recipe, next_vectors
from formery.models import Model
from formery.models.guide import Attending, Guide
from formery.parts import Attention, Context, GatedMLP, Layer, Linear, PreNorm, RMSNorm, Rotary, everything
from formery.parts.part import normal
from formery.train.objective import Batch

BLOCK = 4
PLACES = 32  # blocks that are put into each text while learning
REVEALED = 0.5
STEPS = 1300
DISTANCE = 0.5  # what the distance to the model's vectors counts for


class Shown(NamedTuple):
    """Answers at places of blocks: which are shown, the model's vectors there, and their tokens' embeddings."""

    places: Bool[Tensor, "batch blocks block"]
    vectors: Float[Tensor, "batch blocks block width"]
    embedded: Float[Tensor, "batch blocks block width"]


class FalconGuide(Attending):
    """A layer in which the places of a block see each other; block: how many tokens are guessed in one pass."""

    def __init__(self, width: int, vocabulary: int, heads: int, hidden: int, block: int):
        # What is not read yet is not there to be seen; while learning, masks hide what lies behind the block.
        attention = Attention(width, heads, max(1, heads // 2), position=Rotary(), mask=everything)
        layer = Layer([PreNorm(RMSNorm(width), attention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])
        super().__init__([layer], RMSNorm(width))
        self.width, self.vocabulary, self.heads, self.hidden, self.block = width, vocabulary, heads, hidden, block
        self.fuse = Linear(2 * width, width)
        self.offset, self.carry = normal(block, width, deviation=0.3), normal(block, width, deviation=0.03)

    def enter(
        self, vectors: Float[Tensor, "batch time width"], embedded: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        return self.fuse(torch.cat((vectors, embedded), -1))

    def guesses(
        self, last: Float[Tensor, "... width"], found: Float[Tensor, "... block width"], shown: Shown | None = None
    ) -> Float[Tensor, "... block width"]:
        """The recurrence, from the model's vector at the last token; a guess is made from what is shown before it."""
        made = []
        for place in range(self.block):
            made.append(found[..., place, :] + self.carry[place] * last)
            last = made[-1]
            if shown is not None:
                last = torch.where(shown.places[..., place, None], shown.vectors[..., place, :], last)
        return torch.stack(made, -2)

    def blocks(
        self,
        vectors: Float[Tensor, "batch time width"],
        embedded: Float[Tensor, "batch time width"],
        positions: Int[Tensor, "batch time"],
        at: Int[Tensor, "batch blocks"],
        shown: Shown | None = None,
    ) -> Float[Tensor, "batch blocks block width"]:
        """The guesses of blocks behind the places `at` of a text, from scratch."""
        text = self.enter(vectors, embedded)
        places = text.take_along_dim(at[..., None], 1)[:, :, None] + self.offset
        if shown is not None:
            places = torch.where(shown.places[..., None], self.enter(shown.vectors, shown.embedded), places)
        whole, visible = behind(positions, at, self.block)
        found = self._run(torch.cat((text, places.flatten(1, 2)), 1), Context(whole, visible=visible))
        last = vectors.take_along_dim(at[..., None], 1)
        return self.guesses(last, found[:, text.shape[1] :].unflatten(1, places.shape[1:3]), shown)


class FalconDrafter(AttendingGuided):
    """Drafts blocks: a chain, or with `width` above 1 the tree of the likeliest.

    length: how many guesses of a block are used at most. nodes: how many tokens its tree has, by default those
    of a chain. blocks: how many passes; each goes on from the likeliest line of the one before, if it is drafted whole.
    """

    draft: FalconGuide

    def __init__(
        self, draft: Guide, length: int | None = None, width: int = 1, nodes: int | None = None, blocks: int = 1
    ):
        if blocks < 1:
            raise FormeryError(f"a draft needs at least 1 block, not {blocks}.")
        block = getattr(draft, "block", BLOCK)
        super().__init__(draft, block if length is None else min(length, block), width, nodes)
        self.blocks = blocks

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        tokens = [row.tokens[start + 1 :] for row, start in zip(rows, self.state.lengths, strict=True)]
        growing = [Growing(row, chance, self.settings, 0, 0) for row, chance in zip(rows, self.random, strict=True)]
        vectors, self.unread = self.unread, [one[:0] for one in self.unread]
        lines: list[list[int]] = [[-1]] * len(rows)
        for number in range(self.blocks):
            made = self._block(vectors, tokens)
            logits = self.logits(made[:, : self.length])
            lengths = [min(self.length, room - number * self.length) for room in rooms]
            lines = [
                self._hung(one, line[-1], here[:length]) if line and length > 0 else []
                for one, line, here, length in zip(growing, lines, logits, lengths, strict=True)
            ]
            if not any(lines):
                break
            vectors = [here[: len(line)] for here, line in zip(made, lines, strict=True)]
            tokens = [[one.draft.tokens[place] for place in line] for one, line in zip(growing, lines, strict=True)]
        self.state.rollback([len(row.tokens) - 1 for row in rows])
        return [one.finished(self.nodes * self.blocks) if one.draft.tokens else Draft() for one in growing]

    def _hung(self, one: Growing, place: int, logits: Float[Tensor, "depth vocabulary"]) -> list[int]:
        """Adds a block's guesses behind that place; the likeliest line's places, none where it ends early."""
        drawn = 0 if one.draft.probabilities is None else len(one.draft.tokens)
        new = hang(one, place, logits, self.width, drawn + self.nodes)
        line = [place]
        while (child := next((n for n in new if one.draft.parent(n) == line[-1]), None)) is not None:
            line.append(child)
        return line[1:] if len(line) > self.length else []

    def _block(
        self, vectors: Sequence[Float[Tensor, "time width"]], tokens: Sequence[Sequence[int]]
    ) -> Float[Tensor, "batch block width"]:
        """Reads vectors of each row with the tokens after them, and the guesses of a block behind them."""
        counts, block = [len(one) for one in vectors], self.draft.block
        time, every = max(counts), range(len(counts))
        if time == 0:  # a single token has come, of which the target has made nothing yet
            return self.last.new_zeros(len(counts), block, self.draft.width)
        ends = [max(0, count - 1) for count in counts]
        padded = nn.utils.rnn.pad_sequence(list(vectors), batch_first=True)
        embedded = self.embedded([[*some, *[0] * (time - len(some))] for some in tokens])
        positions: Tensor | None = None
        if min(counts) < time:  # there is padding before blocks, and rows without a text have no block either
            spans = [(n, count, time - count) for n, count in zip(self.state.lengths, counts, strict=True)]
            behind = [[*range(n + count, n + count + block)] if count else [-1] * block for n, count, _ in spans]
            read = [[*range(n, n + count), *[-1] * padding] for n, count, padding in spans]
            positions = torch.cat((torch.tensor(read), torch.tensor(behind)), 1).to(padded.device)
        text = self.draft.enter(padded, embedded)
        entered = torch.cat((text, text[every, ends, None] + self.draft.offset), 1)
        found = self.draft.attend(entered, self.state, positions)[:, time:]
        self.state.settle([list(range(count)) for count in counts])
        made = self.draft.guesses(padded[every, ends], found)
        return made if min(counts) > 0 else made * torch.tensor(counts, device=made.device)[:, None, None].clamp(max=1)


METHOD = register(
    Method(
        "falcon",
        "one attending pass guesses a block of tokens that were taught to depend on each other",
        lossless=True,
        make=drafting(FalconDrafter),
        variants=("width=2:nodes=6", "blocks=2"),
        paper="falcon",
    )
)


def make(model: Model) -> FalconGuide:
    """A guide of one layer and blocks of four guesses for a model."""
    width = decoder_of(model).embedding.width
    return FalconGuide(width, model.vocabulary, 4, 5 * width // 2, BLOCK)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """All guesses whose answers are not shown learn what the model says and its vectors."""
    left = max(0.0, 1 - int(batch["step"]) / STEPS)
    return block_loss(model, guide, batch, REVEALED * left if guide.training else 0.0)


def block_loss(model: Model, guide: nn.Module, batch: Batch, share: float) -> Float[Tensor, ""]:
    """The loss of blocks put into texts, where `share` times as many answers are shown as guesses are wrong."""
    assert isinstance(guide, FalconGuide)
    vectors, embedded, positions, written = next_vectors(model, batch)
    chance = None if guide.training else torch.Generator().manual_seed(0)
    # Places of what the model wrote; where there are too few, others fill up, which count for nothing.
    at = (written + 1e-6).multinomial(min(PLACES, written.shape[1]), generator=chance)
    text = torch.arange(len(at))[:, None].expand_as(at)
    shown: Shown | None = None
    if share > 0:
        later = at[..., None] + torch.arange(guide.block)
        padded = {name: nn.functional.pad(batch[name], (0, guide.block + 1)) for name in ("tokens", "written")}
        tokens, there = (padded[name][text[..., None], later + 2] for name in ("tokens", "written"))
        hidden = nn.functional.pad(batch["hidden"], (0, 0, 0, guide.block))[text[..., None], later + 1]
        with torch.no_grad():
            guessed = decoder_of(model).output(guide.blocks(vectors, embedded, positions, at)).argmax(-1)
            places = glanced((guessed != tokens) & there, share) & there
        shown = Shown(places, hidden, decoder_of(model).embedding.looked_up(tokens))
    found = guide.blocks(vectors, embedded, positions, at, shown).flatten(0, 1)
    counting = None if shown is None else ~shown.places.flatten(0, 1)
    return distilled_loss(model, found, batch, torch.stack((text, at), -1).flatten(0, 1), DISTANCE, counting)


def glanced(wrong: Bool[Tensor, "... block"], share: float) -> Bool[Tensor, "... block"]:
    """Places drawn by chance, `share` times as many as are wrong (on average, where that is no whole number)."""
    count = (share * wrong.sum(-1, keepdim=True) + torch.rand(*wrong.shape[:-1], 1)).floor()
    return torch.rand(wrong.shape).argsort(-1).argsort(-1) < count


for target in ("code", "translate"):
    guide_recipe(target, "falcon", make, objective, STEPS, batch_size=8)
guide_recipe("code", "unglanced/falcon", make, partial(block_loss, share=0.0), STEPS, batch_size=8)


def check(budget: Budget) -> Measured:
    """A chain, a tree and two blocks against token by token decoding and two other guides; what glancing adds."""
    own_settings = ["falcon", *(f"falcon:{variant}" for variant in METHOD.variants)]
    results = surveyed(budget, [*own_settings, "medusa", "eagle"])
    own = [one for one in results if one.setting.method in own_settings]
    criteria = [
        lossless(own),
        *fewer_calls(own),
        *faster(own),
        *accepts_more(results, "falcon", "medusa", essential=True),
        *accepts_more(results, "falcon", "eagle", essential=True),
        *cheaper_drafts(results, "falcon", "eagle"),
        accepts_more_than_without(budget, own, "falcon", "glances", "code/unglanced/falcon"),
        untestable(
            "factor",
            "chat models of 7 and 13 billion parameters decode 2.91 to 3.51 times as fast",
            ">=",
            2.91,
            "needs such models, and hardware on which scoring some hundred tokens costs as much as one",
            essential=True,
        ),
    ]
    return Measured(
        criteria,
        rows(results),
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in ("falcon", "medusa", "eagle"))],
        notes=["A draft has at most 8 tokens, for which the paper has some hundred."],
    )


PAPER = publish(
    Paper(
        slug="falcon",
        title="Falcon: Faster and Parallel Inference of Large Language Models through Enhanced Semi-Autoregressive "
        "Drafting and Custom-Designed Decoding Tree",
        year=2024,
        part="decoding",
        domain="language",
        does="A guide guesses a block of tokens in one attending pass, taught by glances at some of the answers to let "
        "the guesses of a block depend on each other; blocks make a tree that the model checks in one call.",
        claims="Chat models decode 2.91 to 3.51 times faster by a guide as large as two of their layers, faster than "
        "by Eagle, Medusa and Lookahead, their text unchanged.",
        needs="Vicuna or LLaMA-2 on accelerators, for the size of the speed-up.",
        name="Falcon",
        training="added",
        sought="semi-autoregressive draft head; draft several dependent tokens at once; faster LLM inference",
        related={
            "glat": "answers shown in training",
            "diffglat": "answers shown in training",
            "eagle": "one attention layer drafts",
            "hidden-transfer": "a block guessed at once",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
