"""Training a guide on a frozen model: the one training loop, on the model's own text, and its recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formery.data.works import work as work_named
from formery.methods.decoding.draft.own_text import OwnBatches, OwnText, contexts, own_text
from formery.models import Decoder, EncoderDecoder, Guide, Model, load
from formery.train.loop import train
from formery.train.objective import Batch, mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Recipe, Trained, register
from formery.train.text import framed, joined

HELD_OUT = 128  # texts that are not learned from
CONTEXT, WRITTEN = 160, 96  # tokens that a text model is given, and writes
ANSWER = 48  # that a translator writes at most
TEXTS = {"code": 3072, "translate": 8192}

LICENCES = {
    "code": "Python Software Foundation License 2.0 (the text that the model was trained on and goes on with)",
    "translate": "research only (captions of Flickr30k, by way of Multi30k)",
}
GuideObjective = Callable[[Model, nn.Module, Batch], Float[Tensor, ""]]


def texts_of(name: str, model: Model) -> OwnText:
    """What the shipped model of that name writes on the train split of its work."""
    assert model.tokenizer is not None
    texts = work_named(name).texts("train")
    if not model.reads_apart:
        return own_text(model, contexts(joined(model.tokenizer, texts), CONTEXT, TEXTS[name]), WRITTEN)
    sources = model.tokenizer.encode_batch([source for source, _ in texts][: TEXTS[name]])
    return own_text(model, [framed(model.tokenizer, one)[1:] for one in sources], ANSWER)


def train_guide(
    name: str,
    make: Callable[[Model], Guide],
    objective: GuideObjective,
    plan: Plan,
    out: Path,
    max_steps: int | None,
    resume: bool,
    batch_size: int = 16,
) -> Trained:
    """Trains a guide for the shipped model of that name into `out`; the model's weights stay as they are.

    objective: (model, guide, batch) -> loss, the batch being one of `OwnBatches`.
    """
    model = frozen(load(name))
    torch.manual_seed(plan.seed)
    guide = make(model)
    held_out, learned = texts_of(name, model).split(HELD_OUT)
    objective_ = partial(objective, model)
    batches = OwnBatches(learned, batch_size, plan.seed)
    evaluate = mean_loss(objective_, [OwnBatches(held_out, batch_size).batch(i) for i in range(HELD_OUT // batch_size)])
    result = train(guide, objective_, batches, plan, out, evaluate, stop_after=max_steps, resume=resume)
    return Trained(guide, result, plan.steps, (plan,), name, LICENCES[name])


def guide_recipe(
    target: str,
    method: str,
    make: Callable[[Model], Guide],
    objective: GuideObjective,
    steps: int = 1000,
    learning_rate: float = 2e-3,
    batch_size: int = 16,
) -> Recipe:
    """Registers the recipe "target/method", which trains a guide for the shipped model `target`."""
    plan = Plan(
        steps=steps,
        learning_rate=learning_rate,
        warmup=min(50, steps),
        weight_decay=0.05,
        final_learning_rate_ratio=0.02,
        precision="bfloat16",
        evaluate_every=250,
        checkpoint_every=250,
        label=f"{target}/{method}",
    )

    def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
        return train_guide(target, make, objective, plan, out, max_steps, resume, batch_size)

    description = f"a guide by which {method} drafts for the model `{target}`"
    return register(Recipe(plan.label, description, run, (make, objective)))


def frozen(model: Model) -> Model:
    """The model, whose weights take no gradient from here on."""
    return model.requires_grad_(False).eval()


def decoder_of(model: Model) -> Decoder:
    """The part that writes."""
    return model.decoder if isinstance(model, EncoderDecoder) else model


@dataclass(frozen=True)
class Ahead:
    """Places of a batch and what comes after them.

    hidden: the model's vectors there. token: the one after each place, which is known when guessing begins. coming: the
    tokens after that one, one for each depth; there: whether they are in the text.
    """

    hidden: Float[Tensor, "place width"]
    token: Int[Tensor, "place"]
    coming: Int[Tensor, "place depth"]
    there: Bool[Tensor, "place depth"]


def ahead(batch: Batch, depth: int) -> Ahead:
    """All places whose guesses would be of tokens that the model wrote itself."""
    tokens, written = batch["tokens"], batch["written"]
    padded = nn.functional.pad(tokens, (0, depth + 1))
    known = nn.functional.pad(written, (0, depth + 1))
    coming = torch.stack([padded[:, 2 + i : 2 + i + tokens.shape[1]] for i in range(depth)], -1)
    there = torch.stack([known[:, 2 + i : 2 + i + tokens.shape[1]] for i in range(depth)], -1)
    rows = there[..., 0]
    return Ahead(batch["hidden"][rows], padded[:, 1 : tokens.shape[1] + 1][rows], coming[rows], there[rows])


def guess_loss(
    model: Model, vectors: Float[Tensor, "place depth width"], coming: Int[Tensor, "place depth"], there: Tensor
) -> Float[Tensor, ""]:
    """The mean cross entropy of the tokens that came, by the model's own output, deeper ones counting less.

    The loss at depth i counts `0.8^i` times (as in "Medusa", 2024, section 2.2.1).
    """
    depth = coming.shape[1]
    counted = 0.8 ** torch.arange(depth) * there
    logits = decoder_of(model).logits(vectors[there])
    losses = nn.functional.cross_entropy(logits.float(), coming[there], reduction="none")
    return (losses * counted[there]).sum() / counted.sum()


def next_vectors(model: Model, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an attending guide reads at each token: the vector there, the embedding of the token after it, positions.

    The last tells at which tokens the one that is guessed there, two further on, was written by the model.
    """
    tokens, hidden, positions = batch["tokens"], batch["hidden"], batch["positions"]
    embedded = decoder_of(model).embedding.looked_up(tokens[:, 1:])
    written = nn.functional.pad(batch["written"], (0, 1))[:, 2:]
    return hidden[:, :-1], embedded, positions[:, :-1], written


def vector_loss(
    model: Model, found: Float[Tensor, "batch time width"], batch: Batch, written: Tensor, distance: float = 0.1
) -> Float[Tensor, ""]:
    """The cross entropy of the tokens that came, plus `distance` times the smooth distance to the model's vectors."""
    coming = nn.functional.pad(batch["tokens"], (0, 1))[:, 2:]
    logits = decoder_of(model).logits(found[written])
    tokens = nn.functional.cross_entropy(logits.float(), coming[written])
    apart = nn.functional.smooth_l1_loss(found[written], batch["hidden"][:, 1:][written])
    return tokens + distance * apart


def distilled_loss(
    model: Model,
    found: Float[Tensor, "place depth width"],
    batch: Batch,
    at: Int[Tensor, "place 2"],
    distance: float = 0.0,
    counting: Bool[Tensor, "place depth"] | None = None,
) -> Float[Tensor, ""]:
    """How far the model's output on the guesses is from what the model itself says, deeper ones counting less.

    found: guesses of the model's vectors at the tokens after those at `at` (text, place). What is learned is half the
    token that came and half the model's whole distribution, plus `distance` times the smooth distance to its vectors.
    The loss at depth i counts `0.8^i` times. counting: the guesses that are learned from, by default all.
    """
    depths = torch.arange(found.shape[1])
    text, later = at[:, :1], at[:, 1:] + 1 + depths
    padding = found.shape[1] + 1
    written = nn.functional.pad(batch["written"], (0, padding))
    hidden = nn.functional.pad(batch["hidden"], (0, 0, 0, padding))
    coming = nn.functional.pad(batch["tokens"], (0, padding))
    there = written[text, later + 1]
    if counting is not None:
        there = there & counting
    output = decoder_of(model).output
    with torch.no_grad():
        learned = output(hidden[text, later][there]).float().softmax(-1) / 2
        learned.scatter_add_(1, coming[text, later + 1][there][:, None], torch.full((len(learned), 1), 0.5))
    losses = nn.functional.cross_entropy(output(found[there]).float(), learned, reduction="none")
    if distance > 0:
        apart = nn.functional.smooth_l1_loss(found[there], hidden[text, later][there], reduction="none")
        losses = losses + distance * apart.mean(-1)
    counted = (0.8**depths).expand_as(there)[there]
    return (losses * counted).sum() / counted.sum()


def behind(
    positions: Int[Tensor, "batch time"], at: Int[Tensor, "batch blocks"], length: int
) -> tuple[Int[Tensor, "batch all"], Bool[Tensor, "batch all all"]]:
    """Positions and visibility where blocks of that length are put behind texts, one for each prefix that ends at `at`.

    The places of a block go on from their prefix; they see it and all of their block. The texts do not see them.
    """
    (batch, time), device = positions.shape, positions.device
    owner = torch.arange(at.shape[1], device=device).repeat_interleave(length)
    later = positions.take_along_dim(at, 1)[..., None] + torch.arange(1, length + 1, device=device)
    whole = time + len(owner)
    visible = torch.ones(batch, whole, whole, dtype=torch.bool, device=device).tril()
    visible[:, time:, :time] = torch.arange(time, device=device) <= at[:, owner, None]
    visible[:, time:, time:] = owner[:, None] == owner
    return torch.cat((positions, later.flatten(1)), 1), visible


def some_places(guide: nn.Module, written: Bool[Tensor, "batch time"], most: int) -> Int[Tensor, "place 2"]:
    """At most so many of the places (text, place) that are True: while learning by chance, else evenly spread."""
    places = written.nonzero()
    if guide.training:
        return places[torch.randperm(len(places))[:most]]
    return places[:: -(-len(places) // most) or 1]
