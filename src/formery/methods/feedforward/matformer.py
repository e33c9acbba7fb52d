"""MatFormer: feed-forwards whose first hidden units are feed-forwards by themselves, for models of many sizes in one.

Devvrit, Kudugunta, Kusupati, Dettmers, Chen, Dhillon, Tsvetkov, Hajishirzi, Kakade, Farhadi and Jain, "MatFormer:
Nested Transformer for Elastic Inference", 2024. Of the hidden units of each feed-forward the first eighth, quarter and
half are one too: `down[:, :m] · (activation(gate[:m] · x) * (up[:m] · x))`. Each step of training draws one size for
all layers. Then each layer may take another size ("Mix'n'Match"), and a small size drafts for the whole: attention is
the same, so they share keys and values.

Here the model `code` is trained on. Its hidden units are first put in the order of their importance,
`mean |unit| · ‖down[:, unit]‖`, which changes nothing for the whole. The paper trains from scratch; it reports that
sub-models of 1.5 to 2.6 billion parameters are as good as models trained by themselves, and that drafting with them
decodes faster than with a separate draft.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.data.batching import WindowBatches
from formery.data.works import work as work_named
from formery.errors import FormeryError
from formery.evidence.checks import Setting, criterion, model_named, survey, untestable
from formery.evidence.checks import rows as rows_of
from formery.evidence.measured import Budget, Measured, spread
from formery.evidence.measured import Row as Noted
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Row
from formery.generate.method import Method, drafting, register
from formery.generate.selfdraft import SelfDrafter, Thin, sublayers
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless
from formery.models import Decoder
from formery.parts import MLP, Context, GatedMLP, Linear, Nested, Parallel, Part, PostNorm, PreNorm, Sandwich
from formery.parts.nested import first_units
from formery.parts.part import activation as function
from formery.train.continued import continued
from formery.train.objective import Batch, cross_entropy, next_token, targets
from formery.train.text import joined

PARTS = (1 / 8, 1 / 4, 1 / 2, 1.0)  # of the hidden units, that are a feed-forward each
STEPS = 400


class MatFormerDrafter(SelfDrafter):
    """Drafts with the first `share` of all feed-forwards' hidden units."""

    def __init__(self, length: int = 3, share: float = 0.125, confidence: float = 0.0):
        super().__init__(length, confidence)
        if not 0 < share <= 1:
            raise FormeryError(f"the share of hidden units that draft must lie above 0 and not above 1, not {share}.")
        self.share = share

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        whole = sublayers(self.decoder)
        try:
            parts = [smaller(part, self.share) for part in whole]
        except ValueError as error:
            raise FormeryError(f"matformer cannot draft with this model: {error}.") from error
        if all(own is part for own, part in zip(parts, whole, strict=True)) and self.share < 1:
            raise FormeryError("this model has no feed-forward of which a part could draft.")
        self.small = Thin(self.decoder, target.state, parts, self.decoder.norm)

    def thin(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        return self.small(hidden, context)


def smaller(part: nn.Module, share: float) -> nn.Module:
    """A residual part with the first hidden units of its feed-forwards; itself where it has none."""
    if not isinstance(part, PreNorm | PostNorm | Sandwich | Parallel):
        return part
    inners = part.inners if isinstance(part, Parallel) else [part.inner]
    cuts = [cut(inner, share) for inner in inners]
    if all(own is inner for own, inner in zip(cuts, inners, strict=True)):
        return part
    given = {name: getattr(part, name) for name in part.parameters_of_constructor()}
    twin = type(part)(**{**given, **({"inners": cuts} if isinstance(part, Parallel) else {"inner": cuts[0]})})
    twin.training = part.training
    return twin


def cut(inner: nn.Module, share: float) -> nn.Module:
    """The first hidden units of a feed-forward; any other part as it is."""
    whole = inner.alone() if isinstance(inner, Nested) else inner
    return first_units(whole, max(1, round(share * whole.hidden))) if isinstance(whole, MLP | GatedMLP) else inner


METHOD = register(
    Method(
        "matformer",
        "the first hidden units of the feed-forwards draft",
        lossless=True,
        make=drafting(MatFormerDrafter),
        variants=("share=0.125", "share=0.25"),
        paper="matformer",
    )
)


def nested(model: Decoder) -> list[Nested]:
    """The nested feed-forwards of all layers."""
    return [part for part in model.modules() if isinstance(part, Nested)]


def take(model: Decoder, share: float) -> None:
    """Has all feed-forwards use that share of their hidden units."""
    for part in nested(model):
        hidden = part.sizes[-1]
        part.taken = None if share == 1 else round(share * hidden)


def nest(model: Decoder, batch: Batch) -> None:
    """Puts the hidden units in the order of their importance on a batch, and has them nested."""
    found: dict[GatedMLP, Float[Tensor, "hidden"]] = {}

    def listen(part: nn.Module, inputs: tuple[Tensor, ...], made: Tensor) -> None:
        assert isinstance(part, GatedMLP)
        units = function(part.activation)(part.gate(inputs[0])) * part.up(inputs[0])
        found[part] = units.abs().flatten(0, -2).mean(0) * weights(part.down).norm(dim=0)

    parts = [part for part in model.modules() if isinstance(part, GatedMLP)]
    hooks = [part.register_forward_hook(listen) for part in parts]
    with torch.no_grad():
        model(batch["tokens"])
        for part in parts:
            order = found[part].argsort(descending=True)
            for one in (part.gate, part.up):
                weights(one).copy_(weights(one)[order])
            weights(part.down).copy_(weights(part.down)[:, order])
    for hook in hooks:
        hook.remove()
    for outer in list(model.modules()):
        inner = getattr(outer, "inner", None)
        if isinstance(inner, GatedMLP) and isinstance(outer, Part):
            outer.replace("inner", Nested(inner, [round(share * inner.hidden) for share in PARTS]))


def weights(part: Linear) -> Tensor:
    """The weights of a map, which are no codes."""
    assert isinstance(part.weight, Tensor)
    return part.weight


def objective(model: Decoder, batch: Batch) -> Float[Tensor, ""]:
    """The loss at the size that this step draws; in evaluation the mean over all sizes."""
    drawn = [random.Random(int(batch["step"])).choice(PARTS)] if "step" in batch else PARTS
    losses = []
    for share in drawn:
        take(model, share)
        losses.append(next_token(model, batch))
    take(model, 1)
    return torch.stack(losses).mean()


def quarter(model: Decoder, batch: Batch) -> None:
    """Leaves the model with the first quarter of its hidden units, in the same order, to be trained by itself."""
    nest(model, batch)
    take(model, 1 / 4)
    for part in list(model.modules()):
        inner = getattr(part, "inner", None)
        if isinstance(inner, Nested) and isinstance(part, Part):
            part.replace("inner", inner.alone().requires_grad_())


NESTED = continued(
    "code/matformer", "the model `code`, trained on with nested feed-forwards", nest, objective, steps=STEPS
)
ALONE = continued("code/matformer-quarter", "its smaller form, trained on alone", quarter, next_token, steps=STEPS)


def measured(budget: Budget) -> dict[str, list[float]]:
    """Losses and agreement with the whole on text that was not learned from, a value for each seed."""
    model, alone, before, draft = (model_named(name) for name in (NESTED.name, ALONE.name, "code", "code-draft"))
    windows = WindowBatches(joined(model.tokenizer, work_named("code").texts("test")), 256, 8)
    found: dict[str, list[float]] = {}

    def note(name: str, model: Decoder, batch: Batch, whole: Tensor | None = None) -> Tensor:
        logits = model(batch["tokens"][:, :-1])
        found.setdefault(f"loss, {name}", []).append(float(cross_entropy(logits, targets(batch))))
        choices: Tensor = logits.argmax(-1)
        if whole is not None:
            found.setdefault(f"agreement, {name}", []).append(float((choices == whole).double().mean()))
        return choices

    for seed in budget.seeds:
        batch = windows.batch(seed)
        note("code", before, batch)
        note("quarter alone", alone, batch)
        whole = note("whole", model, batch)
        for share, name in ((1 / 8, "eighth"), (1 / 4, "quarter"), (1 / 2, "half")):
            take(model, share)
            note(name, model, batch, whole)
        for part in nested(model)[: len(nested(model)) // 2]:
            part.taken = part.sizes[1]
        note("quarter, then half", model, batch)
        take(model, 1)
        note("code-draft", draft, batch, whole)
    return found


def check(budget: Budget) -> Measured:
    """Sub-models against one that was trained alone, and as drafters against an independent draft."""
    budget.units.expect(1)
    with torch.inference_mode():
        found = budget.units.measure("losses and agreement", lambda: measured(budget))
    names = [f"{METHOD.name}:length=3:{one}" for one in METHOD.variants]
    own = [Setting(name, model=NESTED.name) for name in names]
    other = Setting("speculative-sampling:length=3", model=NESTED.name)
    results = survey(budget, [*own, other, Setting(names[0])], PAPER.works)
    nesting = [one for one in results if one.setting in own]

    def less(first: str, *others: str) -> list[float]:
        means = [sum(values) / len(values) for values in zip(*(found[other] for other in others), strict=True)]
        return [one - mean for one, mean in zip(found[first], means, strict=True)]

    size = untestable(
        "size",
        "nested models of 1.5 to 2.6 billion parameters cost at most as much a token as those trained alone",
        "<=",
        0.0,
        "needs training such models from scratch, each size by itself",
        essential=True,
    )
    return Measured(
        [
            lossless(results),
            criterion(
                "nested",
                "a quarter of the hidden units costs at most 0.05 nats a token more than when it is trained alone",
                less("loss, quarter", "loss, quarter alone"),
                "<=",
                0.05,
            ),
            criterion(
                "whole",
                "the whole costs at most 0.05 nats a token more than before it was nested",
                less("loss, whole", "loss, code"),
                "<=",
                0.05,
            ),
            criterion(
                "mixed",
                "a quarter in the first layers and a half in the others cost at most the mean of both alone",
                less("loss, quarter, then half", "loss, quarter", "loss, half"),
                "<=",
                0.0,
            ),
            criterion(
                "agreement",
                "an eighth agrees with the whole on more tokens than an independent draft does",
                less("agreement, eighth", "agreement, code-draft"),
                ">",
                0.0,
            ),
            *accepts_more(results, own[0].label, other.label, PAPER.works),
            *fewer_calls(nesting, PAPER.works),
            *faster(nesting, PAPER.works),
            size,
        ],
        [*rows_of(results), *(Noted("code", name, 1, {"value": spread(values)}) for name, values in found.items())],
        baseline="greedy decoding of the same model, token by token",
        models=["code", "code-draft"],
        notes=[
            f"`{NESTED.name}` and `{ALONE.name}` are the model `code`, trained on for {STEPS} steps when needed.",
            "Only the feed-forwards get smaller: attention and the output, half of the work here, stay as they are.",
        ],
    )


PAPER = publish(
    Paper(
        slug="matformer",
        title="MatFormer: Nested Transformer for Elastic Inference",
        year=2024,
        part="feedforward",
        domain="general",
        does="The first hidden units of each feed-forward are trained to be a feed-forward by themselves, so that one "
        "model holds many smaller ones, of which a small one drafts for the whole and shares its attention's cache.",
        claims="A model of 2.6 billion parameters yields ones from 1.5 billion on that are as good as those trained "
        "alone; image encoders keep their metric space; drafting with a part of the model decodes faster still.",
        needs="Training of models of billions of parameters, each size by itself too; images for the encoders.",
        name="MatFormer",
        training="whole",
        sought="one training run, many model sizes; elastic inference; extract smaller models without retraining",
        related={
            "slimmable-multi-task": "many sizes in one model",
            "tleg": "many models from one",
            "layerskip": "the model drafts for itself",
            "spark-transformer": "part of the feed-forward at work",
        },
        added="2026-11-27",
        check=check,
        works=("code",),
    )
)
