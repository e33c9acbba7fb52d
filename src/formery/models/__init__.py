"""Whole models out of parts."""

from formery.models.checkpoint import Model, load, locate, save, shipped
from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder

__all__ = ["Decoder", "Encoder", "EncoderDecoder", "Model", "load", "locate", "save", "shipped"]
