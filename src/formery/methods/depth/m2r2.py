"""M2R2: beside the stream of a frozen model a second one runs ahead of it, and drafts.

Bhendawade, Najibi, Naik and Belousova, "M2R2: Mixture of Multi-Rate Residuals for Efficient Transformer Inference",
2025. `h_i` is the model's stream of vectors behind i of its L layers. An accelerated stream goes through the same
layers, with a low-rank adapter behind each,

    p_0 = h_0        q = layer_i(p_{i-1})        p_i = q + down_i(silu(up_i(norm_i(q))))        p_i ≈ h_{R·i}

R being its rate. It has no keys and values of its own: each layer lets it attend to those of the slow stream. After
L / R layers it stands where the slow one will stand at the end, so that the model's own norm and output make a guess of
it. Only the adapters are trained, on what the frozen model makes of its own text: the distance of each `p_i` to
`h_{R·i}`, and the model's whole distribution behind the last one.

Decoding, both streams of a token go through the first layers; when the draft is made, the slow one goes on from there
through the others for all guesses at once, which checks them. The rate here is 2. The adapters' form and
place, and the weights of the losses, are of this file: no code of the authors was found.

The paper reports up to 2.8 times faster decoding by such drafts, more than by a second model, Medusa, look-ahead
decoding and DEED; a better balance of speed and quality than exits and skipped layers; and 2.9 times where experts of a
mixture are fetched ahead of time by what the accelerated stream asks for.
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.evidence.checks import criterion, examples, model_named, untestable
from formery.evidence.checks import rows as rows_of
from formery.evidence.measured import Budget, Measured, spread
from formery.evidence.measured import Row as Noted
from formery.evidence.paper import Paper, publish
from formery.evidence.race import fitted
from formery.generate import generate
from formery.generate.draft import Draft, Row
from formery.generate.guided import check_guide
from formery.generate.method import Method, drafting, register
from formery.generate.selfdraft import SelfDrafter, Thin
from formery.generate.settings import Settings
from formery.generate.target import Target, device_of
from formery.generate.within import Sections
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.inside import read, some_columns
from formery.methods.decoding.draft.training import decoder_of, distilled_loss, guide_recipe
from formery.models import Model
from formery.models.guide import Guide
from formery.parts import MLP, KeyValues, Memory, PreNorm, RMSNorm
from formery.train.objective import Batch

RATE = 2
RANK = 128
COLUMNS = 64  # places of each text of a batch that are learned from


class Accelerator(Guide):
    """An adapter of its rank behind each of the first layers; none where that is 0."""

    def __init__(self, width: int, vocabulary: int, ranks: Sequence[int]):
        super().__init__()
        self.width, self.vocabulary, self.ranks = width, vocabulary, tuple(ranks)
        self.adapters = nn.ModuleList(PreNorm(RMSNorm(width), MLP(width, rank, "silu")) for rank in ranks if rank)

    def behind(self, layer: int) -> nn.ModuleList:
        """The adapter behind that layer, if there is one."""
        number = sum(rank > 0 for rank in self.ranks[:layer])
        return nn.ModuleList(self.adapters[number : number + (self.ranks[layer] > 0)])


class AcceleratedDrafter(SelfDrafter):
    """Drafts a chain with the accelerated stream; the target goes on from what the slow stream has left."""

    def __init__(self, draft: Guide, length: int = 2, confidence: float = 0.0):
        super().__init__(length, confidence)
        self.draft = draft

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        check_guide(target, self.draft)
        super().begin(target, rows, settings)
        assert isinstance(self.draft, Accelerator)
        decoder, state, count = self.decoder, target.state, len(self.draft.ranks)
        if not {type(layer) for layer in state.layers.values()} <= {KeyValues, Memory}:
            raise FormeryError("m2r2 shares keys and values between two streams: take a model of attention layers.")
        self.sections = Sections(decoder, [count], state)
        parts = [part for layer in range(count) for part in (decoder.layers[layer], *self.draft.behind(layer))]
        self.accelerated = Thin(decoder, state, parts, decoder.norm)
        self.left: list[Float[Tensor, "batch 1 width"]] = []

    def read(self, rows: Sequence[Sequence[int]]) -> Float[Tensor, "batch 1 width"]:
        """One more token of each row, or none, in both streams, of which the slow one is remembered."""
        state, device, before = self.target.state, device_of(self.decoder), self.target.state.lengths
        at = torch.tensor([[n if row else -1] for row, n in zip(rows, before, strict=True)], device=device)
        with self.target.packing:
            context = self.sections.enter(state, 1, None if all(rows) else at)
            entered = self.sections.entered(torch.tensor([row or [0] for row in rows], device=device), context)
            self.left.append(self.sections.run(0, entered, context))
            # The accelerated one lies behind the slow one, at the same position, and nobody sees it, not even itself.
            visible = torch.ones(len(rows), 1, state.slots.filled + 1, dtype=torch.bool, device=device)
            visible[range(len(rows)), :, state.slots.used] = False
            fast = self.accelerated(entered, self.sections.enter(state, 1, at, visible))
        state.settle([[] for _ in rows])
        if not all(rows):
            state.rollback([length + len(row) for length, row in zip(before, rows, strict=True)])
        return fast.to(self.decoder.embedding.weight.dtype)

    def close(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> None:
        """Has the slow stream read each row's last guess too, and the target begin behind the first layers."""
        lasts = [[*row.tokens[-1:], *draft.tokens][-1:] for row, draft in zip(rows, drafts, strict=True)]
        tokens = torch.tensor(lasts, device=device_of(self.decoder))
        with self.target.packing:
            context = self.sections.enter(self.target.state, 1)
            last = self.sections.run(0, self.sections.entered(tokens, context), context)
        vectors = torch.cat([*self.left, torch.zeros_like(last)], 1)
        vectors[range(len(rows)), [len(draft.tokens) for draft in drafts]] = last[:, 0]
        self.target.begun = self.sections.going_on(1, vectors)
        self.left = []


METHOD = register(
    Method(
        "m2r2",
        "a second stream runs ahead through the first layers, with adapters, and drafts",
        lossless=True,
        make=drafting(AcceleratedDrafter),
        variants=("length=3:confidence=0.6",),
        paper="m2r2",
    )
)


def make(model: Model) -> Accelerator:
    """Adapters of equal rank behind the first half of a model's layers."""
    decoder = decoder_of(model)
    return Accelerator(decoder.embedding.width, model.vocabulary, [RANK] * -(-len(decoder.layers) // RATE))


def make_at_the_exit(model: Model) -> Accelerator:
    """A single adapter, of as many parameters, behind the last of those layers: an early exit."""
    count = len(make(model).ranks)
    decoder = decoder_of(model)
    return Accelerator(decoder.embedding.width, model.vocabulary, [0] * (count - 1) + [RANK * count])


def streams(
    model: Model, guide: Accelerator, batch: Batch, columns: Int[Tensor, "column"]
) -> tuple[list[Float[Tensor, "batch column width"]], list[Float[Tensor, "batch column width"]]]:
    """Both streams at these places of texts, before all layers and behind each; the accelerated one first."""
    decoder = decoder_of(model)
    time = batch["tokens"].shape[1]
    sections = Sections(decoder, range(1, len(decoder.layers) + 1))
    state, slow = read(model, batch, sections, len(columns))
    # Each place attends to the slow stream up to itself, and to nothing that is appended.
    visible = (torch.arange(time + len(columns)) < time).expand(len(batch["tokens"]), len(columns), -1)
    context = sections.enter(state, len(columns), batch["positions"][:, columns], visible)
    fast = [slow[0][:, columns]]
    for layer in range(len(guide.ranks)):
        vectors = sections.run(layer, fast[-1], context)
        for adapter in guide.behind(layer):
            vectors = adapter(vectors, context)
        fast.append(vectors)
    return fast, [one[:, columns] for one in slow[:-1]]


def normed(model: Model, vectors: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
    """Behind the model's last norm."""
    norm = decoder_of(model).norm
    found: Tensor = vectors if norm is None else norm(vectors)
    return found


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """What the model says, and how far each layer is from where the slow stream will be, in shares of its length."""
    assert isinstance(guide, Accelerator)
    columns = some_columns(guide, batch, 1, COLUMNS)
    fast, slow = streams(model, guide, batch, columns)
    row, column = batch["written"][:, columns + 1].nonzero().unbind(-1)
    at = torch.stack((row, columns[column] - 1), -1)
    loss = distilled_loss(model, normed(model, fast[-1])[row, column][:, None], batch, at, distance=0.1)
    apart = []
    for depth, rank in enumerate(guide.ranks, 1):
        if rank:
            wanted = slow[min(RATE * depth, len(slow) - 1)][row, column]
            apart.append((fast[depth][row, column] - wanted).square().sum(-1) / wanted.square().sum(-1))
    return loss + torch.stack(apart).mean()


STEPS, TEXTS = 800, 8
for work in ("code", "translate"):
    guide_recipe(work, METHOD.name, make, objective, STEPS, batch_size=TEXTS)
guide_recipe("code", f"exit/{METHOD.name}", make_at_the_exit, objective, STEPS, batch_size=TEXTS)


@torch.inference_mode()
def alignment(budget: Budget, seed: int) -> dict[str, float]:
    """Where both streams of `code` are behind each of the first layers, at the places where it wrote: their means.

    How alike (cosine) each is to the slow stream behind RATE times as many layers, and how often the model's norm and
    output make of it what the model says in the end; of an adapter at the exit alone, the last.
    """
    model, guide, single = (model_named(name) for name in ("code", "code/m2r2", "code/exit/m2r2"))
    prompts, _ = fitted(model, [], examples("code", budget.examples, seed), budget.max_new_tokens)
    texts = [model.tokenizer.prompt(one) if isinstance(one, str) else one for one in prompts]
    found: dict[str, list[Tensor]] = {}
    for one in generate(model, texts, batch=8, max_new_tokens=budget.max_new_tokens):
        tokens = torch.tensor([[*one.prompt, *one.tokens]])
        batch, at = {"tokens": tokens, "positions": torch.arange(tokens.shape[1])[None]}, slice(len(one.prompt) - 1, -1)
        columns = torch.arange(tokens.shape[1])[at]
        fast, slow = streams(model, guide, batch, columns)
        exited, _ = streams(model, single, batch, columns)

        def agrees(vectors: Tensor, last: Tensor = slow[-1]) -> Tensor:
            first, second = (model.logits(normed(model, one)).argmax(-1) for one in (vectors, last))
            return (first == second).float().flatten()

        for depth in range(1, len(fast)):
            ahead = slow[min(RATE * depth, len(slow) - 1)]
            for name, vectors in (("accelerated", fast[depth]), ("slow", slow[depth])):
                alike = nn.functional.cosine_similarity(vectors, ahead, -1).flatten()
                found.setdefault(f"{name} {depth} alike", []).append(alike)
                found.setdefault(f"{name} {depth} agrees", []).append(agrees(vectors))
        found.setdefault("exit agrees", []).append(agrees(exited[-1]))
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def check(budget: Budget) -> Measured:
    """Both streams behind each layer, and drafts of the accelerated one against token by token and Medusa's heads."""
    results = surveyed(budget, [f"{METHOD.name}:length=2", f"{METHOD.name}:{METHOD.variants[0]}", "medusa:length=3"])
    own = [one for one in results if one.setting.method.startswith(METHOD.name)]
    measure, seeds = budget.units.measure, budget.seeds
    budget.units.expect(len(seeds))
    seen = [measure(f"both streams, seed {seed}", partial(alignment, budget, seed)) for seed in seeds]
    depths = range(1, 1 + len(model_named("code/m2r2").ranks))

    def more(name: str, other: str) -> list[float]:
        return [one[name] - one[other] for one in seen]

    alike = [value for depth in depths for value in more(f"accelerated {depth} alike", f"slow {depth} alike")]
    last = f"accelerated {depths[-1]} agrees"
    agreeing, beside = more(last, f"slow {depths[-1]} agrees"), more(last, "exit agrees")
    untested = [
        untestable(
            "factor",
            "chat models of 7 billion parameters and more are decoded at least 2.8 times as fast",
            ">=",
            2.8,
            "needs such a model, and hardware on which a call costs the reading of the weights",
            essential=True,
        ),
        untestable(
            "experts",
            "a mixture of experts decodes at least 2.9 times as fast when experts are fetched ahead of time",
            ">=",
            2.9,
            "needs a model whose experts do not fit into the fast memory that they are fetched into",
        ),
    ]
    return Measured(
        [
            lossless(own),
            criterion("ahead", "behind each layer it is more like the later slow stream", alike, ">", 0, True),
            criterion("agrees", "half-way it agrees more often with the end than an exit", agreeing, ">", 0, True),
            criterion("along the way", "so it does more than an exit with one adapter as large", beside, ">", 0),
            *fewer_calls(own),
            *accepts_more(results, f"{METHOD.name}:length=2", "medusa:length=3"),
            *faster(own),
            *untested,
        ],
        [*rows_of(results), *(Noted("code", name, 8, {"mean": spread(one[name] for one in seen)}) for name in seen[0])],
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in (METHOD.name, "medusa"))],
        notes=[
            "A guess takes half of the layers, twice over: on a processor, where a call of a small model is little but "
            "its layers, that is most of what a token costs anyway.",
            "The single adapter at the exit is trained when first needed.",
        ],
    )


PAPER = publish(
    Paper(
        slug="m2r2",
        title="M2R2: Mixture of Multi-Rate Residuals for Efficient Transformer Inference",
        year=2025,
        part="depth",
        domain="language",
        does="Beside the stream of a frozen model a second one passes the same layers with low-rank adapters, attends "
        "to the first one's keys and values, and is to be where that will be after twice as many layers; it drafts.",
        claims="Decoding is up to 2.8 times faster by its drafts, more than by a second model, Medusa or look-ahead "
        "decoding, and 2.9 times with experts fetched ahead; early answers are better than those of exits.",
        needs="Chat models of 7 billion parameters, a mixture of experts that does not fit, and a graphics card.",
        name="M2R2",
        training="added",
        sought="early exit without waiting; accelerate token generation by residual adaptation; "
        "draft from early layers",
        related={
            "layerskip": "early layers draft",
            "swift": "the model drafts for itself",
            "mue": "early exit",
            "first": "less depth for easy tokens",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
