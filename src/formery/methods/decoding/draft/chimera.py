"""Chimera: three tokens fused, the whole text attended to once, and heads that guess all the next tokens from there.

Zeng, Yu, Pang, Wang, Zhuang, Shao and Zou, "Chimera: A Lossless Decoding Method for Accelerating Large Language Models
Inference by Fusing all Tokens", 2024. At each token t the guide reads the embeddings of the last three tokens, fused by
a small network, and the frozen model's own vector one token before:

    short_t   = silu(first [e_{t-1}, e_t, e_{t+1}])           what three tokens mean together, whatever the text
    y_t       = norm(layer(fuse [x_t, short_t]))              one layer that attends to all that came before
    guess_t,i = y_t + silu(W_i y_t + b_i),  i = 1 … k         residual heads, all in one product

and the model's own output makes tokens of the guesses. A text is read once; after each call of the model only what is
new. The loss is half that of the tokens that came and half the distance to the model's own distribution at each depth.
The likeliest guesses make a chain or a tree, which one call checks, so that the text stays the very same.

The paper keeps the fused vectors of frequent triples in a table; here fusing costs as much as looking them up, and is
done anew. It has the block's layers read the model's last vectors in another way, and reports 2.7 times faster decoding
of Vicuna and LLaMA-2 on average.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Row
from formery.generate.headed import Headed, HeadedGuided
from formery.generate.method import Method, drafting, register
from formery.methods.decoding.draft.checks import (
    accepts_more,
    accepts_more_than_without,
    faster,
    fewer_calls,
    lossless,
    surveyed,
)
from formery.methods.decoding.draft.training import decoder_of, distilled_loss, guide_recipe, next_vectors, some_places
from formery.models import Model
from formery.models.guide import Guide, Heads
from formery.parts import Attention, GatedMLP, Layer, Linear, PreNorm, RMSNorm, Rotary
from formery.train.objective import Batch

TOKENS = 3  # that are fused
DEPTHS = 4
LEARNED = 384  # places of a batch that are learned from in a step


class ChimeraGuide(Headed):
    """`heads(norm(layer(fuse [vector, silu(first(tokens' embeddings))])))`.

    tokens: how many tokens' embeddings are fused. depths: how many tokens are guessed.
    """

    def __init__(self, width: int, vocabulary: int, attention_heads: int, hidden: int, tokens: int, depths: int):
        attention = Attention(width, attention_heads, max(1, attention_heads // 2), position=Rotary())
        layer = Layer([PreNorm(RMSNorm(width), attention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])
        super().__init__([layer], RMSNorm(width))
        self.width, self.vocabulary, self.attention_heads, self.hidden = width, vocabulary, attention_heads, hidden
        self.tokens, self.depths = tokens, depths
        self.first = Linear(tokens * width, width, bias=True)
        self.fuse = Linear(2 * width, width)
        self.heads = Heads(width, depths)


class ChimeraDrafter(HeadedGuided):
    """Drafts the likeliest guesses of the heads: a chain, or with `width` above 1 a tree."""

    draft: ChimeraGuide

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes)

    def after(self, rows: Sequence[Row], lengths: Sequence[int], time: int) -> Tensor:
        found = []
        for row, read in zip(rows, lengths, strict=True):
            tokens, places = row.tokens, range(read + 1, read + 1 + time)
            found.append([_at(tokens, place - back) for place in places for back in _backwards(self.draft.tokens)])
        return self.embedded(found).view(len(rows), time, -1)


def _backwards(tokens: int) -> range:
    """How far back the fused tokens lie, the earliest first."""
    return range(tokens - 1, -1, -1)


def _at(tokens: Sequence[int], place: int) -> int:
    """The token there; before the text the first one goes on, behind it any is padding."""
    return tokens[max(0, place)] if place < len(tokens) else 0


METHOD = register(
    Method(
        "chimera",
        "three tokens fused, one layer that attends to the whole text, and heads for all the next tokens",
        lossless=True,
        make=drafting(ChimeraDrafter),
        variants=("width=2:nodes=6",),
        paper="chimera",
    )
)


def make(model: Model) -> ChimeraGuide:
    """One layer and four heads for a model."""
    return _make(model, TOKENS)


def make_of_one_token(model: Model) -> ChimeraGuide:
    """The same that reads the embedding of one token only."""
    return _make(model, 1)


def _make(model: Model, tokens: int) -> ChimeraGuide:
    width = decoder_of(model).embedding.width
    return ChimeraGuide(width, model.vocabulary, attention_heads=4, hidden=5 * width // 4, tokens=tokens, depths=DEPTHS)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each head learns the token at its depth and what the model says there, deeper ones counting less."""
    assert isinstance(guide, ChimeraGuide)
    vectors, _, positions, written = next_vectors(model, batch)
    tokens = batch["tokens"]
    places = torch.arange(1, tokens.shape[1])[:, None] - torch.tensor(_backwards(guide.tokens))
    embedded = decoder_of(model).embedding.looked_up(tokens[:, places.clamp(min=0)]).flatten(2)
    at = some_places(guide, written, LEARNED)
    found = guide(vectors, embedded, positions)[at[:, 0], at[:, 1]]
    return distilled_loss(model, guide.heads(found), batch, at)


STEPS = 1300
for target in ("code", "translate"):
    guide_recipe(target, "chimera", make, objective, STEPS, batch_size=8)
guide_recipe("code", "of-one-token/chimera", make_of_one_token, objective, STEPS, batch_size=8)


def check(budget: Budget) -> Measured:
    """A chain and a tree against token by token decoding and heads without attention; what its two halves add."""
    results = surveyed(budget, ["chimera", "chimera:width=2:nodes=6", "medusa"], sampled=["chimera"])
    own = [one for one in results if one.setting.method != "medusa"]
    criteria = [
        lossless(own),
        *fewer_calls(own),
        *faster(own),
        *accepts_more(results, "chimera", "medusa", essential=True),
        accepts_more_than_without(budget, own, "chimera", "the fused tokens", "code/of-one-token/chimera"),
        untestable(
            "factor",
            "chat models of 7 and 13 billion parameters decode 2.7 times as fast",
            ">=",
            2.7,
            "needs such models, and hardware on which scoring more tokens is nearly free",
            essential=True,
        ),
    ]
    return Measured(criteria, rows(results), baseline="token by token", models=[*PAPER.works])


PAPER = publish(
    Paper(
        slug="chimera",
        title="Chimera: A Lossless Decoding Method for Accelerating Large Language Models Inference by Fusing all "
        "Tokens",
        year=2024,
        part="decoding",
        domain="language",
        does="A small guide fuses the last three tokens' embeddings, attends to the whole text with the frozen model's "
        "own vectors in one layer, and guesses all the next tokens from there by residual heads.",
        claims="Guesses are far better than those of heads without attention, and chat models decode 2.7 times faster "
        "on average, their text unchanged.",
        needs="Vicuna or LLaMA-2 on accelerators, for the size of the speed-up.",
        name="Chimera",
        training="added",
        sought="lossless LLM acceleration with trained draft heads; draft head that sees the whole context",
        related={
            "medusa": "heads that guess ahead",
            "eagle": "one attention layer drafts",
            "clover-2": "a guide on a frozen model",
            "falcon": "a guide on a frozen model",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
