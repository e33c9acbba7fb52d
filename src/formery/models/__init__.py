"""Whole models out of parts."""

from formery.models.checkpoint import Model, load, locate, save, shipped, writing
from formery.models.conventions import Conventions
from formery.models.decoder import Decoder
from formery.models.encoder import Encoder, Reader
from formery.models.encoder_decoder import EncoderDecoder, Source

__all__ = [
    "Conventions",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "Model",
    "Reader",
    "Source",
    "load",
    "locate",
    "save",
    "shipped",
    "writing",
]
