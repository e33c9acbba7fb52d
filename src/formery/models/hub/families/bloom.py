"""BLOOM (BigScience, 2022): ALiBi, and a norm on the embeddings."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import ByHead, Names, fused, within
from formery.models.hub.words import output, output_settings
from formery.parts import MLP, Alibi, Attention, Embedding, Layer, LayerNorm, PreNorm

OURS, THEIRS = "layers.*.sublayers", "transformer.h.*"


def names(model: Any) -> Names:
    """Queries, keys and values lie head by head."""
    layout = ByHead(model.layers[0].sublayers[0].inner.heads)
    return {
        "embedding": "transformer.word_embeddings",
        "embedding.norm": "transformer.word_embeddings_layernorm",
        f"{OURS}.0.norm": f"{THEIRS}.input_layernorm",
        f"{OURS}.1.norm": f"{THEIRS}.post_attention_layernorm",
        **fused(f"{OURS}.0.inner", f"{THEIRS}.self_attention.query_key_value", layout, "query", "key", "value"),
        **within(f"{OURS}.0.inner", f"{THEIRS}.self_attention", output="dense"),
        **within(f"{OURS}.1.inner", f"{THEIRS}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
        "norm": "transformer.ln_f",
        "output.map": "lm_head",
    }


def build(config: Config) -> Decoder:
    """The text may be of any length."""
    config.only("apply_residual_connection_post_layernorm", False)
    width, heads = config.whole("hidden_size", "n_embed"), config.whole("n_head", "num_attention_heads", most=65536)
    position = Alibi()

    def norm() -> LayerNorm:
        return LayerNorm(width, config.real("layer_norm_epsilon", default=1e-5))

    def layer() -> Layer:
        attention = Attention(width, heads, position=position, bias=True)
        return Layer([PreNorm(norm(), attention), PreNorm(norm(), MLP(width, 4 * width, "gelu_tanh", bias=True))])

    embedding = Embedding(config.whole("vocab_size"), width, norm=norm())
    layers = [layer() for _ in range(config.layers("n_layer", "num_hidden_layers"))]
    return Decoder(embedding, layers, norm(), output(config, embedding, tied=True))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own = model.layers[0].sublayers[0].inner
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": own.width,
        "n_head": own.heads,
        "n_layer": len(model.layers),
        "layer_norm_epsilon": model.norm.epsilon,
        **output_settings(model),
    }


FAMILY = register(
    Family(
        "bloom", "BLOOM", ("BloomForCausalLM",), build, settings, names, base="transformer",
        copies={"lm_head.weight": "transformer.word_embeddings.weight"},
    )
)  # fmt: skip
