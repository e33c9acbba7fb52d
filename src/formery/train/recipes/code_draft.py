"""The draft for the shipped code model: 2 layers, 0.6 M parameters, the same text and tokenizer."""

from pathlib import Path

import torch

from formery.data.batching import WindowBatches
from formery.data.code import Code
from formery.data.tokenizer import train_bpe
from formery.models.compose import language_model
from formery.train.loop import train
from formery.train.objective import mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.recipes.code import objective
from formery.train.text import joined

NAME = "code-draft"
DESCRIPTION = "decoder of 0.6 M parameters that drafts for the model `code`"

PLAN = Plan(
    steps=1500,
    learning_rate=3e-3,
    warmup=100,
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=250,
    seed=1,
    label="code-draft",
)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = Code()
    tokenizer = train_bpe(work.texts("train"), vocabulary_size=4096)
    batches = WindowBatches(joined(tokenizer, work.texts("train")), length=512, batch_size=8, seed=PLAN.seed)
    held_out = WindowBatches(joined(tokenizer, work.texts("valid")), length=512, batch_size=8)
    torch.manual_seed(PLAN.seed)
    model = language_model(4096, width=96, layers=2, heads=4, key_value_heads=2, hidden=256, max_length=512)
    model.tokenizer = tokenizer
    evaluate = mean_loss(objective, [held_out.batch(step) for step in range(10)])
    result = train(model, objective, batches, PLAN, out, evaluate, stop_after=max_steps, resume=resume)
    licence = "Python Software Foundation License 2.0 (the training text)"
    return Trained(model, result, PLAN.steps, (PLAN,), work.name, licence)
