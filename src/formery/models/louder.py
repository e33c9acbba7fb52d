"""Small models that begin to learn sooner."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from formery.models.decoder import Decoder
from formery.parts import Embedding

Whole = TypeVar("Whole", bound=Decoder)


def louder(make: Callable[[], Whole], times: float) -> Whole:
    """The model that `make` makes, with the weights of all embeddings `times` as large.

    Vectors of tokens are small beside what layers of random weights add to them, and a model that learns for a few
    hundred steps spends most of these at knowing no more than how frequent tokens are, until they are not.
    """
    model = make()
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Embedding):
                assert isinstance(part.weight, Tensor)
                part.weight.mul_(times)
    return model
