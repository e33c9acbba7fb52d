"""Medusa: extra heads on the last vectors of a frozen model guess several tokens ahead, all at once.

Cai, Li, Geng, Peng, Lee, Chen and Dao, "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding
Heads", 2024. Head i sees the vector `x` at the token before the last one and guesses the i-th token after the last:
`logits = output(x + silu(W_i x + b_i))`, the output being the model's own here. The likeliest guesses of all heads make
a tree, which the model checks in one call. Heads are trained on the model's own text while the model is frozen (the
paper's Medusa-1), so that the text stays the very same.

The paper reports 2.2 times faster decoding by Medusa-1 and 2.3 to 2.8 with the model trained along.
"""

from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.guided import ParallelGuided
from formery.generate.method import Method, drafting, register
from formery.methods.decoding.draft.checks import faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.training import ahead, decoder_of, guess_loss, guide_recipe
from formery.models import Model
from formery.models.guide import Guide, from_heads
from formery.parts import Linear
from formery.train.objective import Batch


class MedusaHeads(Guide):
    """`x + silu(W_i x + b_i)` for each depth i."""

    def __init__(self, width: int, vocabulary: int, heads: int):
        super().__init__()
        self.width, self.vocabulary, self.heads = width, vocabulary, heads
        self.map = Linear(width, heads * width, bias=True, gain=0.1)

    def forward(self, hidden: Float[Tensor, "batch width"]) -> Float[Tensor, "batch heads width"]:
        return from_heads(self.map, hidden, hidden)


class MedusaDrafter(ParallelGuided):
    """Drafts the likeliest guesses of the heads: a chain, or with `width` above 1 a tree."""

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes)


METHOD = register(
    Method(
        "medusa",
        "extra heads on the model's last vectors guess several tokens at once",
        lossless=True,
        make=drafting(MedusaDrafter),
        variants=("width=2:nodes=6",),
        paper="medusa",
    )
)


def make(model: Model) -> MedusaHeads:
    """Four heads for a model."""
    return MedusaHeads(decoder_of(model).embedding.width, model.vocabulary, heads=4)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each head learns the token at its depth, deeper ones counting less."""
    places = ahead(batch, 4)
    return guess_loss(model, guide(places.hidden), places.coming, places.there)


guide_recipe("code", "medusa", make, objective)
guide_recipe("translate", "medusa", make, objective)


def check(budget: Budget) -> Measured:
    """A chain and a tree against decoding token by token."""
    results = surveyed(budget, [f"{METHOD.name}:length=3", f"{METHOD.name}:{METHOD.variants[0]}"])
    factor = untestable(
        "factor",
        "a chat model of 7 billion parameters on an accelerator is decoded 2.2 times as fast with frozen weights",
        ">=",
        2.2,
        "needs such a model, and hardware on which a call costs the reading of the weights",
        essential=True,
    )
    return Measured(
        [lossless(results), *fewer_calls(results), *faster(results), factor],
        rows(results),
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(METHOD.draft_of(work) for work in PAPER.works)],
    )


PAPER = publish(
    Paper(
        slug="medusa",
        title="Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads",
        year=2024,
        part="decoding",
        domain="language",
        does="Extra heads on the last vectors of a frozen model guess several tokens ahead at once; the likeliest "
        "combinations make a tree that the model checks in one call.",
        claims="Decoding is 2.2 times faster with the model frozen, and 2.3 to 2.8 times with the model trained along.",
        needs="A chat model of 7 billion parameters or more, and accelerators, for the size of the speed-up.",
        name="Medusa",
        training="added",
        sought="add decoding heads to an LLM for speed; no separate draft model; multi-head speculative decoding",
        related={
            "whisper-medusa": "heads that guess ahead",
            "hidden-transfer": "several tokens guessed at once",
            "gumiho": "heads that guess ahead",
            "chimera": "a guide on a frozen model",
            "eagle": "a guide on a frozen model",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
