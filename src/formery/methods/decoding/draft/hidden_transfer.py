"""Hidden Transfer: vectors of the coming tokens are made up between two layers, and the layers above finish them.

Wu, Liu, Gong, Wang, Li, Yang, Cai, Li and Zhao, "Parallel Decoding via Hidden Transfer for Lossless Large Language
Model Acceleration", 2024. Let `x` be the stream of vectors of the frozen model at its latest token, behind `layer`
layers. Linear maps make of it pseudo vectors of the next places,

    pseudo_i = x + W_i x + b_i        i = 1 … depths

which go through the other layers, each attending to the text (the model's own keys and values there) and to the pseudo
vectors before it. The model's own output makes the guesses of what comes out, which are checked as a chain or a tree.
The maps learn, through the frozen layers, the model's own distribution at the places they stand for, and its vectors.

The paper lets the pseudo vectors ride in the very pass that checks the last draft, behind every guess that could turn
out to be the last one; here they go through the upper layers in a pass of their own, behind the token that was the
last, which is the same guess at the cost of one more short pass. It reports more speed than other ways in which a
single model drafts for itself, Medusa and self-speculation among them.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import examples, model_named, untestable
from formery.evidence.checks import rows as rows_of
from formery.evidence.measured import Budget, Measured, spread
from formery.evidence.measured import Row as Noted
from formery.evidence.paper import Paper, publish
from formery.evidence.race import fitted
from formery.generate import generate
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.guided import ParallelGuided
from formery.generate.method import Method, drafting, register
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.generate.within import Listening, Sections
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.inside import read, some_columns
from formery.methods.decoding.draft.training import decoder_of, distilled_loss, guide_recipe
from formery.models import Model
from formery.models.guide import Guide
from formery.parts import Linear
from formery.train.objective import Batch

DEPTHS = 4
COLUMNS = 24  # places of each text of a batch that are learned from


class HiddenTransfer(Guide):
    """`x + W_i x + b_i` for each depth i, of the stream behind the first `layer` layers."""

    def __init__(self, width: int, vocabulary: int, layer: int, depths: int):
        super().__init__()
        self.width, self.vocabulary, self.layer, self.depths = width, vocabulary, layer, depths
        self.map = Linear(width, depths * width, bias=True, gain=0.1)

    def forward(self, stream: Float[Tensor, "... width"]) -> Float[Tensor, "... depths width"]:
        return stream[..., None, :] + self.map(stream).unflatten(-1, (self.depths, self.width))


class HiddenTransferDrafter(ParallelGuided):
    """Drafts the likeliest guesses: a chain, or with `width` above 1 a tree. In each text's first step it listens."""

    inside = True
    draft: HiddenTransfer

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes)

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        self.listening = Listening(target, self.draft.layer)
        self.stream: Float[Tensor, "batch width"] | None = None
        self.lengths: list[int] = []

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        self.listening.next_pass()
        self.lengths = [min(self.length, self.draft.depths, room) for room in rooms]
        if self.stream is None or max(self.lengths) < 1:
            return [Draft() for _ in rows]
        return super().propose(rows, self.lengths)

    def guesses(self, rows: Sequence[Row]) -> Float[Tensor, "batch depth width"]:
        assert self.stream is not None and self.target.hidden is not None
        state, time = self.target.state, max(self.lengths)
        before, positions = state.lengths, None
        if min(self.lengths) < time:
            ranges = [
                [*range(read, read + length), *[-1] * (time - length)]
                for read, length in zip(before, self.lengths, strict=True)
            ]
            positions = torch.tensor(ranges, device=self.stream.device)
        pseudo = self.draft(self.stream)[:, :time].to(self.target.hidden)
        with self.target.packing:
            context = self.listening.sections.enter(state, time, positions, before=1)
            found = self.listening.sections.run(1, pseudo, context)
        state.rollback(before)
        return found

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        between = self.listening.between
        assert between is not None
        places = [verdict.path[-1] + 1 if verdict.path else 0 for verdict in verdicts]
        self.stream = between[range(len(rows)), places].to(self.last)

    def select(self, rows: Sequence[int]) -> None:
        super().select(rows)
        if self.stream is not None:
            self.stream = self.stream[list(rows)]


METHOD = register(
    Method(
        "hidden-transfer",
        "vectors of the coming tokens, made up between two layers, are finished by the layers above",
        lossless=True,
        make=drafting(HiddenTransferDrafter),
        variants=("width=2:nodes=6",),
        paper="hidden-transfer",
    )
)


def make(model: Model, share: float = 0.75) -> HiddenTransfer:
    """Maps of four depths behind that share of a model's layers."""
    decoder = decoder_of(model)
    layer = max(1, min(round(share * len(decoder.layers)), len(decoder.layers) - 1))
    return HiddenTransfer(decoder.embedding.width, model.vocabulary, layer, DEPTHS)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each guess learns what the model says at its depth, and its vector there; deeper ones count less."""
    assert isinstance(guide, HiddenTransfer)
    columns, later = some_columns(guide, batch, 2, COLUMNS), 1 + torch.arange(guide.depths)
    rows, time = batch["tokens"].shape
    appended = len(columns) * guide.depths
    sections = Sections(decoder_of(model), [guide.layer])
    state, (_, between, _) = read(model, batch, sections, appended)
    pseudo = guide(between[:, columns]).flatten(1, 2)
    places = (columns[:, None] + later).flatten()
    positions = places.masked_fill(places >= time, -1).expand(rows, -1)
    # Each sees the text up to where it was made, and those before it that were made there.
    group, slots = columns.repeat_interleave(guide.depths), torch.arange(time + appended)
    own = (slots[time:] - time) // guide.depths == torch.arange(appended)[:, None] // guide.depths
    visible = torch.cat((slots[:time] <= group[:, None], own), 1).expand(rows, -1, -1)
    context = sections.enter(state, appended, positions, visible, before=1)
    found = sections.run(1, pseudo, context).unflatten(1, (len(columns), guide.depths))
    there = nn.functional.pad(batch["written"], (0, 2))[:, columns + 2]
    row, column = there.nonzero().unbind(-1)
    return distilled_loss(model, found[row, column], batch, torch.stack((row, columns[column]), -1), distance=0.1)


STEPS, TEXTS = 800, 8
for work in ("code", "translate"):
    guide_recipe(work, METHOD.name, make, objective, STEPS, batch_size=TEXTS)
for share, name in ((0.25, "early"), (0.5, "middle")):
    guide_recipe("code", f"{name}/{METHOD.name}", partial(make, share=share), objective, STEPS, batch_size=TEXTS)


def behind_other_layers(budget: Budget, name: str, seed: int) -> dict[str, float]:
    """Accepted in a call of the chain, with maps that were trained behind other layers by that recipe."""
    model, guide = model_named("code"), model_named(f"code/{name}/{METHOD.name}")
    prompts, _ = fitted(model, [guide], examples("code", budget.examples, seed), budget.max_new_tokens)
    outputs = generate(model, prompts, METHOD.name, draft=guide, batch=8, max_new_tokens=budget.max_new_tokens)
    return {"accepted_per_call": sum(one.accepted for one in outputs) / sum(one.calls for one in outputs)}


def check(budget: Budget) -> Measured:
    """A chain and a tree against token by token decoding and Medusa's heads; maps behind other layers."""
    tree, heads = f"{METHOD.name}:{METHOD.variants[0]}", f"medusa:{METHOD.variants[0]}"
    results = surveyed(budget, [METHOD.name, tree, "medusa", heads], PAPER.works)
    own = [one for one in results if one.setting.method.startswith(METHOD.name)]
    noted = []
    for name, layers in (("early", 2), ("middle", 4)):
        budget.units.expect(len(budget.seeds))
        values = [
            budget.units.measure(
                f"code, maps behind layer {layers}, seed {seed}", partial(behind_other_layers, budget, name, seed)
            )["accepted_per_call"]
            for seed in budget.seeds
        ]
        noted.append(Noted("code", f"{METHOD.name} behind layer {layers}", 8, {"accepted_per_call": spread(values)}))
    factor = untestable(
        "factor",
        "chat models of 7 and 13 billion parameters decode faster than with any other single-model method",
        ">",
        1.0,
        "needs such models, and hardware on which a few more tokens in a call are nearly free",
        essential=True,
    )
    return Measured(
        [
            lossless(own),
            *fewer_calls(own, PAPER.works),
            *accepts_more(results, METHOD.name, "medusa", PAPER.works, essential=True),
            *accepts_more(results, tree, heads, PAPER.works),
            *faster(own, PAPER.works),
            factor,
        ],
        [*rows_of(results), *noted],
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in (METHOD.name, "medusa"))],
        notes=[
            "Both guides have 0.26 million parameters. The maps learned the model's distribution and vectors, Medusa's "
            "heads its tokens.",
            "The maps are behind three quarters of the layers. Those behind a quarter and a half, trained when first "
            "needed, have a longer way to go at each draft.",
        ],
    )


PAPER = publish(
    Paper(
        slug="hidden-transfer",
        title="Parallel Decoding via Hidden Transfer for Lossless Large Language Model Acceleration",
        year=2024,
        part="decoding",
        domain="language",
        does="Linear maps make vectors of the coming tokens from the last one's, between two layers of a frozen model; "
        "the layers above let them attend to the text and finish them, and the model checks the guesses.",
        claims="Decoding is faster than by any other acceleration of a single model, Medusa and self-speculation "
        "among them, and the text is unchanged.",
        needs="Chat models of 7 and 13 billion parameters and a graphics card, for the size of the speed-up.",
        name="Hidden Transfer",
        training="added",
        sought="predict several tokens in one forward pass by pseudo hidden states; parallel LLM decoding lossless",
        related={
            "medusa": "several tokens guessed at once",
            "lexical-unit-decoding": "places for tokens to come",
            "ftp": "vectors that hold coming tokens",
            "falcon": "a block guessed at once",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
