"""OPT (Zhang et al., 2022): positions from the third row on; the one of 350 M norms after, with a narrow table."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, within
from formery.models.hub.words import activation_settings, output, output_settings
from formery.parts import MLP, Attention, Embedding, Layer, LayerNorm, Learned, Linear, Part, PostNorm, PreNorm

OURS, THEIRS = "layers.*.sublayers", "model.decoder.layers.*"
MAPS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
NAMES: Names = {
    "embedding": "model.decoder.embed_tokens",
    "embedding.lift": "model.decoder.project_in",
    "embedding.position": "model.decoder.embed_positions",
    **within(f"{OURS}.0.inner", f"{THEIRS}.self_attn", **MAPS),
    f"{OURS}.0.norm": f"{THEIRS}.self_attn_layer_norm",
    **within(f"{OURS}.1.inner", THEIRS, up="fc1", down="fc2"),
    f"{OURS}.1.norm": f"{THEIRS}.final_layer_norm",
    "norm": "model.decoder.final_layer_norm",
    "output.lower": "model.decoder.project_out",
    "output.map": "lm_head",
}


def build(config: Config) -> Decoder:
    """Norms before, and one at the end, or norms after."""
    config.only("layer_norm_elementwise_affine", True)
    width, length = config.whole("hidden_size"), config.whole("max_position_embeddings", default=2048)
    inner, bias = config.whole("word_embed_proj_dim", default=width), config.flag("enable_bias", default=True)
    before = config.flag("do_layer_norm_before", default=True)
    residual = PreNorm if before else PostNorm

    def layer() -> Layer:
        act = config.activation("activation_function", default="relu")
        attention = Attention(width, config.whole("num_attention_heads"), bias=bias)
        parts: list[Part] = [attention, MLP(width, config.whole("ffn_dim"), act, bias)]
        return Layer([residual(LayerNorm(width), one) for one in parts])

    narrow = inner != width
    lift, lower = (Linear(inner, width), Linear(width, inner)) if narrow else (None, None)
    position = Learned(length, width, offset=2)
    embedding = Embedding(config.whole("vocab_size"), width, position, inner=inner if narrow else None, lift=lift)
    last = LayerNorm(width) if before and not config.flag("_remove_final_layer_norm", default=False) else None
    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    return Decoder(embedding, layers, last, output(config, embedding, tied=True, lower=lower), length)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own, inner = model.layers[0].sublayers[0].inner, model.layers[0].sublayers[1].inner
    before = isinstance(model.layers[0].sublayers[0], PreNorm)
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": own.width,
        "word_embed_proj_dim": model.embedding.inner or own.width,
        "ffn_dim": inner.hidden,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": own.heads,
        "max_position_embeddings": model.embedding.position.length,
        "enable_bias": own.bias,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and model.norm is None,
        **activation_settings("activation_function", inner),
        **output_settings(model),
    }


FAMILY = register(
    Family(
        "opt", "OPT", ("OPTForCausalLM",), build, settings, NAMES, base="model",
        copies={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    )
)  # fmt: skip
