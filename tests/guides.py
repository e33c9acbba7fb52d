"""Guides of random weights for any model, by the method that they are for."""

import sys

import torch

from formery.generate.method import METHODS, find
from formery.models import Decoder, EncoderDecoder, Guide

Model = Decoder | EncoderDecoder


def guided() -> list[str]:
    """The methods that draft with a guide."""
    find("medusa")
    return [name for name, method in METHODS.items() if method.guided]


def guide(name: str, target: Model, seed: int = 0) -> Guide:
    """A guide for that method, made as its paper's file makes it; one that fuses vectors is nearer to the vector."""
    method = find(name.partition(":")[0])[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made: Guide = sys.modules[method.module].make(target).eval()
        if hasattr(made, "fuse"):  # so that some guesses are right
            with torch.no_grad():
                made.fuse.weight[:, : made.width] += 0.5 * torch.eye(made.width)
        return made
