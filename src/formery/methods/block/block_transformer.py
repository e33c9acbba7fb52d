"""Block Transformer: a decoder over blocks of tokens below, a decoder inside of each block above.

Ho, Bae, Kim, Jo, Kim, Schuster, Fisch, Thorne and Yun, "Block Transformer: Global-to-Local Language Modeling for Fast
Inference", 2024. Three parts: an embedder makes one vector of the `length` tokens of a block (their embeddings, of
width / length each, side by side); a block decoder attends over these vectors, one for each block; its vector behind
block b becomes, by a linear map, a prefix of two vectors, behind which a token decoder predicts the tokens of block
b + 1, attending to nothing but prefix and block. The lower half then keeps keys and values for one position in `length`
tokens, and the upper half those of the present block only: `1 / (2 · length)` of a plain model's. The paper reports 10
to 20 times the throughput of plain transformers of equal perplexity, on graphics cards with batches that fill them.

The paper does not predict the first block; here its context is a learned vector, so that any prompt can be gone on
with, from its first token.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from formery.data import long_text
from formery.data.batching import WindowBatches
from formery.evidence.accounting import account
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import grown, losses
from formery.models.blocks import block_model
from formery.models.compose import language_model
from formery.models.decoder import Decoder
from formery.train.plan import Plan

WIDTH, LAYERS, HEADS, HIDDEN, LONGEST = 64, 4, 4, 168, 1024
LENGTH, BATCH, STEPS = 128, 16, 150  # of a training: tokens of a row, rows of a step

plain = partial(language_model, long_text.VOCABULARY, WIDTH)
halves = partial(block_model, long_text.VOCABULARY, WIDTH, LAYERS // 2, LAYERS // 2, HEADS, HIDDEN, LONGEST)

FORMS: dict[str, Callable[[], Decoder]] = {
    "plain": partial(plain, LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
    "smaller plain": partial(plain, LAYERS // 2, HEADS, 1, HIDDEN, LONGEST),
    "blocks of 2": partial(halves, 2),
    "blocks of 4": partial(halves, 4),
    "blocks of 8": partial(halves, 8),
    "blocks of 4, twice the layers": partial(
        block_model, long_text.VOCABULARY, WIDTH, LAYERS, LAYERS, HEADS, HIDDEN, LONGEST, 4
    ),
}


def trained(form: str, seed: int) -> Decoder:
    """One form of the model, trained on WikiText-2 from that seed."""
    plan = Plan(STEPS, 4e-3, warmup=15, seed=seed, label=f"{form}, seed {seed}")
    batches = WindowBatches(long_text.prose("train"), LENGTH, BATCH, seed)
    return grown(f"block-transformer/{form}/{seed}", FORMS[form], batches, plan)
