"""A guide of one attention layer that goes on from its own guesses of the model's vectors.

Li, Wei, Zhang and Zhang, "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", 2024. At token t the
guide reads `enter([x_t, e_{t+1}])`, the model's vector there and the embedding of the token after it, attends to all
that it has read, and guesses `x_{t+1}`, of which the model's own output makes the next token. In the place of vectors
that the model has not made yet stand its own guesses. Its loss is that of the token, plus the smooth distance between
guess and vector.

It is here as the baseline that later drafters compare with. The paper reports 2.7 to 3.5 times faster decoding.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.attending import AttendingGuided
from formery.generate.method import Method, drafting, register
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.training import decoder_of, guide_recipe, next_vectors, vector_loss
from formery.models import Model
from formery.models.guide import Attending, Guide
from formery.parts import Attention, GatedMLP, Layer, Linear, PreNorm, RMSNorm, Rotary
from formery.train.objective import Batch


class EagleLayer(Attending):
    """`norm(layer(enter([vector, embedded])))`."""

    def __init__(self, width: int, vocabulary: int, heads: int, hidden: int):
        attention = Attention(width, heads, position=Rotary())
        layer = Layer([PreNorm(RMSNorm(width), attention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])
        super().__init__([layer], RMSNorm(width))
        self.width, self.vocabulary, self.heads, self.hidden = width, vocabulary, heads, hidden
        self.fuse = Linear(2 * width, width)


class EagleDrafter(AttendingGuided):
    """Drafts a chain, or with `beam` and `width` above 1 a tree."""

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, beam: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes, beam)


METHOD = register(
    Method(
        "eagle",
        "one attention layer goes on from its own guesses of the model's vectors",
        lossless=True,
        make=drafting(EagleDrafter),
        variants=("length=4:width=2:beam=2:nodes=6",),
        paper="eagle",
    )
)


def make(model: Model) -> EagleLayer:
    """One layer for a model."""
    return EagleLayer(decoder_of(model).embedding.width, model.vocabulary, heads=4, hidden=512)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each guess learns the model's next vector and the token after it; then once more from its own guesses."""
    vectors, embedded, positions, written = next_vectors(model, batch)
    first = guide(vectors, embedded, positions)
    again = guide(torch.cat((vectors[:, :1], first[:, :-1]), 1), embedded, positions)
    return (vector_loss(model, first, batch, written) + vector_loss(model, again, batch, written)) / 2


guide_recipe("code", "eagle", make, objective)
guide_recipe("translate", "eagle", make, objective)


def check(budget: Budget) -> Measured:
    """Chains and a tree against decoding token by token, and against parallel heads."""
    chains = [f"{METHOD.name}:length={length}" for length in (2, 4)]
    results = surveyed(budget, [*chains, f"{METHOD.name}:{METHOD.variants[0]}", "medusa:length=4"])
    own = [one for one in results if one.setting.method.startswith(METHOD.name)]
    factor = untestable(
        "factor",
        "a chat model of 7 to 70 billion parameters on accelerators is decoded at least 2.7 times as fast",
        ">=",
        2.7,
        "needs such a model, and hardware on which a call costs the reading of the weights",
        essential=True,
    )
    return Measured(
        [
            lossless(own),
            *fewer_calls(own),
            *accepts_more(results, chains[-1], "medusa:length=4"),
            *faster(own),
            factor,
        ],
        rows(results),
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in ("eagle", "medusa"))],
        notes=["Each guess of a chain waits for the one before it: on a small model that costs a good part of a call."],
    )


PAPER = publish(
    Paper(
        slug="eagle",
        title="EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty",
        year=2024,
        part="decoding",
        domain="language",
        does="One attention layer reads a frozen model's last vectors with the tokens after them and goes on from its "
        "own guesses of the next vectors, of which its output makes tokens to check.",
        claims="A chat model of 70 billion parameters decodes 2.7 to 3.5 times faster, with its own distribution.",
        needs="A chat model of 7 to 70 billion parameters, and accelerators, for the size of the speed-up.",
        name="EAGLE",
        training="added",
        sought="fastest speculative decoding draft; feature-level autoregression; one-layer drafter",
        related={
            "clover-2": "one attention layer drafts",
            "gumiho": "one attention layer drafts",
            "chimera": "a guide on a frozen model",
            "falcon": "one attention layer drafts",
            "medusa": "a guide on a frozen model",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
