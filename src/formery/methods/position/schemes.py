"""One small decoder with each of several position schemes, trained on short inputs of a task."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from formery.data.sequences import SYMBOLS, Sequences
from formery.errors import unknown
from formery.evidence.study import grown
from formery.models import Decoder
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    Embedding,
    Layer,
    Learned,
    Output,
    Position,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    Sinusoidal,
)
from formery.train.answering import answering
from formery.train.plan import Plan

WIDTH, LAYERS, HEADS, HIDDEN = 64, 3, 4, 128
ROOM = 256  # positions that a learned table has; those beyond the trained lengths are never learned
ADDED: dict[str, Callable[[], Position]] = {
    "learned": lambda: Learned(ROOM, WIDTH),
    "sinusoidal": lambda: Sinusoidal(WIDTH),
}
WITHIN: dict[str, Callable[[], Position]] = {
    "rotary": Rotary,
    "alibi": Alibi,
    "t5": lambda: RelativeBuckets(HEADS),
}
SCHEMES = ("nope", "t5", "alibi", "rotary", "sinusoidal", "learned")
TRAINED = {"copy": 8, "reverse": 8, "sort": 8, "add": 5}  # the longest input of each task in training
SCRATCHPADS = ("add-carries", "add-steps")
WITH_SCRATCHPAD = ("nope", "t5")  # the schemes that are tried with scratchpads: the paper's best two
PLAN = Plan(steps=500, learning_rate=5e-3, warmup=30, evaluate_every=500, checkpoint_every=500, label="short inputs")
BATCH = 32


def model(scheme: str) -> Decoder:
    """The decoder of the comparison with that position scheme (`SCHEMES`), freshly initialised."""
    if scheme not in SCHEMES:
        raise unknown("position scheme", scheme, SCHEMES)
    added = ADDED[scheme]() if scheme in ADDED else None
    within = WITHIN[scheme]() if scheme in WITHIN else None

    def layer() -> Layer:
        attention = Attention(WIDTH, HEADS, position=within)
        return Layer([PreNorm(RMSNorm(WIDTH), attention), PreNorm(RMSNorm(WIDTH), MLP(WIDTH, HIDDEN))])

    # Embeddings of this size neither drown in sines of size 1 nor drown learned positions.
    embedding = Embedding(len(SYMBOLS), WIDTH, position=added, deviation=0.3)
    stack = [layer() for _ in range(LAYERS)]
    return Decoder(embedding, stack, RMSNorm(WIDTH), Output(WIDTH, len(SYMBOLS)), ROOM)


def trained(scheme: str, task: str, seed: int) -> Decoder:
    """The decoder with that scheme, trained on short inputs of that task."""
    longest = TRAINED[task.partition("-")[0]]
    batches = Sequences(task, 1, longest, BATCH, seed)
    plan = replace(PLAN, seed=seed)
    return grown(f"nope/{scheme}-{task}-{seed}", partial(model, scheme), batches, plan, answering, (Sequences,))
