"""PHD-Transformer: each token is read K times and predicts from its last copy, in the cache of one reading.

Wu, Yan, Zhang, Lu, Zeng, Wang and Zhou, "Efficient Pretraining Length Scaling", 2025. Of the K readings of a token the
first is the original, the others are hidden decoding tokens. With token m's i-th reading as key and token n's j-th as
query, `M = 1 if (i = 1 and m < n) or (i ≤ j and m = n) else 0`: what comes later sees the originals only, so that the
keys and values of all copies can be forgotten when the token has been predicted, and the originals compute just what
the plain model would. Further forms let copies see those of a window of tokens before (PHD-SWA), and cut that window at
the borders of chunks (PHD-CSWA), so that of a prompt only the copies in its last chunk are ever needed. The paper
reports better benchmarks than the plain model's with a cache of the same size, at about a billion parameters.

The K readings stand at positions of their own, as they would if the text itself were repeated; that is all that tells
them apart, and no parameters are added. A window counts tokens here, each with all of its copies.
"""

import time
from collections.abc import Callable, Mapping
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
from formery.models.compose import language_model
from formery.models.decoder import Decoder
from formery.models.repeating import Repeating, repeating_model
from formery.parts.copies import EveryCopy, HiddenDecoding
from formery.parts.native import using
from formery.train.plan import Plan

WIDTH, LAYERS, HEADS, HIDDEN, LONGEST = 64, 3, 4, 168, 1024
LENGTH, BATCH, STEPS = 128, 16, 150  # of a training: tokens of a row, rows of a step
WINDOW, CHUNK = 16, 32
PROMPT = 500  # tokens, which is no whole number of chunks

plain = partial(language_model, long_text.VOCABULARY, WIDTH)
repeated = partial(repeating_model, long_text.VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN, LONGEST)

FORMS: dict[str, Callable[[], Decoder]] = {
    "plain": partial(plain, LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
    "PHD, K=2": partial(repeated, HiddenDecoding(2)),
    "PHD, K=3": partial(repeated, HiddenDecoding(3)),
    "PHD-SWA, K=2": partial(repeated, HiddenDecoding(2, WINDOW)),
    "PHD-CSWA, K=2": partial(repeated, HiddenDecoding(2, WINDOW, CHUNK)),
    "every copy kept, K=2": partial(repeated, EveryCopy(2)),
    "plain, twice the layers": partial(plain, 2 * LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
}


def trained(form: str, seed: int) -> Decoder:
    """One form of the model, trained on WikiText-2 from that seed."""
    plan = Plan(STEPS, 4e-3, warmup=15, seed=seed, label=f"{form}, seed {seed}")
    batches = WindowBatches(long_text.prose("train"), LENGTH, BATCH, seed)
    return grown(f"phd-transformer/{form}/{seed}", FORMS[form], batches, plan)
