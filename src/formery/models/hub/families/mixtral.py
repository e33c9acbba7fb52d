"""Mixtral (Jiang et al., 2024): Mistral with experts in the place of the feed-forward."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, within
from formery.parts import Experts

MOE = f"{gated.THEIRS}.block_sparse_moe"
NAMES: Names = (
    gated.FRAME
    | gated.ATTENTION
    | within(f"{gated.LAYER}.1.inner", MOE, router="gate")
    | within(f"{gated.LAYER}.1.inner.experts.*", f"{MOE}.experts.*", gate="w1", down="w2", up="w3")
)


def experts(config: Config) -> Experts:
    """The two likeliest experts of eight, their shares made to sum to one."""
    count = config.layers("num_local_experts", "num_experts", default=8)
    active = config.whole("num_experts_per_tok", default=2, most=count)
    return Experts(config.whole("hidden_size"), [gated.gated(config) for _ in range(count)], active)


def build(config: Config) -> Decoder:
    """Windows as in Mistral."""
    mask = gated.window_mask(config, None)
    config = config.replaced(rms_norm_eps=config.real("rms_norm_eps", default=1e-5))
    base = {"position": gated.rotary(config, 1e6), "mask": mask}
    return gated.decoder(
        config, lambda _: gated.prenorm(config, gated.attention(config, **base), experts(config))
    )


def expert_settings(model: Any) -> dict[str, Any]:
    """The number of experts and their width."""
    moe = model.layers[0].sublayers[1].inner
    inner = moe.experts[0]
    return {
        "intermediate_size": inner.hidden,
        "num_experts_per_tok": moe.active,
        **gated.activation_settings("hidden_act", inner),
    }


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return {
        **gated.settings(model),
        **expert_settings(model),
        "num_local_experts": len(model.layers[0].sublayers[1].inner.experts),
        "sliding_window": gated.mask_settings(model)["sliding_window"],
    }


FAMILY = register(
    Family(
        "mixtral", "Mixtral", ("MixtralForCausalLM",), build, settings, NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
