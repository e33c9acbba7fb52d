"""A smaller model of long texts: 2 layers, 0.9 M parameters, a quarter of the bytes a token that `long` remembers.

It is what a bounded cache of `long` has to beat: a dense model whose whole cache takes the same memory.
"""

from pathlib import Path

from formery.train.recipe import Trained
from formery.train.recipes.long import on_long_texts

NAME = "long-small"
DESCRIPTION = "decoder of 0.9 M parameters, trained as `long` is, that remembers a quarter of the bytes a token"


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains into `out`."""
    return on_long_texts(2, 144, 384, out, max_steps, resume)
