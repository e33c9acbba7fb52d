"""OLMoE (Muennighoff et al., 2024): many small experts; queries and keys are normed across their heads."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub import gated
from formery.models.hub.config import Config
from formery.models.hub.families.mixtral import expert_settings
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, within
from formery.parts import AcrossHeads, Attention, Experts, Layer

OWN, MLP = f"{gated.LAYER}.0.inner", f"{gated.THEIRS}.mlp"
NORMS = {"query_norm.norm": "q_norm", "key_norm.norm": "k_norm"}
NAMES: Names = (
    gated.FRAME
    | gated.ATTENTION
    | within(OWN, f"{gated.THEIRS}.self_attn", **NORMS)
    | within(f"{gated.LAYER}.1.inner", MLP, router="gate")
    | within(f"{gated.LAYER}.1.inner.experts.*", f"{MLP}.experts.*", gate="gate_proj", down="down_proj", up="up_proj")
)


def build(config: Config) -> Decoder:
    """The experts' shares are not made to sum to one, unless asked for."""
    config.only("clip_qkv")
    config = config.replaced(rms_norm_eps=config.real("rms_norm_eps", default=1e-5))
    count = config.layers("num_experts", "num_local_experts", default=64)
    active = config.whole("num_experts_per_tok", default=8, most=count)
    normalised, bias = config.flag("norm_topk_prob", default=False), config.flag("attention_bias", default=False)

    def attention() -> Attention:
        own = gated.attention(config, bias=bias)
        query_norm, key_norm = (
            AcrossHeads(gated.norm(config, heads * own.dim)) for heads in (own.heads, own.groups)
        )
        return gated.attention(config, bias=bias, query_norm=query_norm, key_norm=key_norm)

    def layer(_: int) -> Layer:
        experts = Experts(config.whole("hidden_size"), [gated.gated(config) for _ in range(count)], active, normalised)
        return gated.prenorm(config, attention(), experts)

    return gated.decoder(config, layer)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own, moe = model.layers[0].sublayers[0].inner, model.layers[0].sublayers[1].inner
    return {
        **gated.settings(model),
        **expert_settings(model),
        "num_experts": len(moe.experts),
        "norm_topk_prob": moe.normalised,
        "attention_bias": own.bias,
    }


FAMILY = register(
    Family(
        "olmoe", "OLMoE", ("OlmoeForCausalLM",), build, settings, NAMES,
        base="model", derived=gated.DERIVED, copies=gated.COPIES,
    )
)  # fmt: skip
