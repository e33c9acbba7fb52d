"""Small models that learn recall and copying in short texts, and then go on with longer ones."""

from dataclasses import replace

from formery.data.long import Long
from formery.data.long_batches import ROOM, LongBatches
from formery.data.long_text import VOCABULARY, prose, tokenizer
from formery.evidence.study import grown
from formery.models import Decoder
from formery.models.compose import language_model
from formery.train.answering import answering
from formery.train.plan import Plan

SHORTER, LONGER = 96, 336  # tokens of a text
TASKS = ("recall", "copy")
FIRST = Plan(steps=600, learning_rate=5e-3, warmup=50, checkpoint_every=100, label="short texts")
THEN = Plan(steps=150, learning_rate=2e-3, warmup=20, checkpoint_every=50, label="longer texts")


def made() -> Decoder:
    """Two layers of four heads."""
    model = language_model(VOCABULARY, width=64, layers=2, heads=4, key_value_heads=4, hidden=128, max_length=4096)
    model.tokenizer = tokenizer()
    return model


def extended(seed: int) -> tuple[Decoder, Decoder]:
    """The model of that seed that knows short texts, and what it becomes with longer ones."""
    before = grown(
        f"retrieval-heads/short-{seed}",
        made,
        asking(SHORTER, 16, seed),
        replace(FIRST, seed=seed),
        answering,
        (asking,),
    )

    def again() -> Decoder:
        twin = before.clone()
        twin.tokenizer = before.tokenizer
        return twin

    after = grown(
        f"retrieval-heads/longer-{seed}", again, asking(LONGER, 6, seed), replace(THEN, seed=seed), answering, (asking,)
    )
    return before, after


def asking(length: int, batch_size: int, seed: int) -> LongBatches:
    """Rows of questions only, on texts of that length."""
    vocabulary = tokenizer()
    work = Long(length, TASKS, tokenizer=vocabulary)
    return LongBatches(vocabulary, prose("train"), length + ROOM, batch_size, seed, share=1.0, work=work)
