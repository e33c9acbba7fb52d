"""A small language model of Shakespeare's plays; minutes on a laptop, good for trying things out."""

from pathlib import Path

import torch

from formery.data.batching import WindowBatches
from formery.data.tokenizer import train_bpe
from formery.data.write import Shakespeare
from formery.models.compose import language_model
from formery.train.loop import train
from formery.train.objective import mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.recipes.code import objective
from formery.train.text import joined

NAME = "write-shakespeare"
DESCRIPTION = "decoder of 1.3 M parameters that writes in the manner of Shakespeare's plays"

PLAN = Plan(
    steps=1500,
    learning_rate=2e-3,
    warmup=100,
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=150,
    seed=0,
    label="write-shakespeare",
)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = Shakespeare()
    tokenizer = train_bpe(work.texts("train"), vocabulary_size=1024)
    batches = WindowBatches(joined(tokenizer, work.texts("train")), length=256, batch_size=16, seed=PLAN.seed)
    held_out = WindowBatches(joined(tokenizer, work.texts("valid")), length=256, batch_size=16)
    torch.manual_seed(PLAN.seed)
    model = language_model(
        1024, width=160, layers=4, heads=4, key_value_heads=2, hidden=432, max_length=512, dropout=0.2
    )
    model.tokenizer = tokenizer
    evaluate = mean_loss(objective, [held_out.batch(step) for step in range(6)])
    result = train(model, objective, batches, PLAN, out, evaluate, stop_after=max_steps, resume=resume)
    licence = "public domain (the plays)"
    return Trained(model, result, PLAN.steps, (PLAN,), work.name, licence)
