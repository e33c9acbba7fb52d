"""GPT-2 (Radford et al., 2019): learned positions, norms before, weights stored inputs first and fused."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, Stacked, Transposed, Where, fused
from formery.models.hub.words import activation_settings, output, output_settings
from formery.parts import MLP, Attention, Embedding, Layer, LayerNorm, Learned, PreNorm

OURS, THEIRS = "layers.*.sublayers", "transformer.h.*"
NAMES: Names = {
    "embedding": "transformer.wte",
    "embedding.position": "transformer.wpe",
    f"{OURS}.0.norm": f"{THEIRS}.ln_1",
    f"{OURS}.1.norm": f"{THEIRS}.ln_2",
    **fused(f"{OURS}.0.inner", f"{THEIRS}.attn.c_attn", Transposed(Stacked()), "query", "key", "value"),
    f"{OURS}.0.inner.output": Where(f"{THEIRS}.attn.c_proj", Transposed()),
    f"{OURS}.1.inner.up": Where(f"{THEIRS}.mlp.c_fc", Transposed()),
    f"{OURS}.1.inner.down": Where(f"{THEIRS}.mlp.c_proj", Transposed()),
    "norm": "transformer.ln_f",
    "output.map": "lm_head",
}


def build(config: Config) -> Decoder:
    """Scores may be scaled down with the layer's number."""
    config.only("add_cross_attention", False)
    width, heads = config.whole("n_embd", "hidden_size"), config.whole("n_head", "num_attention_heads", most=65536)
    length = config.whole("n_positions", "max_position_embeddings", default=1024)
    hidden = config.whole("n_inner", default=4 * width)
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", default=False)
    scale = (width / heads) ** -0.5 if config.flag("scale_attn_weights", default=True) else 1.0

    def norm() -> LayerNorm:
        return LayerNorm(width, config.real("layer_norm_epsilon", default=1e-5))

    def layer(index: int) -> Layer:
        attention = Attention(width, heads, bias=True, scale=scale / (index + 1) if by_layer else scale)
        feedforward = MLP(width, hidden, config.activation("activation_function", default="gelu_new"), bias=True)
        return Layer([PreNorm(norm(), attention), PreNorm(norm(), feedforward)])

    embedding = Embedding(config.whole("vocab_size", default=50257), width, Learned(length, width))
    layers = [layer(index) for index in range(config.layers("n_layer", "num_hidden_layers"))]
    return Decoder(embedding, layers, norm(), output(config, embedding, tied=True), length)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    scales = [layer.sublayers[0].inner.scale or layer.sublayers[0].inner.dim ** -0.5 for layer in model.layers]
    own, inner = model.layers[0].sublayers[0].inner, model.layers[0].sublayers[1].inner
    return {
        "vocab_size": model.vocabulary,
        "n_embd": own.width,
        "n_head": own.heads,
        "n_layer": len(model.layers),
        "n_positions": model.embedding.position.length,
        "n_ctx": model.embedding.position.length,  # the older name, which converters ask for
        "n_inner": inner.hidden,
        "layer_norm_epsilon": model.norm.epsilon,
        "scale_attn_weights": scales[0] != 1.0 or own.dim == 1,
        "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1,
        **activation_settings("activation_function", inner),
        **output_settings(model),
    }


FAMILY = register(
    Family(
        "gpt2", "GPT-2", ("GPT2LMHeadModel",), build, settings, NAMES, base="transformer",
        derived=("h.*.attn.bias", "h.*.attn.masked_bias"), copies={"lm_head.weight": "transformer.wte.weight"},
    )
)  # fmt: skip
