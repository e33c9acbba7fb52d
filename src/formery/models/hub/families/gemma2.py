"""Gemma 2 (Gemma team, 2024): bounded scores and logits, windows in every other layer, norms before and after."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names
from formery.parts import Layer, Part, RMSNorm, Sandwich

NAMES: Names = {
    "embedding": "model.embed_tokens",
    f"{gated.LAYER}.0.before": f"{gated.THEIRS}.input_layernorm",
    f"{gated.LAYER}.0.after": f"{gated.THEIRS}.post_attention_layernorm",
    f"{gated.LAYER}.1.before": f"{gated.THEIRS}.pre_feedforward_layernorm",
    f"{gated.LAYER}.1.after": f"{gated.THEIRS}.post_feedforward_layernorm",
    "norm": "model.norm",
    "output.map": "lm_head",
    **gated.ATTENTION,
    **gated.FEEDFORWARD,
}


def build(config: Config) -> Decoder:
    """Norms store their difference from one; embeddings are scaled by the root of the width."""
    config.only("use_bidirectional_attention", False)
    config = config.replaced(head_dim=config.whole("head_dim", default=256))
    config = config.replaced(hidden_act=config.get("hidden_activation", default="gelu_pytorch_tanh"))
    count, width = config.layers("num_hidden_layers"), config.whole("hidden_size")
    usual = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(count)]
    kinds = config.kinds("layer_types", count, ("full_attention", "sliding_attention"), usual)
    masks = gated.masks(config, kinds, config.optional("sliding_window", 4096))
    bias = config.flag("attention_bias", default=False)
    scale = config.real("query_pre_attn_scalar", default=256.0, least=1e-6) ** -0.5
    soft_cap = config.optional("attn_logit_softcapping", 50.0)

    def norm() -> RMSNorm:
        return gated.norm(config, offset=1.0)

    def sandwich(inner: Part) -> Sandwich:
        return Sandwich(norm(), inner, norm())

    def layer(index: int) -> Layer:
        own = gated.attention(config, mask=masks[index], bias=bias, scale=scale, soft_cap=soft_cap)
        return Layer([sandwich(own), sandwich(gated.gated(config))])

    last = config.optional("final_logit_softcapping", 30.0)
    return gated.decoder(config, layer, norm(), scale=width**0.5, tied=True, soft_cap=last)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own = model.layers[0].sublayers[0].inner
    told = gated.settings(model)
    return {
        **told,
        **gated.mask_settings(model),
        "hidden_activation": told["hidden_act"],
        "attention_bias": own.bias,
        "query_pre_attn_scalar": whole((own.scale or own.dim**-0.5) ** -2),
        "attn_logit_softcapping": own.soft_cap,
        "final_logit_softcapping": model.output.soft_cap,
    }


def whole(value: float) -> float:
    """The whole number that a rounded inverse square was, if it was one."""
    return round(value) if abs(value - round(value)) < 1e-6 * value else value


FAMILY = register(
    Family(
        "gemma2", "Gemma 2", ("Gemma2ForCausalLM",), build, settings, NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
