"""T5 and T5 v1.1 (Raffel et al., 2020; Shazeer, 2020): a learned bias for each distance, shared by all layers."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.encoder_decoder import Encoder, EncoderDecoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, within
from formery.models.hub.words import activation_settings, prefix, start_settings
from formery.parts import (
    MLP,
    Attention,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    Output,
    Part,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    TiedOutput,
    causal,
    everything,
)

MAPS = {"query": "q", "key": "k", "value": "v", "output": "o"}


def names(model: Any) -> Names:
    """A feed-forward of two maps, or a gated one."""
    gated = isinstance(model.encoder.layers[0].sublayers[-1].inner, GatedMLP)
    maps = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    found: Names = {"encoder.embedding": "shared", "decoder.output.map": "lm_head"}
    for side, last in (("encoder", 1), ("decoder", 2)):
        ours, theirs = f"{side}.layers.*.sublayers", f"{side}.block.*.layer"
        found |= within(f"{ours}.0.inner", f"{theirs}.0.SelfAttention", position="relative_attention_bias", **MAPS)
        found |= within(f"{ours}.{last}.inner", f"{theirs}.{last}.DenseReluDense", **maps)
        found |= {f"{ours}.{place}.norm": f"{theirs}.{place}.layer_norm" for place in range(last + 1)}
        found[f"{side}.norm"] = f"{side}.final_layer_norm"
    found |= within("decoder.layers.*.sublayers.1.inner", "decoder.block.*.layer.1.EncDecAttention", **MAPS)
    return found


def build(config: Config) -> EncoderDecoder:
    """Scores are not scaled; logits of a tied table are, by 1 / sqrt(width), but for v1.1."""
    config.only("is_encoder_decoder", True)
    width, heads = config.whole("d_model", "hidden_size"), config.whole("num_heads", "num_attention_heads")
    dim = config.whole("d_kv", "head_dim", default=64)
    form = config.get("feed_forward_proj", default="relu")
    gated, _, act = form.rpartition("-") if isinstance(form, str) else ("", "", form)
    act = "gelu_new" if form == "gated-gelu" else act
    config.only("dense_act_fn", act)
    config.only("is_gated_act", gated == "gated")
    feedforward = {"": MLP, "gated": GatedMLP}.get(gated)
    if feedforward is None:
        raise config.wrong("feed_forward_proj", "should be an activation, or gated- and an activation")

    def norm() -> RMSNorm:
        return RMSNorm(width, config.real("layer_norm_epsilon", default=1e-6))

    def wrap(inner: Part) -> PreNorm:
        return PreNorm(norm(), inner)

    def stack(count: int, decoding: bool) -> list[Part]:
        buckets = config.whole("relative_attention_num_buckets", default=32, least=2)
        furthest = config.whole("relative_attention_max_distance", default=128, least=2)
        position = RelativeBuckets(heads, buckets, furthest, bidirectional=not decoding)
        mask = causal if decoding else everything

        def layer() -> Layer:
            own = Attention(width, heads, head_width=dim, position=position, mask=mask, scale=1.0)
            cross = [wrap(CrossAttention(width, heads, head_width=dim, scale=1.0))] if decoding else []
            inner = feedforward(width, config.whole("d_ff"), Config({"act": act}, config.where).activation("act"))
            return Layer([wrap(own), *cross, wrap(inner)])

        return [layer() for _ in range(count)]

    embedding = Embedding(config.whole("vocab_size"), width)
    tied = config.flag("tie_word_embeddings", default=True)
    scaled = config.flag("scale_decoder_outputs", default=tied)
    # Where the scale is told apart, a table of its own may lie there although the two are said to be tied.
    apart = "lm_head.weight" in config.holds and not (tied and scaled)
    scale = width**-0.5 if scaled else 1.0
    output = Output(width, embedding.vocabulary) if apart else TiedOutput(embedding, scale)
    count = config.layers("num_layers", "num_hidden_layers")
    encoder = Encoder(embedding, stack(count, False), norm())
    layers = stack(config.layers("num_decoder_layers", default=count), True)
    pad = config.whole("pad_token_id", default=0, least=0)
    start = config.whole("decoder_start_token_id", default=pad, least=0)
    return EncoderDecoder(encoder, Decoder(embedding, layers, norm(), output), start, prefix(config))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own, inner = model.encoder.layers[0].sublayers[0].inner, model.encoder.layers[0].sublayers[1].inner
    tied = isinstance(model.decoder.output, TiedOutput)
    scaled = tied and model.decoder.output.scale != 1.0
    act = activation_settings("act", inner)["act"]
    return {
        "vocab_size": model.decoder.vocabulary,
        "d_model": own.width,
        "d_kv": own.dim,
        "d_ff": inner.hidden,
        "num_layers": len(model.encoder.layers),
        "num_decoder_layers": len(model.decoder.layers),
        "num_heads": own.heads,
        "relative_attention_num_buckets": own.position.buckets,
        "relative_attention_max_distance": own.position.furthest,
        "layer_norm_epsilon": model.encoder.norm.epsilon,
        "feed_forward_proj": f"gated-{act}" if isinstance(inner, GatedMLP) else act,
        "tie_word_embeddings": scaled,
        "scale_decoder_outputs": scaled,
        "is_encoder_decoder": True,
        **start_settings(model),
    }


FAMILY = register(
    Family(
        "t5", "T5, T5 v1.1", ("T5ForConditionalGeneration",), build, settings, names,
        derived=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
        copies={
            f"{one}.weight": "shared.weight" for one in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")
        },
    )
)  # fmt: skip
