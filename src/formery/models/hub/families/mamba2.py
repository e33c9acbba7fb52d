"""Mamba-2 (Dao and Gu, 2024): no attention, but a recurrent state of constant size."""

from typing import Any

from formery.models.decoder import Decoder
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, Shaped, Where, within
from formery.models.hub.words import output, output_settings
from formery.parts import Embedding, Layer, Mamba2, PreNorm, RMSNorm

OURS, THEIRS = "layers.*.sublayers.0", "backbone.layers.*"
OWN = {"step_shift": "dt_bias", "log_decay": "A_log", "skip": "D"}
UNBOUNDED = {"__float__": "Infinity"}


def names(model: Any) -> Names:
    """A convolution's kernel lies in a dimension of its own."""
    kernel = model.layers[0].sublayers[0].inner.kernel
    return {
        "embedding": "backbone.embeddings",
        f"{OURS}.norm": f"{THEIRS}.norm",
        **within(f"{OURS}.inner", f"{THEIRS}.mixer", input="in_proj", norm="norm", output="out_proj", **OWN),
        f"{OURS}.inner.convolution": f"{THEIRS}.mixer.conv1d",
        f"{OURS}.inner.convolution.weight": Where(f"{THEIRS}.mixer.conv1d.weight", Shaped((-1, 1, kernel))),
        "norm": "backbone.norm_f",
        "output.map": "lm_head",
    }


def steps(config: Config) -> tuple[float, float | None]:
    """The bounds of a step; infinity may be written in several ways."""
    limit = config.get("time_step_limit", default=[0.0, UNBOUNDED])
    if not isinstance(limit, list) or len(limit) != 2:
        raise config.wrong("time_step_limit", "should be a least and a largest step")
    least, most = limit
    unbounded = most in (UNBOUNDED, "Infinity", float("inf"))
    inner = Config({"least": least, "most": None if unbounded else most}, f"{config.where}, time_step_limit")
    return inner.real("least"), inner.real("most", default=None)


def build(config: Config) -> Decoder:
    """The text may be of any length."""
    config.only("hidden_act", "silu", "swish")
    width = config.whole("hidden_size")
    heads, dim = config.whole("num_heads", default=128), config.whole("head_dim", default=64)
    if width * config.whole("expand", default=2) != heads * dim:
        raise config.wrong("expand", f"times hidden_size should be num_heads times head_dim, {heads * dim}")
    epsilon, (least, most) = config.real("layer_norm_epsilon", default=1e-5), steps(config)

    def layer() -> Layer:
        mixer = Mamba2(
            width, heads, dim, config.whole("state_size", default=128), config.whole("n_groups", default=8),
            config.whole("conv_kernel", default=4), config.flag("use_bias", default=False),
            config.flag("use_conv_bias", default=True), epsilon, least, most,
        )  # fmt: skip
        return Layer([PreNorm(RMSNorm(width, epsilon), mixer)])

    embedding = Embedding(config.whole("vocab_size"), width)
    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    return Decoder(embedding, layers, RMSNorm(width, epsilon), output(config, embedding))


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    own = model.layers[0].sublayers[0].inner
    return {
        "vocab_size": model.vocabulary,
        "hidden_size": own.width,
        "num_hidden_layers": len(model.layers),
        "num_heads": own.heads,
        "head_dim": own.head_width,
        "expand": own.heads * own.head_width // own.width,
        "state_size": own.state_width,
        "n_groups": own.groups,
        "conv_kernel": own.kernel,
        "use_bias": own.bias,
        "use_conv_bias": own.convolution_bias,
        "layer_norm_epsilon": own.epsilon,
        "time_step_limit": [own.shortest_step, UNBOUNDED if own.longest_step is None else own.longest_step],
        **output_settings(model),
    }


FAMILY = register(
    Family(
        "mamba2", "Mamba-2", ("Mamba2ForCausalLM",), build, settings, names, base="backbone",
        copies={"lm_head.weight": "backbone.embeddings.weight"},
    )
)  # fmt: skip
