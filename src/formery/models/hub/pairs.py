"""What the descendants of BART share: two stacks of biased attention, LayerNorm and feed-forwards of two maps."""

from collections.abc import Callable
from typing import Any

from formery.models.hub.config import Config
from formery.models.hub.names import Names, Where, within
from formery.models.hub.words import activation_settings, start_settings
from formery.parts import MLP, Attention, CrossAttention, Layer, LayerNorm, Part, causal, everything

MAPS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
Residual = Callable[[Part, Part], Part]


def names(shared: bool = True) -> dict[str, str | Where]:
    """The names of both stacks; shared: the two, and the way out, have one table of embeddings."""
    tables = {f"{one}.embedding": f"model.{one}.embed_tokens" for one in ("encoder", "decoder")}
    found: dict[str, str | Where] = {"encoder.embedding": "model.shared"} if shared else {**tables}
    for side, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}.layers.*.sublayers", f"model.{side}.layers.*"
        found |= within(f"{ours}.0.inner", f"{theirs}.self_attn", **MAPS)
        found |= within(f"{ours}.0", theirs, norm="self_attn_layer_norm")
        found |= within(f"{ours}.{last}.inner", theirs, up="fc1", down="fc2")
        found |= within(f"{ours}.{last}", theirs, norm="final_layer_norm")
    found |= within("decoder.layers.*.sublayers.1.inner", "model.decoder.layers.*.encoder_attn", **MAPS)
    found |= within("decoder.layers.*.sublayers.1", "model.decoder.layers.*", norm="encoder_attn_layer_norm")
    return found


COPIES = {
    "model.encoder.embed_tokens.weight": "model.shared.weight",
    "model.decoder.embed_tokens.weight": "model.shared.weight",
    "lm_head.weight": "model.shared.weight",
}
NAMES: Names = names()


def layers(
    config: Config, side: str, residual: Residual, finish: Callable[[Any], Part] = lambda part: part
) -> list[Part]:
    """The layers of one side; residual: how a norm and a sub-layer are put together. finish: a change of attention."""
    config.only("is_encoder_decoder", True)
    # Names that speak of no side speak of the encoder.
    reading = side == "encoder"
    width = config.whole("d_model", "hidden_size")
    heads = config.whole(f"{side}_attention_heads", *(("num_attention_heads",) if reading else ()))
    hidden, act = config.whole(f"{side}_ffn_dim"), config.activation("activation_function", default="gelu")

    def layer() -> Layer:
        mask = everything if side == "encoder" else causal
        parts: list[Part] = [finish(Attention(width, heads, bias=True, mask=mask)), MLP(width, hidden, act, bias=True)]
        if side == "decoder":
            parts.insert(1, finish(CrossAttention(width, heads, bias=True)))
        return Layer([residual(LayerNorm(width), one) for one in parts])

    names = ("num_hidden_layers",) if reading else ()
    return [layer() for _ in range(config.layers(f"{side}_layers", *names))]


def settings(model: Any) -> dict[str, Any]:
    """The sizes of both sides, and the first tokens."""
    told: dict[str, Any] = {"d_model": model.decoder.embedding.width, "vocab_size": model.decoder.vocabulary}
    for side, stack in (("encoder", model.encoder.layers), ("decoder", model.decoder.layers)):
        own, inner = stack[0].sublayers[0].inner, stack[0].sublayers[-1].inner
        told |= {f"{side}_layers": len(stack), f"{side}_attention_heads": own.heads, f"{side}_ffn_dim": inner.hidden}
        told |= activation_settings("activation_function", inner)
    return {**told, **start_settings(model), "is_encoder_decoder": True}
