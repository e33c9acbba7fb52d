"""Mistral (Jiang et al., 2023): Llama with a sliding window."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register


def build(config: Config) -> Decoder:
    """Every layer sees a window, or everything where there is none."""
    mask = gated.window_mask(config, 4096)
    return gated.decoder(
        config, lambda _: gated.prenorm(config, gated.attention(config, mask=mask), gated.gated(config))
    )


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return {**gated.settings(model), "sliding_window": gated.mask_settings(model)["sliding_window"]}


FAMILY = register(
    Family(
        "mistral", "Mistral", ("MistralForCausalLM",), build, settings, gated.NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
