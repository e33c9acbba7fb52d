"""A model of long texts: 6 layers, 3 M parameters, texts of 192, then 2,048 tokens.

It first learns to look up what came after a word before, on nothing but words said twice. Then part of each batch is
prose and code, part texts of the work `long`, whose answers lie anywhere before the question.
"""

from dataclasses import replace
from pathlib import Path

import torch

from formery.data.long import Long
from formery.data.long_batches import LongBatches, Repetitions
from formery.data.long_text import VOCABULARY, code, prose, tokenizer
from formery.models.compose import language_model
from formery.train.answering import answering, answers_and_text
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.stages import Stage, train_in_stages

NAME = "long"
DESCRIPTION = "decoder of 3 M parameters, trained on prose, code and questions on what lies up to 2,048 tokens back"
LENGTH = 2048  # tokens of the longest texts that it learns from; it takes more

# All stages but the last are left while their learning rate is still high; the last brings it down.
COPYING = Plan(steps=600, learning_rate=3e-3, warmup=50, evaluate_every=300, checkpoint_every=50, label="long-copying")
SHORT = replace(COPYING, steps=2400, learning_rate=2e-3, warmup=50, evaluate_every=200, seed=1, label="long-192")
LAST = replace(
    SHORT, steps=500, learning_rate=1.2e-3, warmup=20, final_learning_rate_ratio=0.02, evaluate_every=100, seed=2,
    label="long-2048",
)  # fmt: skip
COPYING_STEPS, SHORT_STEPS = 300, 1400


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    return on_long_texts(6, 192, 512, out, max_steps, resume)


def on_long_texts(layers: int, width: int, hidden: int, out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains a decoder of that size, with 6 heads, into `out`."""
    vocabulary = tokenizer()
    ids, others = (torch.cat((prose(split), code(split))) for split in ("train", "valid"))
    stages = [
        Stage(COPYING, Repetitions(vocabulary, 64, 56, COPYING.seed), COPYING_STEPS),
        Stage(SHORT, LongBatches(vocabulary, ids, 192, 32, SHORT.seed, share=0.75, room=96), SHORT_STEPS),
        Stage(LAST, LongBatches(vocabulary, ids, LENGTH, 4, LAST.seed), LAST.steps),
    ]
    held_out = LongBatches(vocabulary, others, 1024, 8, split="valid")
    torch.manual_seed(COPYING.seed)
    model = language_model(VOCABULARY, width, layers, heads=6, key_value_heads=6, hidden=hidden, max_length=8192)
    model.tokenizer = vocabulary
    evaluate = answers_and_text([held_out.batch(step) for step in range(4)])
    result = train_in_stages(model, answering, stages, out, evaluate, max_steps, resume)
    licence = "CC BY-SA 3.0 (WikiText-2) and Python Software Foundation License 2.0 (the standard library)"
    return Trained(model, result, COPYING_STEPS + SHORT_STEPS + LAST.steps, (COPYING, SHORT, LAST), Long.name, licence)
