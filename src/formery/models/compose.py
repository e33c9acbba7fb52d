"""Builders: the usual ways to put parts together; for anything else, put them together yourself."""

from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder
from formery.parts import (
    Attention,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    PreNorm,
    RMSNorm,
    Rotary,
    TiedOutput,
    everything,
)


def language_model(
    vocabulary: int,
    width: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    hidden: int,
    max_length: int,
    dropout: float = 0.0,
) -> Decoder:
    """A decoder in the manner of Llama: rotary positions, grouped heads, gated feed-forward, RMSNorm, tied output."""
    embedding = Embedding(vocabulary, width, dropout=dropout)
    position = Rotary()

    def layer() -> Layer:
        attention = Attention(width, heads, key_value_heads, position=position)
        feedforward = GatedMLP(width, hidden)
        return Layer([PreNorm(RMSNorm(width), attention, dropout), PreNorm(RMSNorm(width), feedforward, dropout)])

    stack = [layer() for _ in range(layers)]
    return Decoder(embedding, stack, RMSNorm(width), TiedOutput(embedding), max_length)


def translator(
    vocabulary: int,
    width: int,
    encoder_layers: int,
    decoder_layers: int,
    heads: int,
    hidden: int,
    max_length: int,
    start_token: int,
    dropout: float = 0.0,
) -> EncoderDecoder:
    """An encoder-decoder with one embedding table for source, target and output; otherwise as `language_model`."""
    embedding = Embedding(vocabulary, width, dropout=dropout)
    position = Rotary()

    def residual(inner: Attention | CrossAttention | GatedMLP) -> PreNorm:
        return PreNorm(RMSNorm(width), inner, dropout)

    def encoder_layer() -> Layer:
        attention = Attention(width, heads, position=position, mask=everything)
        return Layer([residual(attention), residual(GatedMLP(width, hidden))])

    def decoder_layer() -> Layer:
        attention = Attention(width, heads, position=position)
        return Layer([residual(attention), residual(CrossAttention(width, heads)), residual(GatedMLP(width, hidden))])

    encoder = Encoder(embedding, [encoder_layer() for _ in range(encoder_layers)], RMSNorm(width), max_length)
    stack = [decoder_layer() for _ in range(decoder_layers)]
    decoder = Decoder(embedding, stack, RMSNorm(width), TiedOutput(embedding), max_length)
    return EncoderDecoder(encoder, decoder, start_token)
