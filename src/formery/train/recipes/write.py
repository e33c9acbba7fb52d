"""A language model of WikiText-2: 6 layers, 6.5 M parameters, with dropout since the text is small."""

from pathlib import Path

import torch

from formery.data.batching import WindowBatches
from formery.data.tokenizer import train_bpe
from formery.data.write import WikiText
from formery.models.compose import language_model
from formery.train.loop import train
from formery.train.objective import mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.recipes.code import objective
from formery.train.text import joined

NAME = "write"
DESCRIPTION = "decoder of 6.5 M parameters that writes Wikipedia articles, trained on WikiText-2"

PLAN = Plan(
    steps=6000,
    learning_rate=1.5e-3,
    warmup=300,
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=300,
    seed=0,
    label="write",
)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = WikiText()
    tokenizer = train_bpe(work.texts("train"), vocabulary_size=8192)
    batches = WindowBatches(joined(tokenizer, work.texts("train")), length=256, batch_size=16, seed=PLAN.seed)
    held_out = WindowBatches(joined(tokenizer, work.texts("valid")), length=256, batch_size=16)
    torch.manual_seed(PLAN.seed)
    model = language_model(
        8192, width=256, layers=6, heads=4, key_value_heads=2, hidden=688, max_length=512, dropout=0.1
    )
    model.tokenizer = tokenizer
    evaluate = mean_loss(objective, [held_out.batch(step) for step in range(10)])
    result = train(model, objective, batches, PLAN, out, evaluate, stop_after=max_steps, resume=resume)
    licence = "CC BY-SA 3.0 (Wikipedia, by way of WikiText-2)"
    return Trained(model, result, PLAN.steps, (PLAN,), work.name, licence)
