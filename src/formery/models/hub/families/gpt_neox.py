"""GPT-NeoX and Pythia (Black et al., 2022): a quarter of each head is turned; two sub-layers side by side."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import ByHead, Names, fused, within
from formery.models.hub.rope import fitting, rope_settings, rotary
from formery.models.hub.words import activation_settings, output, output_settings
from formery.parts import MLP, Attention, Embedding, Layer, LayerNorm, Parallel, Part, PreNorm

THEIRS = "gpt_neox.layers.*"
SIDE_BY_SIDE = {"norm": "layers.*.norms.{}", "inner": "layers.*.inners.{}"}
IN_TURN = {"norm": "layers.*.sublayers.{}.norm", "inner": "layers.*.sublayers.{}.inner"}


def parts_of(layer: Any) -> list[Any]:
    """The layer's attention and feed-forward."""
    return list(layer.inners) if isinstance(layer, Parallel) else [one.inner for one in layer.sublayers]


def names(model: Any) -> Names:
    """Queries, keys and values lie head by head."""
    ours = SIDE_BY_SIDE if isinstance(model.layers[0], Parallel) else IN_TURN
    own, inner = ours["inner"].format(0), ours["inner"].format(1)
    layout = ByHead(parts_of(model.layers[0])[0].heads)
    return {
        "embedding": "gpt_neox.embed_in",
        ours["norm"].format(0): f"{THEIRS}.input_layernorm",
        ours["norm"].format(1): f"{THEIRS}.post_attention_layernorm",
        **fused(own, f"{THEIRS}.attention.query_key_value", layout, "query", "key", "value"),
        **within(own, f"{THEIRS}.attention", output="dense"),
        **within(inner, f"{THEIRS}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
        "norm": "gpt_neox.final_layer_norm",
        "output.map": "embed_out",
    }


def build(config: Config) -> Decoder:
    """Side by side, or one after the other."""
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    config.only("head_dim", width // heads)
    bias = config.flag("attention_bias", default=True)
    # Outside of the newer table only the family's own names count.
    base, fraction = config.real("rotary_emb_base", default=10_000.0), config.real("rotary_pct", default=0.25)
    position = rotary(config.replaced(rope_theta=base, partial_rotary_factor=fraction))
    parallel = config.flag("use_parallel_residual", default=True)

    def norm() -> LayerNorm:
        return LayerNorm(width, config.real("layer_norm_eps", default=1e-5))

    def layer() -> Part:
        act = config.activation("hidden_act", default="gelu")
        own = fitting(config, Attention(width, heads, position=position, bias=bias), partly=True)
        feedforward = MLP(width, config.whole("intermediate_size"), act, bias=True)
        if parallel:
            return Parallel([norm(), norm()], [own, feedforward])
        return Layer([PreNorm(norm(), own), PreNorm(norm(), feedforward)])

    embedding = Embedding(config.whole("vocab_size"), width)
    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    length = config.whole("max_position_embeddings", default=None)
    return Decoder(embedding, layers, norm(), output(config, embedding), length)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own, inner = parts_of(model.layers[0])
    rope = rope_settings(own.position)
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": own.width,
        "intermediate_size": inner.hidden,
        "num_hidden_layers": len(model.layers),
        "num_attention_heads": own.heads,
        "layer_norm_eps": model.norm.epsilon,
        "attention_bias": own.bias,
        "use_parallel_residual": isinstance(model.layers[0], Parallel),
        **({} if model.max_length is None else {"max_position_embeddings": model.max_length}),
        **rope,
        "rotary_pct": own.position.fraction,
        "rotary_emb_base": own.position.base,
        **activation_settings("hidden_act", inner),
        **output_settings(model),
    }


FAMILY = register(
    Family(
        "gpt_neox", "GPT-NeoX, Pythia", ("GPTNeoXForCausalLM",), build, settings, names, base="gpt_neox",
        derived=("layers.*.attention.bias", "layers.*.attention.masked_bias", "*.rotary_emb.inv_freq"),
        copies={"embed_out.weight": "gpt_neox.embed_in.weight"},
    )
)  # fmt: skip
