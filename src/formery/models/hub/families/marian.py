"""Marian (Junczys-Dowmunt et al., 2018): translators with sinusoidal positions and norms after."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder
from formery.models.hub import pairs
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, Shaped, Where
from formery.models.hub.words import prefix
from formery.parts import Embedding, PostNorm, Sinusoidal, TiedOutput


def names(model: Any) -> Names:
    """One table for both sides, or one for each."""
    found = pairs.names(model.encoder.embedding is model.decoder.embedding)
    return found | {"decoder.output.shift": Where("final_logits_bias", Shaped((1, -1)))}


def build(config: Config) -> EncoderDecoder:
    """Sines first, then cosines; logits by the target's table."""
    config.only("tie_word_embeddings", True)
    width, length = config.whole("d_model"), config.whole("max_position_embeddings", default=1024)
    scale = width**0.5 if config.flag("scale_embedding", default=False) else 1.0

    def embedding(size: int) -> Embedding:
        return Embedding(size, width, Sinusoidal(width, interleaved=False), scale=scale)

    read = config.whole("vocab_size")
    source = embedding(read)
    shared = config.flag("share_encoder_decoder_embeddings", default=True)
    target = source if shared else embedding(config.whole("decoder_vocab_size", default=read))
    output = TiedOutput(target, bias="final_logits_bias" in config.holds)
    encoder = Encoder(source, pairs.layers(config, "encoder", PostNorm), None, length)
    decoder = Decoder(target, pairs.layers(config, "decoder", PostNorm), None, output, length)
    start = config.whole("decoder_start_token_id", default=58100, least=0)
    return EncoderDecoder(encoder, decoder, start, prefix(config))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return {
        **pairs.settings(model),
        "vocab_size": model.encoder.embedding.vocabulary,
        "decoder_vocab_size": model.decoder.vocabulary,
        "share_encoder_decoder_embeddings": model.encoder.embedding is model.decoder.embedding,
        "max_position_embeddings": model.max_length,
        "scale_embedding": model.decoder.embedding.scale != 1.0,
    }


FAMILY = register(
    Family(
        "marian", "Marian", ("MarianMTModel",), build, settings, names, base="model",
        derived=("encoder.embed_positions.weight", "decoder.embed_positions.weight"),
        copies={**pairs.COPIES, "lm_head.weight": "model.decoder.embed_tokens.weight"},
    )
)  # fmt: skip
