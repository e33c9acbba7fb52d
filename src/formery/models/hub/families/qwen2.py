"""Qwen 2 and 2.5 (Yang et al., 2024): Llama with biased queries, keys and values, windows in later layers."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.parts import Mask


def windows(config: Config) -> list[Mask]:
    """Each layer's mask: a window from the layer `max_window_layers` on, where windows are used."""
    used = config.flag("use_sliding_window", default=False)
    size = config.optional("sliding_window", 4096) if used else None
    count, full = config.layers("num_hidden_layers"), config.whole("max_window_layers", default=28, least=0)
    usual = ["sliding_attention" if used and layer >= full else "full_attention" for layer in range(count)]
    return gated.masks(config, config.kinds("layer_types", count, ("full_attention", "sliding_attention"), usual), size)


def window_settings(model: Any) -> dict[str, Any]:
    """The windows, as published."""
    told = gated.mask_settings(model)
    return {**told, "use_sliding_window": told["sliding_window"] is not None, "max_window_layers": len(model.layers)}


def build(config: Config) -> Decoder:
    """Biased queries, keys and values."""
    masks = windows(config)
    return gated.decoder(
        config,
        lambda index: gated.prenorm(
            config,
            gated.attention(config, bias=True, output_bias=False, mask=masks[index]),
            gated.gated(config),
        ),
    )


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return {**gated.settings(model), **window_settings(model)}


FAMILY = register(
    Family(
        "qwen2", "Qwen 2, 2.5", ("Qwen2ForCausalLM",), build, settings, gated.NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
