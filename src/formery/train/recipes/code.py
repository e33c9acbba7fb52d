"""The shipped code model: 8 layers, 6.9 M parameters, on the standard library of the interpreter that runs this.

The first stage sees windows of 256 tokens, which are cheap; the second 512, so that the model can use them.
"""

from dataclasses import replace
from pathlib import Path

import torch

from formery.data.batching import WindowBatches
from formery.data.code import Code
from formery.data.tokenizer import train_bpe
from formery.models.compose import language_model
from formery.parts import kernel
from formery.train.objective import Batch, mean_loss, next_token
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.stages import Stage, train_in_stages
from formery.train.text import joined

NAME = "code"
DESCRIPTION = "decoder of 6.9 M parameters that continues Python, trained on the standard library"

# The first stage is left while its learning rate is still high; the second brings it down.
SHORT = Plan(
    steps=3500,
    learning_rate=2e-3,
    warmup=200,
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=250,
    seed=0,
    label="code",
)
LONG = replace(
    SHORT, steps=800, learning_rate=1.2e-3, warmup=30, evaluate_every=100, seed=1, label="code-long"
)
SHORT_STEPS = 1600


def objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Next-token loss; at these lengths a CPU computes written-out attention fastest."""
    with kernel("eager"):
        return next_token(model, batch)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = Code()
    tokenizer = train_bpe(work.texts("train"), vocabulary_size=4096)
    ids = joined(tokenizer, work.texts("train"))
    stages = [
        Stage(SHORT, WindowBatches(ids, length=256, batch_size=16, seed=SHORT.seed), SHORT_STEPS),
        Stage(LONG, WindowBatches(ids, length=512, batch_size=8, seed=LONG.seed), LONG.steps),
    ]
    held_out = WindowBatches(joined(tokenizer, work.texts("valid")), length=512, batch_size=8)
    torch.manual_seed(SHORT.seed)
    model = language_model(4096, width=256, layers=8, heads=4, key_value_heads=2, hidden=688, max_length=512)
    model.tokenizer = tokenizer
    evaluate = mean_loss(objective, [held_out.batch(step) for step in range(10)])
    result = train_in_stages(model, objective, stages, out, evaluate, max_steps, resume)
    licence = "Python Software Foundation License 2.0 (the training text)"
    return Trained(model, result, SHORT_STEPS + LONG.steps, (SHORT, LONG), work.name, licence)
