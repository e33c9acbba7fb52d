"""Small models that have learned to copy short rows of letters, and go on with longer ones."""

from formery.data.sequences import Sequences
from formery.evidence.study import grown
from formery.methods.position.schemes import TRAINED, trained
from formery.models import Decoder
from formery.train.answering import answering
from formery.train.plan import Plan

SHORTER, LONGER = TRAINED["copy"], 3 * TRAINED["copy"]  # letters of a row


def extended(seed: int) -> tuple[Decoder, Decoder]:
    """The model of that seed, with rotary positions, that copies short rows, and what it becomes with longer ones."""
    before = trained("rotary", "copy", seed)
    plan = Plan(
        steps=300,
        learning_rate=2e-3,
        warmup=30,
        evaluate_every=300,
        checkpoint_every=300,
        seed=seed,
        label="longer rows",
    )
    longer = Sequences("copy", 1, LONGER, 16, seed)
    return before, grown(f"retrieval-heads/longer-{seed}", before.clone, longer, plan, answering, (extended, Sequences))
