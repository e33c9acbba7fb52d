"""Qwen 3 (Yang et al., 2025): queries and keys are normed head by head."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.families.qwen2 import window_settings, windows
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, within
from formery.parts import Attention, Mask

NORMS = within(f"{gated.LAYER}.0.inner", f"{gated.THEIRS}.self_attn", query_norm="q_norm", key_norm="k_norm")
NAMES: Names = gated.NAMES | NORMS


def attention(config: Config, mask: Mask) -> Attention:
    """Heads of a width of their own, normed before they are turned."""
    bias, width = config.flag("attention_bias", default=False), config.whole("head_dim", default=128)
    norms = {name: gated.norm(config, width) for name in ("query_norm", "key_norm")}
    return gated.attention(config.replaced(head_dim=width), bias=bias, mask=mask, **norms)


def build(config: Config) -> Decoder:
    """As Qwen 2 but for the norms and biases."""
    masks = windows(config)
    return gated.decoder(
        config, lambda index: gated.prenorm(config, attention(config, masks[index]), gated.gated(config))
    )


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own = model.layers[0].sublayers[0].inner
    return {**gated.settings(model), **window_settings(model), "attention_bias": own.bias}


FAMILY = register(
    Family(
        "qwen3", "Qwen 3", ("Qwen3ForCausalLM",), build, settings, NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
