"""BART (Lewis et al., 2019): norms after, learned positions from the third row on, one table of embeddings."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder
from formery.models.hub import pairs
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, Shaped, Where
from formery.models.hub.words import prefix
from formery.parts import Embedding, LayerNorm, Learned, PostNorm, TiedOutput

NAMES: Names = pairs.NAMES | {
    "decoder.output.shift": Where("final_logits_bias", Shaped((1, -1))),
    **{f"{one}.embedding.position": f"model.{one}.embed_positions" for one in ("encoder", "decoder")},
    **{f"{one}.embedding.norm": f"model.{one}.layernorm_embedding" for one in ("encoder", "decoder")},
}


def build(config: Config) -> EncoderDecoder:
    """Each side has positions and a norm of its own."""
    config.only("tie_word_embeddings", True)
    width, length = config.whole("d_model"), config.whole("max_position_embeddings", default=1024)
    vocabulary, scale = config.whole("vocab_size"), width**0.5 if config.flag("scale_embedding", default=False) else 1.0

    def embedding(table: Embedding | None = None) -> Embedding:
        return Embedding(vocabulary, width, Learned(length, width, offset=2), LayerNorm(width), scale, table=table)

    source = embedding()
    target = embedding(source)
    output = TiedOutput(target, bias="final_logits_bias" in config.holds)
    encoder = Encoder(source, pairs.layers(config, "encoder", PostNorm), None, length)
    decoder = Decoder(target, pairs.layers(config, "decoder", PostNorm), None, output, length)
    return EncoderDecoder(encoder, decoder, config.whole("decoder_start_token_id", default=2, least=0), prefix(config))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return {
        **pairs.settings(model),
        "max_position_embeddings": model.max_length,
        "scale_embedding": model.decoder.embedding.scale != 1.0,
        "normalize_before": False,  # a default that converters ask for
    }


FAMILY = register(
    Family(
        "bart", "BART", ("BartForConditionalGeneration",), build, settings, NAMES, base="model", copies=pairs.COPIES
    )
)
