"""Weights of 8 or 4 bits in the place of floating-point ones, in any model: less to read for each token."""

from typing import Literal, get_args

import torch
from torch import nn

from formery.errors import FormeryError, unknown
from formery.parts import Codes, Embedding, Linear, Part, TiedOutput
from formery.parts.experts import Experts

Quantise = Literal["int8", "int4"]


@torch.no_grad()
def quantise(model: Part, kind: Quantise = "int8") -> None:
    """Rewrites the model in place: each table that is multiplied by becomes codes (not exact; nothing is trained).

    int8: 8 bits, a scale for each output. int4: 4 bits, a scale for each 32 inputs of an output. A table of embeddings
    is rewritten where it is the output's too; norms, biases, the routers of experts and embeddings that are only looked
    up stay. Raises FormeryError for another kind, and for a model that is quantised already.
    """
    if kind not in get_args(Quantise):
        raise unknown("quantisation", str(kind), get_args(Quantise))
    if any(isinstance(part, Codes) for part in model.modules()):
        raise FormeryError("this model's weights are codes already: load it without quantize.")
    bits = 8 if kind == "int8" else 4
    routers = {id(part.router) for part in model.modules() if isinstance(part, Experts)}
    made: dict[int, tuple[nn.Parameter, Codes]] = {}
    for part in model.modules():
        if isinstance(part, Linear) and id(part) not in routers:
            _replace(part, bits, made)
        elif isinstance(part, TiedOutput):
            _replace(part.embedding, bits, made)
    # Tables that shared their weights go on sharing them.
    for part in model.modules():
        if isinstance(part, Embedding) and id(part.weight) in made:
            _replace(part, bits, made)


def _replace(part: Linear | Embedding, bits: int, made: dict[int, tuple[nn.Parameter, Codes]]) -> None:
    weight = part.weight
    if isinstance(weight, nn.Parameter):
        if id(weight) not in made:
            made[id(weight)] = weight, Codes.of(weight, bits)  # the weight is kept, so that no other gets its id
        part.replace("weight", made[id(weight)][1])
