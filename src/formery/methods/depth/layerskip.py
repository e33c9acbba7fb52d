"""LayerSkip: trained so that early layers can speak too, a model drafts with them and checks with the others.

Elhoushi, Shrivastava, Liskovich, Hosmer, Wasti, Lai, Mahmoud, Acun, Agarwal, Roman, Aly, Chen and Wu, "LayerSkip:
Enabling Early Exit Inference and Self-Speculative Decoding", 2024. While training, layer l of L is dropped for a
sequence with probability `p_l = most · (2^(l / (L - 1)) - 1)`, the last one the most, and one output, the model's own
norm and head, learns to read what every layer leaves:

    loss = Σ_l c(l) e(l) J(l) / Σ_l c(l) e(l)
    e(l) = scale · (0 + … + l) below the last layer, L - 1 + scale · (0 + … + L - 2) there

where J(l) is the cross entropy after layer l, and c(l) is 1 for the last layer and, in turn, for every `ROTATION`-th of
the others. Decoding drafts with the first `exit` layers; the check runs the others only, on what the first ones left:
keys, values and vectors.

The paper reports up to 2.16 times faster summaries, 1.82 times faster coding and 2.0 times faster parsing, less memory
than with a second model, and better early exits for some loss at the last layer.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from formery.data.batching import WindowBatches
from formery.data.works import work as work_named
from formery.errors import FormeryError
from formery.evidence.checks import Setting, criterion, model_named, survey, untestable
from formery.evidence.checks import rows as rows_of
from formery.evidence.measured import Budget, Measured, spread
from formery.evidence.measured import Row as Noted
from formery.evidence.paper import Paper, publish
from formery.generate.draft import Draft, Row
from formery.generate.method import Method, drafting, register
from formery.generate.selfdraft import SelfDrafter, Thin
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless
from formery.models import Decoder
from formery.parts import Context, KeyValues, Memory, State
from formery.train.continued import continued
from formery.train.objective import Batch, cross_entropy, targets
from formery.train.text import joined

ROTATION = 4  # early exits take turns
DROPPED = 0.1  # how often the last layer is dropped
SCALE = 1.0  # what early exits count for
STEPS = 400


class LayerSkipDrafter(SelfDrafter):
    """Drafts with the first `exit` layers, by default a quarter of them; the target goes on from there."""

    def __init__(self, length: int = 3, exit: int | None = None, confidence: float = 0.0):
        super().__init__(length, confidence)
        if exit is not None and exit < 1:
            raise FormeryError(f"the first layers that draft must be at least 1, not {exit}.")
        self.exit = exit

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        decoder, state = self.decoder, target.state
        layers = len(decoder.layers)
        exit_ = max(1, layers // 4) if self.exit is None else self.exit
        if exit_ >= layers:
            raise FormeryError(f"of {layers} layers at most {layers - 1} can draft, not {exit_}: give a smaller exit.")
        early, late = [*decoder.layers][:exit_], [*decoder.layers][exit_:]
        self.early, self.late = Thin(decoder, state, early, None), Thin(decoder, state, late, decoder.norm)
        self.norm = None if decoder.norm is None else Thin(decoder, state, [], decoder.norm)
        self.ran = Counter(part for layer in early for part in layer.modules() if hasattr(part, "start"))
        # A recurrent layer has forgotten what it made of guesses when these are taken back.
        self.reusing = {type(layer) for layer in state.layers.values()} <= {KeyValues, Memory}
        self.left: list[Float[Tensor, "batch 1 width"]] = []

    def thin(self, hidden: Float[Tensor, "batch time width"], context: Context) -> Float[Tensor, "batch time width"]:
        left = self.early(hidden, context)
        self.left.append(left)
        return left if self.norm is None else self.norm(left, context)

    def close(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> None:
        """Has the first layers read each row's last guess too, and the target begin behind them."""
        if not self.reusing:
            self.left = []
            return
        self.read([[*row.tokens[-1:], *draft.tokens][-1:] for row, draft in zip(rows, drafts, strict=True)])
        *before, last = self.left
        self.left = []
        counts = [len(draft.tokens) for draft in drafts]
        vectors = torch.cat([*before, torch.zeros_like(last)], 1)
        vectors[range(len(rows)), counts] = last[:, 0]

        def begun(
            tokens: Int[Tensor, "batch time"],
            state: State,
            positions: Int[Tensor, "batch time"] | None = None,
            visible: Bool[Tensor, "batch time slot"] | None = None,
        ) -> Float[Tensor, "batch time width"]:
            context = self.decoder.context(tokens.shape[1], state, positions, visible)
            context.turns.update(self.ran)
            return self.late(vectors[:, : tokens.shape[1]], context)

        self.target.begun = begun


METHOD = register(
    Method(
        "layerskip",
        "the first layers draft, the others go on from what they left",
        lossless=True,
        make=drafting(LayerSkipDrafter),
        variants=("exit=1",),
        paper="layerskip",
    )
)


def left_by_layers(
    model: Decoder, tokens: Int[Tensor, "batch time"], chance: torch.Generator | None = None
) -> list[Float[Tensor, "batch time width"]]:
    """What each layer leaves, from scratch. chance: draws which layers are dropped for which sequence, if any."""
    batch, time = tokens.shape
    positions = torch.arange(time, device=tokens.device).expand(batch, time)
    last = len(model.layers) - 1
    hidden = model.embedding(tokens, Context(positions, even=True))
    left = []
    for number, layer in enumerate(model.layers):
        running = torch.ones(batch, dtype=torch.bool)
        if chance is not None:
            running = torch.rand(batch, generator=chance) >= DROPPED * (2 ** (number / max(1, last)) - 1)
        rows = running.nonzero().flatten().to(tokens.device)
        if len(rows) == batch:
            hidden = layer(hidden, Context(positions, even=True))
        elif len(rows):
            hidden = hidden.index_copy(0, rows, layer(hidden[rows], Context(positions[rows], even=True)).to(hidden))
        left.append(hidden)
    return left


def exit_loss(model: Decoder, left: Float[Tensor, "batch time width"], batch: Batch) -> Float[Tensor, ""]:
    """The cross entropy of the next tokens by the model's own norm and output on what a layer left."""
    return cross_entropy(model.output(left if model.norm is None else model.norm(left)), targets(batch))


def objective(model: Decoder, batch: Batch) -> Float[Tensor, ""]:
    """The weighted mean of the losses of this step's exits; in evaluation of a quarter of the layers and of all."""
    last = len(model.layers) - 1
    if "step" not in batch:
        left = left_by_layers(model, batch["tokens"][:, :-1])
        return (exit_loss(model, left[last // 4], batch) + exit_loss(model, left[last], batch)) / 2
    step = int(batch["step"])
    left = left_by_layers(model, batch["tokens"][:, :-1], torch.Generator().manual_seed(step))
    weights = {layer: SCALE * layer * (layer + 1) / 2 for layer in range(last) if layer % ROTATION == step % ROTATION}
    weights[last] = last + SCALE * last * (last - 1) / 2
    total = sum(weight * exit_loss(model, left[layer], batch) for layer, weight in weights.items())
    assert isinstance(total, Tensor)
    return total / sum(weights.values())


RECIPE = continued(
    "code/layerskip",
    "the model `code`, trained on with layers dropped and early exits",
    lambda model, batch: None,
    objective,
    steps=STEPS,
)


def losses(budget: Budget) -> dict[str, list[float]]:
    """What the next token costs after each layer, on text that was not learned from: before and after the training."""
    found = {}
    for name in ("code", RECIPE.name):
        model = model_named(name)
        ids = joined(model.tokenizer, work_named("code").texts("test"))
        windows = WindowBatches(ids, 256, 8)
        with torch.inference_mode():
            per_batch = []
            for seed in budget.seeds:
                batch = windows.batch(seed)
                left = left_by_layers(model, batch["tokens"][:, :-1])
                per_batch.append([float(exit_loss(model, one, batch)) for one in left])
        for layer in range(len(per_batch[0])):
            found[f"{name}, layer {layer + 1}"] = [losses[layer] for losses in per_batch]
    return found


def check(budget: Budget) -> Measured:
    """Early exits before and after the training, and decoding with them against token by token and a second model."""
    budget.units.expect(1)
    by_layer = budget.units.measure("the loss after each layer", lambda: losses(budget))
    own = [f"{METHOD.name}:length=3:exit={exit}" for exit in (1, 2, 4)]
    trained_on = [Setting(one, model=RECIPE.name) for one in own]
    others = [Setting(own[1]), Setting("speculative-sampling:length=3", model=RECIPE.name)]
    results = survey(budget, [*trained_on, *others], PAPER.works)
    skipping = [one for one in results if one.setting in trained_on]

    def difference(layer: int) -> list[float]:
        names = (f"{name}, layer {layer}" for name in (RECIPE.name, "code"))
        return [after - before for after, before in zip(*(by_layer[name] for name in names), strict=True)]

    factor = untestable(
        "factor",
        "a model of 7 billion parameters goes on with code at least 1.82 times as fast",
        ">=",
        1.82,
        "needs such a model, and hardware on which a call costs the reading of the weights",
        essential=True,
    )
    return Measured(
        [
            lossless(results),
            criterion(
                "earlier",
                "after the training a quarter of the layers costs fewer nats a token",
                difference(2),
                "<",
                0.0,
            ),
            criterion("last", "all layers together cost at most 0.05 nats a token more", difference(8), "<=", 0.05),
            *fewer_calls(skipping, PAPER.works),
            *accepts_more(results, trained_on[1].label, others[0].label, PAPER.works),
            *faster(skipping, PAPER.works),
            factor,
        ],
        [*rows_of(results), *(Noted("code", name, 1, {"loss": spread(values)}) for name, values in by_layer.items())],
        baseline="greedy decoding of the same model, token by token",
        models=["code", "code-draft"],
        notes=[f"`{RECIPE.name}` is the model `code`, trained on for {STEPS} steps; it is trained when first needed."],
    )


PAPER = publish(
    Paper(
        slug="layerskip",
        title="LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding",
        year=2024,
        part="depth",
        domain="language",
        does="A model is trained with later layers dropped more often and with losses at early exits through its one "
        "output; its first layers then draft, and the others check, going on from what the first ones left.",
        claims="Early exits get better with no part added; summaries come up to 2.16 times faster, code 1.82 and "
        "parses 2.0 times, with less memory than a second model takes.",
        needs="Llama models of 1 to 70 billion parameters and a graphics card, for the size of the speed-up.",
        name="LayerSkip",
        training="whole",
        sought="early exit for LLMs; self-speculative decoding; train with layer dropout for faster inference",
        related={
            "swift": "the model drafts for itself",
            "mue": "early exit",
            "unified-layer-skipping": "layers skipped",
            "m2r2": "early layers draft",
        },
        added="2026-11-27",
        check=check,
        works=("code",),
    )
)
