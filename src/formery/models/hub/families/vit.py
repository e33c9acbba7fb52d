"""ViT (Dosovitskiy et al., 2021): a picture as a row of patches, with one place in front for the whole."""

from typing import Any

from formery.models.encoder import Encoder, Reader
from formery.models.hub import bidirectional
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names, Shaped, Where, within
from formery.parts import Classifier, FirstPlace, Layer, Linear, Patches, Pooler, PreNorm

OURS, THEIRS = "encoder.layers.*.sublayers", "vit.encoder.layer.*"


def names(model: Any) -> Names:
    """Patches lie as a convolution's kernels, the first place and the positions with a batch of one."""
    into = model.encoder.embedding
    width, kernel = into.width, (into.width, into.channels, *into.patch_size)
    return {
        "encoder.embedding.map": "vit.embeddings.patch_embeddings.projection",
        "encoder.embedding.map.weight": Where("vit.embeddings.patch_embeddings.projection.weight", Shaped(kernel)),
        "encoder.embedding.first": Where("vit.embeddings.cls_token", Shaped((1, 1, width))),
        "encoder.embedding.positions": Where("vit.embeddings.position_embeddings", Shaped((1, -1, width))),
        **within(f"{OURS}.0.inner", f"{THEIRS}.attention.attention", query="query", key="key", value="value"),
        **within(f"{OURS}.0.inner", f"{THEIRS}.attention.output", output="dense"),
        **within(f"{OURS}.1.inner", THEIRS, up="intermediate.dense", down="output.dense"),
        f"{OURS}.0.norm": f"{THEIRS}.layernorm_before",
        f"{OURS}.1.norm": f"{THEIRS}.layernorm_after",
        "encoder.norm": "vit.layernorm",
        "head.dense": "vit.pooler.dense",
        "head.map": "classifier",
    }


def build(config: Config) -> Reader:
    """Norms before each sub-layer; the class is read off the first place."""
    width, bias = config.whole("hidden_size"), config.flag("qkv_bias", default=True)
    config.only("pooler_act", "tanh")
    config.only("pooler_output_size", width)
    image, patch = (pair(config, name, usual) for name, usual in (("image_size", 224), ("patch_size", 16)))
    into = Patches(config.whole("num_channels", default=3), image, patch, width)

    def layer() -> Layer:
        return Layer([PreNorm(bidirectional.norm(config), one) for one in bidirectional.inner(config, bias)])

    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    encoder = Encoder(into, layers, bidirectional.norm(config))
    if config.architecture == "ViTForImageClassification":
        labels = bidirectional.labels(config)
        return Reader(encoder, Classifier(FirstPlace(), Linear(width, len(labels), True)), labels)
    pooled = any(name.endswith("pooler.dense.weight") for name in config.holds)
    return Reader(encoder, Pooler(width) if pooled else None)


def pair(config: Config, name: str, usual: int) -> list[int]:
    """A height and a width, given as one number or as two."""
    value = config.get(name, default=usual)
    both = value if isinstance(value, list) else [value, value]
    if len(both) != 2:
        raise config.wrong(name, "should be a height and a width")
    return [Config({name: one}, config.where).whole(name, most=65536) for one in both]


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    into, classifies = model.encoder.embedding, isinstance(model.head, Classifier)
    return {
        **bidirectional.settings(model),
        "num_channels": into.channels,
        "image_size": list(into.image_size),
        "patch_size": list(into.patch_size),
        "qkv_bias": model.encoder.layers[0].sublayers[0].inner.bias,
        "architectures": ["ViTForImageClassification" if classifies else "ViTModel"],
    }


FAMILY = register(
    Family(
        "vit", "ViT", ("ViTModel", "ViTForImageClassification"), build, settings, names, base="vit",
        derived=("pooler.dense.*",),
    )
)  # fmt: skip
