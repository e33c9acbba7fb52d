"""ReDrafter: one small recurrent head guesses all steps ahead, and a beam over it becomes a tree.

Cheng, Zhang, Zhang, Wang and Wang, "Recurrent Drafter for Fast Speculative Decoding in Large Language Models", 2024.
`x` is the target's last vector at the token before the last one, and `s` a state that begins at zero. With each token,
the last written one and then each guess, whose embedding is `e`,

    s = silu(cell [s, e])          guess = output(x + silu(mix [x, s]))

so that the same few weights serve every depth, and each guess depends on those before it, which Medusa's heads do not
know. A beam of `beam` lines over this head gives candidates of `length` tokens. They begin alike more often than not;
beginnings that are shared are laid together as the candidates come, which makes them a tree, and the target reads each
of its tokens once. The head is trained on what the target itself writes.

In the paper the head has an output of its own and works at twice the width; here the output is the model's own, and the
sizes are such that the head has the parameters of four Medusa heads. The paper reports up to 2.8 times faster decoding
of Vicuna on an H100, and up to 2.3 times on Apple's graphics cards.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import Setting, criterion, rows, survey, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.race import Laps
from formery.generate import Draft
from formery.generate.draft import Row
from formery.generate.method import Method, drafting, register
from formery.generate.serial import SerialGuide, SerialGuided
from formery.methods.decoding.draft.checks import accepts_more, by_depth, faster, fewer_calls, lossless
from formery.methods.decoding.draft.training import ahead, decoder_of, guess_loss, guide_recipe
from formery.models import Model
from formery.models.guide import Guide
from formery.parts import Linear
from formery.train.objective import Batch

DEPTH = 4  # guesses ahead that it learns


class RecurrentHead(SerialGuide):
    """`x + silu(mix [x, s])`, where `s = silu(cell [s, e])`; it carries `[x, s]`."""

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.width, self.vocabulary = width, vocabulary
        self.cell = Linear(2 * width, width, bias=True)
        self.mix = Linear(2 * width, width, bias=True, gain=0.1)
        assert isinstance(self.cell.weight, nn.Parameter)
        with torch.no_grad():  # embeddings are many times smaller than what else it reads
            self.cell.weight[:, width:] *= 10

    def open(
        self, vector: Float[Tensor, "lines width"], embedded: Float[Tensor, "lines width"]
    ) -> tuple[Float[Tensor, "lines width"], Float[Tensor, "lines carried"]]:
        """The vector of the first guess and what is then carried, after a token with that embedding."""
        return self.step(torch.cat((vector, torch.zeros_like(vector)), -1), embedded)

    def step(
        self, carry: Float[Tensor, "lines carried"], embedded: Float[Tensor, "lines width"]
    ) -> tuple[Float[Tensor, "lines width"], Float[Tensor, "lines carried"]]:
        vector, state = carry.chunk(2, -1)
        state = nn.functional.silu(self.cell(torch.cat((state, embedded), -1)))
        carry = torch.cat((vector, state), -1)
        return vector + nn.functional.silu(self.mix(carry)), carry

    def forward(
        self, vector: Float[Tensor, "place width"], embedded: Float[Tensor, "place depth width"]
    ) -> Float[Tensor, "place depth width"]:
        """The vectors of all guesses, where the tokens before each are known: the last one and those that came."""
        made, carry = self.open(vector, embedded[:, 0])
        found = [made]
        for one in embedded[:, 1:].unbind(1):
            made, carry = self.step(carry, one)
            found.append(made)
        return torch.stack(found, 1)


class Redrafter(SerialGuided):
    """Drafts the lines of a beam, their shared beginnings laid together; with a beam of 1 a chain."""

    draft: RecurrentHead

    def __init__(self, draft: Guide, length: int = 4, beam: int = 1):
        super().__init__(draft, length, beam, None, beam)

    def opened(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch carried"]]:
        return self.draft.open(self.last, self.ends(rows))


METHOD = register(
    Method(
        "redrafter",
        "a recurrent head guesses on from its own guesses; its beam is checked as a tree",
        lossless=True,
        make=drafting(Redrafter),
        variants=("length=4:beam=2", "length=4:beam=4"),
        paper="redrafter",
    )
)


def make(model: Model) -> RecurrentHead:
    """A head for a model."""
    return RecurrentHead(decoder_of(model).embedding.width, model.vocabulary)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each guess learns the token at its depth, given those that came before it; deeper ones count less."""
    places = ahead(batch, DEPTH)
    before = torch.cat((places.token[:, None], places.coming[:, :-1]), 1)
    embedded = decoder_of(model).embedding.looked_up(before)
    return guess_loss(model, guide(places.hidden, embedded), places.coming, places.there)


for name in ("code", "translate"):
    guide_recipe(name, METHOD.name, make, objective)


def shared(
    model: Model, draft: Model | None, prompts: Sequence[str | list[int]], laps: Laps, temperature: float
) -> dict[str, float]:
    """How often each depth stands, and how many tokens a draft has with shared beginnings laid together and without."""
    read = apart = drafts = 0
    for event in (event for one in laps.outputs for event in one.trace if event.drafted):
        tree = Draft(event.drafted, parents=event.parents)
        ends = set(range(len(tree.tokens))) - {tree.parent(place) for place in range(len(tree.tokens))}
        read, apart, drafts = read + len(tree.tokens), apart + sum(tree.depths[end] for end in ends), drafts + 1
    merged = {"drafted": read / drafts, "drafted_apart": apart / drafts, "share_saved": 1 - read / apart}
    return by_depth(model, draft, prompts, laps, temperature) | merged


def check(budget: Budget) -> Measured:
    """A chain, and beams of two widths and lengths, against token by token decoding and Medusa's heads."""
    narrow, wide = "redrafter:beam=2", "redrafter:length=6:beam=4"
    settings = [Setting(name, extra=shared) for name in ("redrafter", narrow, wide)]
    settings += [Setting("medusa", extra=by_depth), Setting("redrafter", temperature=1.0)]
    results = survey(budget, settings)
    own = [one for one in results if one.setting.method != "medusa"]
    greedy = [one for one in own if one.setting.temperature == 0]
    saved = values_of([one for one in greedy if "beam" in one.setting.method], "share_saved")
    criteria = [
        lossless(greedy),
        *fewer_calls(greedy),
        *faster(greedy),
        *accepts_more(results, "redrafter", "medusa", essential=True),
        *accepts_more(results, wide, "redrafter"),
        criterion(
            "shared beginnings",
            "laying shared beginnings together saves the target more than a tenth of the tokens of a beam",
            saved,
            ">",
            0.1,
        ),
        untestable(
            "factor",
            "a chat model of 7 billion parameters on an H100 decodes 2.8 times as fast",
            ">=",
            2.8,
            "needs such a model, and hardware on which a call costs the reading of the weights",
            essential=True,
        ),
    ]
    return Measured(
        criteria,
        rows(results),
        baseline="greedy decoding, or sampling at the same temperature, token by token",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in ("redrafter", "medusa"))],
        notes=["The recurrent head has as many parameters as four Medusa heads, and was trained on the same text."],
    )


PAPER = publish(
    Paper(
        slug="redrafter",
        title="Recurrent Drafter for Fast Speculative Decoding in Large Language Models",
        year=2024,
        part="decoding",
        domain="language",
        does="One small recurrent head on the frozen model's last vector guesses token after token, each from those "
        "before; a beam over it, its shared beginnings laid together, is the tree that the model checks in one call.",
        claims="Guesses that know their predecessors stand more often than those of independent heads, laying shared "
        "beginnings together spares the model work, and Vicuna decodes up to 2.8 times faster, its text unchanged.",
        needs="Vicuna on accelerators, for the size of the speed-up.",
        name="ReDrafter",
        training="added",
        sought="RNN drafter for LLM speculative decoding; beam of drafts; cheap draft model trained on the target",
        related={
            "clover-2": "a recurrent state drafts",
            "medusa": "a guide on a frozen model",
            "eagle": "drafts that depend on each other",
            "gumiho": "serial guesses",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
