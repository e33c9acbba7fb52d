"""The draft for the shipped translator: 1 + 1 layers, 0.9 M parameters, the same pairs and tokenizer."""

from pathlib import Path

import torch

from formery.data.batching import PairBatches
from formery.data.tokenizer import train_bpe
from formery.data.translate import Translate
from formery.models.compose import translator
from formery.train import objective as objectives
from formery.train.loop import train
from formery.train.objective import mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Trained
from formery.train.recipes.translate import TOKENS_PER_BATCH, objective
from formery.train.text import pairs_of

NAME = "translate-draft"
DESCRIPTION = "encoder-decoder of 0.9 M parameters that drafts for the model `translate`"

PLAN = Plan(
    steps=2400,
    learning_rate=3e-3,
    warmup=300,
    weight_decay=0.05,
    betas=(0.9, 0.98),
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=300,
    seed=1,
    label="translate-draft",
)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    work = Translate()
    tokenizer = train_bpe((text for pair in work.texts("train") for text in pair), vocabulary_size=4000)
    assert tokenizer.bos is not None and tokenizer.pad is not None
    batches = PairBatches(
        pairs_of(tokenizer, work.texts("train")), TOKENS_PER_BATCH, tokenizer.pad, PLAN.seed
    )
    held_out = PairBatches(pairs_of(tokenizer, work.texts("valid")), TOKENS_PER_BATCH, tokenizer.pad)
    torch.manual_seed(PLAN.seed)
    model = translator(
        4000, 128, 1, 1, heads=4, hidden=256, max_length=256, start_token=tokenizer.bos, dropout=0.1
    )
    model.tokenizer = tokenizer
    evaluate = mean_loss(objectives.translate(), [held_out.batch(step) for step in range(held_out.batches)])
    result = train(model, objective, batches, PLAN, out, evaluate, stop_after=max_steps, resume=resume)
    licence = "research only (captions of Flickr30k, by way of Multi30k)"
    return Trained(model, result, PLAN.steps, (PLAN,), work.name, licence)
