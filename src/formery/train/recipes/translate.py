"""The shipped translator: English to German, 3 + 3 layers, 5.7 M parameters, on the captions of Multi30k."""

from dataclasses import replace
from pathlib import Path

import torch

from formery.data.batching import PairBatches
from formery.data.tokenizer import train_bpe
from formery.data.translate import Translate
from formery.models.compose import translator
from formery.parts import kernel
from formery.train import objective as objectives
from formery.train.objective import Batch, mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.stages import Stage, train_in_stages
from formery.train.text import pairs_of

NAME = "translate"
DESCRIPTION = "encoder-decoder of 5.7 M parameters that translates image captions from English to German"

# The first stage is left while its learning rate is still high; the second brings it down.
HIGH = Plan(
    steps=6600,
    learning_rate=1.5e-3,
    warmup=400,
    weight_decay=0.05,
    betas=(0.9, 0.98),
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=300,
    seed=0,
    label="translate",
)
FALLING = replace(
    HIGH, steps=1600, learning_rate=9e-4, warmup=30, evaluate_every=200, seed=1, label="translate-falling"
)
HIGH_STEPS = 3000
TOKENS_PER_BATCH = 4500
smoothed = objectives.translate(label_smoothing=0.1)


def objective(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Smoothed cross entropy; at these lengths a CPU computes written-out attention fastest."""
    with kernel("eager"):
        return smoothed(model, batch)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = Translate()
    tokenizer = train_bpe((text for pair in work.texts("train") for text in pair), vocabulary_size=4000)
    assert tokenizer.bos is not None and tokenizer.pad is not None
    pairs = pairs_of(tokenizer, work.texts("train"))
    stages = [
        Stage(plan, PairBatches(pairs, TOKENS_PER_BATCH, tokenizer.pad, plan.seed), until)
        for plan, until in ((HIGH, HIGH_STEPS), (FALLING, FALLING.steps))
    ]
    held_out = PairBatches(pairs_of(tokenizer, work.texts("valid")), TOKENS_PER_BATCH, tokenizer.pad)
    torch.manual_seed(HIGH.seed)
    model = translator(
        4000, 256, 3, 3, heads=4, hidden=512, max_length=256, start_token=tokenizer.bos, dropout=0.2
    )
    model.tokenizer = tokenizer
    evaluate = mean_loss(objectives.translate(), [held_out.batch(step) for step in range(held_out.batches)])
    result = train_in_stages(model, objective, stages, out, evaluate, max_steps, resume)
    licence = "research only (captions of Flickr30k, by way of Multi30k)"
    return Trained(model, result, HIGH_STEPS + FALLING.steps, (HIGH, FALLING), work.name, licence)
