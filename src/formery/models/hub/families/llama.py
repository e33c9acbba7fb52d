"""Llama 2 and 3 (Touvron et al., 2023; Llama team, 2024)."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register


def build(config: Config) -> Decoder:
    """Grouped heads, rotary positions with any of the known scalings."""
    bias, biased = config.flag("attention_bias", default=False), config.flag("mlp_bias", default=False)
    config.only("pretraining_tp", 1)
    return gated.decoder(
        config,
        lambda _: gated.prenorm(config, gated.attention(config, bias=bias), gated.gated(config, bias=biased)),
    )


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own, inner = model.layers[0].sublayers[0].inner, model.layers[0].sublayers[1].inner
    return {**gated.settings(model), "attention_bias": own.bias, "mlp_bias": inner.bias}


FAMILY = register(
    Family(
        "llama", "Llama 2, 3", ("LlamaForCausalLM",), build, settings, gated.NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
