"""Whisper (Radford et al., 2022): a convolutional stem over log-mel frames, norms before, keys without a bias."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder
from formery.models.hub import pairs
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names
from formery.models.hub.words import prefix
from formery.parts import Embedding, LayerNorm, Learned, Linear, PreNorm, SpeechStem, TiedOutput

NAMES: Names = pairs.names(shared=False) | {
    "decoder.embedding.position": "model.decoder.embed_positions",
    "encoder.embedding.positions": "model.encoder.embed_positions.weight",
    "encoder.embedding.first": "model.encoder.conv1",
    "encoder.embedding.second": "model.encoder.conv2",
    "encoder.norm": "model.encoder.layer_norm",
    "decoder.norm": "model.decoder.layer_norm",
}


def keyless(attention: Any) -> Any:
    """The attention without a bias on its keys, which no softmax would notice."""
    attention.replace("key", Linear(attention.key.inputs, attention.key.outputs))
    return attention


def build(config: Config) -> EncoderDecoder:
    """Sound goes in, text comes out."""
    config.only("scale_embedding", False)
    config.only("num_key_value_heads", config.whole("encoder_attention_heads"))
    config.only("tie_word_embeddings", True)
    width, length = config.whole("d_model"), config.whole("max_target_positions", default=448)
    mels, places = config.whole("num_mel_bins", default=80), config.whole("max_source_positions", default=1500)
    stem = SpeechStem(mels, width, places)
    embedding = Embedding(config.whole("vocab_size"), width, Learned(length, width))
    encoder = Encoder(stem, pairs.layers(config, "encoder", PreNorm, keyless), LayerNorm(width))
    layers = pairs.layers(config, "decoder", PreNorm, keyless)
    decoder = Decoder(embedding, layers, LayerNorm(width), TiedOutput(embedding), length)
    start = config.whole("decoder_start_token_id", default=50257, least=0)
    return EncoderDecoder(encoder, decoder, start, prefix(config))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    stem = model.encoder.embedding
    return {
        **pairs.settings(model),
        "num_mel_bins": stem.mels,
        "max_source_positions": stem.length,
        "max_target_positions": model.max_length,
    }


FAMILY = register(
    Family(
        "whisper", "Whisper", ("WhisperForConditionalGeneration",), build, settings, NAMES, base="model",
        copies={"proj_out.weight": "model.decoder.embed_tokens.weight"},
    )
)  # fmt: skip
