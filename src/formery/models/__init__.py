"""Whole models out of parts."""

from formery.models.checkpoint import Model, guides, load, locate, save, shipped, writing
from formery.models.conventions import Conventions
from formery.models.decoder import Decoder
from formery.models.encoder import Encoder, Reader
from formery.models.encoder_decoder import EncoderDecoder, Source
from formery.models.guide import Guide

__all__ = [
    "Conventions",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "Guide",
    "Model",
    "Reader",
    "Source",
    "guides",
    "load",
    "locate",
    "save",
    "shipped",
    "writing",
]
