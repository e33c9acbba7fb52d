"""What the descendants of Llama share: rotary positions, grouped heads, gated feed-forwards, RMSNorm."""

from collections.abc import Callable
from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.names import Names, within
from formery.models.hub.rope import fitting, rope_settings, rotary
from formery.models.hub.words import activation_settings, output, output_settings
from formery.parts import Attention, Embedding, GatedMLP, Layer, Mask, Part, PreNorm, RMSNorm, causal, window

LAYER, THEIRS = "layers.*.sublayers", "model.layers.*"
MAPS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
ATTENTION = within(f"{LAYER}.0.inner", f"{THEIRS}.self_attn", **MAPS)
FEEDFORWARD = within(f"{LAYER}.1.inner", f"{THEIRS}.mlp", gate="gate_proj", up="up_proj", down="down_proj")
FRAME: Names = {
    "embedding": "model.embed_tokens",
    f"{LAYER}.0.norm": f"{THEIRS}.input_layernorm",
    f"{LAYER}.1.norm": f"{THEIRS}.post_attention_layernorm",
    "norm": "model.norm",
    "output.map": "lm_head",
}
NAMES: Names = FRAME | ATTENTION | FEEDFORWARD
DERIVED = ("*.rotary_emb.inv_freq",)
COPIES = {"lm_head.weight": "model.embed_tokens.weight"}


def norm(config: Config, width: int | None = None, offset: float = 0.0) -> RMSNorm:
    """A norm of the model's width, or of that of something else."""
    return RMSNorm(width or config.whole("hidden_size"), config.real("rms_norm_eps", default=1e-6), offset)


def attention(config: Config, **more: Any) -> Attention:
    """Self-attention of the published sizes; more: what the family has besides."""
    heads = config.whole("num_attention_heads")
    groups = config.whole("num_key_value_heads", default=heads)
    more = {"position": rotary(config), **more}
    own = Attention(config.whole("hidden_size"), heads, groups, config.whole("head_dim", default=None), **more)
    return fitting(config, own)


def gated(config: Config, *size: str, bias: bool = False) -> GatedMLP:
    """A gated feed-forward; size: the setting that tells its width."""
    hidden = config.whole(*(size or ("intermediate_size",)))
    return GatedMLP(
        config.whole("hidden_size"), hidden, config.activation("hidden_act", "hidden_activation", default="silu"), bias
    )


def prenorm(config: Config, *inner: Part) -> Layer:
    """A layer of sub-layers, each normed before."""
    return Layer([PreNorm(norm(config), one) for one in inner])


def decoder(
    config: Config, layer: Callable[[int], Layer], last: RMSNorm | None = None, scale: float = 1.0, **more: Any
) -> Decoder:
    """The whole model; last: its last norm. scale: of its embeddings. more: of its output."""
    embedding = Embedding(config.whole("vocab_size"), config.whole("hidden_size"), scale=scale)
    layers = [layer(index) for index in range(config.layers("num_hidden_layers"))]
    length = config.whole("max_position_embeddings", default=None)
    return Decoder(embedding, layers, last or norm(config), output(config, embedding, **more), length)


def masks(config: Config, kinds: list[str], size: int | None) -> list[Mask]:
    """Each layer's mask: a window where it slides."""
    if size is None and "sliding_attention" in kinds:
        raise config.wrong("sliding_window", "should say how far the sliding layers see")
    sliding = causal if size is None else causal & window(size)
    return [sliding if kind == "sliding_attention" else causal for kind in kinds]


def window_mask(config: Config, usual: int | None) -> Mask:
    """The one mask of all layers: a window, or none where the setting is null."""
    size = config.optional("sliding_window", usual)
    return causal if size is None else causal & window(size)


def mask_settings(model: Any) -> dict[str, Any]:
    """The kinds of the layers and the window, as published."""
    sizes = [getattr(getattr(layer.sublayers[0].inner.mask, "right", None), "size", None) for layer in model.layers]
    return {
        "layer_types": ["full_attention" if size is None else "sliding_attention" for size in sizes],
        "sliding_window": next((size for size in sizes if size is not None), None),
    }


def settings(model: Any) -> dict[str, Any]:
    """The configuration that all of them share."""
    own, inner = model.layers[0].sublayers[0].inner, model.layers[0].sublayers[1].inner
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": own.width,
        "intermediate_size": getattr(inner, "hidden", None),
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": own.heads,
        "num_key_value_heads": own.groups,
        "head_dim": own.dim,
        "rms_norm_eps": model.norm.epsilon,
        **({} if model.max_length is None else {"max_position_embeddings": model.max_length}),
        **rope_settings(own.position),
        **activation_settings("hidden_act", inner),
        **output_settings(model),
    }
