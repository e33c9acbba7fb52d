"""What the descendants of BERT share: an encoder whose attention is everywhere, and small heads on it."""

from typing import Any

from formery.models.encoder import Encoder, Reader
from formery.models.hub.config import Config
from formery.models.hub.names import within
from formery.models.hub.words import activation_settings
from formery.parts import (
    MLP,
    Attention,
    Classifier,
    Embedding,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    MaskedOutput,
    Pooler,
    PostNorm,
    Together,
    TokenTypes,
    everything,
)


def inner(config: Config, bias: bool = True) -> tuple[Attention, MLP]:
    """Attention and feed-forward of the published sizes; bias: of queries, keys and values."""
    width, heads = config.whole("hidden_size"), config.whole("num_attention_heads")
    act = config.activation("hidden_act", default="gelu")
    attention = Attention(width, heads, mask=everything, bias=bias, output_bias=True)
    return attention, MLP(width, config.whole("intermediate_size"), act, bias=True)


def norm(config: Config) -> LayerNorm:
    """A norm of the model's width."""
    return LayerNorm(config.whole("hidden_size"), config.real("layer_norm_eps", default=1e-12))


def labels(config: Config) -> list[str]:
    """The names of the classes, in order."""
    named = config.get("id2label")
    if named is None:
        return [f"LABEL_{number}" for number in range(config.whole("num_labels", default=2, most=100_000))]
    found = [named.get(str(number)) for number in range(len(named))] if isinstance(named, dict) else [None]
    if not found or not all(isinstance(one, str) for one in found):
        raise config.wrong("id2label", "should name each class by its number, from 0 on")
    return [str(one) for one in found]


def label_settings(model: Any) -> dict[str, Any]:
    """The names of the classes, as published."""
    if not model.labels:
        return {}
    numbered = {str(number): label for number, label in enumerate(model.labels)}
    return {"id2label": numbered, "label2id": {label: number for number, label in enumerate(model.labels)}}


def text_embedding(config: Config, offset: int = 0) -> Embedding:
    """Tokens, positions and types, added and normed; offset: rows of the table of positions before the first."""
    config.only("position_embedding_type", "absolute")
    config.only("is_decoder", False)
    config.only("add_cross_attention", False)
    width, rows = config.whole("hidden_size"), config.whole("max_position_embeddings", default=512, least=offset + 1)
    types = TokenTypes(config.whole("type_vocab_size", default=2), width)
    position = Together([Learned(rows - offset, width, offset), types])
    return Embedding(config.whole("vocab_size"), width, position, norm(config))


def text_encoder(config: Config, offset: int = 0) -> Encoder:
    """An encoder of texts, a norm after each sub-layer; offset: as of `text_embedding`."""
    embedding = text_embedding(config, offset)
    layers = [
        Layer([PostNorm(norm(config), one) for one in inner(config)])
        for _ in range(config.layers("num_hidden_layers"))
    ]
    return Encoder(embedding, layers, None, config.whole("max_position_embeddings", default=512) - offset)


def text_reader(config: Config, encoder: Encoder, name: str, activation: str) -> Reader:
    """The encoder with the head that the architecture's name tells of; activation: of the head for missing words."""
    assert isinstance(encoder.embedding, Embedding)
    width, kind = encoder.embedding.width, config.architecture
    if kind == f"{name}ForMaskedLM":
        config.only("tie_word_embeddings", True)
        return Reader(encoder, MaskedOutput(encoder.embedding, activation, norm(config)))
    if kind == f"{name}ForSequenceClassification":
        classes = labels(config)
        return Reader(encoder, Classifier(Pooler(width), Linear(width, len(classes), True)), classes)
    pooled = any(one.endswith("pooler.dense.weight") for one in config.holds)
    return Reader(encoder, Pooler(width) if pooled else None)


def text_names(base: str) -> dict[str, Any]:
    """The names of an encoder of texts, below the module `base`."""
    ours, theirs = "encoder.layers.*.sublayers", f"{base}.encoder.layer.*"
    return {
        "encoder.embedding": f"{base}.embeddings.word_embeddings",
        "encoder.embedding.position.parts.0": f"{base}.embeddings.position_embeddings",
        "encoder.embedding.position.parts.1": f"{base}.embeddings.token_type_embeddings",
        "encoder.embedding.norm": f"{base}.embeddings.LayerNorm",
        **within(f"{ours}.0.inner", f"{theirs}.attention.self", query="query", key="key", value="value"),
        **within(f"{ours}.0", f"{theirs}.attention.output", norm="LayerNorm"),
        **within(f"{ours}.0.inner", f"{theirs}.attention.output", output="dense"),
        **within(f"{ours}.1.inner", theirs, up="intermediate.dense", down="output.dense"),
        **within(f"{ours}.1", f"{theirs}.output", norm="LayerNorm"),
    }


def settings(model: Any) -> dict[str, Any]:
    """The sizes of the encoder."""
    own, feedforward = (one.inner for one in model.encoder.layers[0].sublayers)
    return {
        "hidden_size": own.width,
        "intermediate_size": feedforward.hidden,
        "num_hidden_layers": len(model.encoder.layers),
        "num_attention_heads": own.heads,
        "layer_norm_eps": model.encoder.layers[0].sublayers[0].norm.epsilon,
        **activation_settings("hidden_act", feedforward),
        **label_settings(model),
    }


def text_settings(model: Any, name: str) -> dict[str, Any]:
    """The sizes of an encoder of texts, and the architecture that its head makes it."""
    positions, types = model.encoder.embedding.position.parts
    kinds = {MaskedOutput: f"{name}ForMaskedLM", Classifier: f"{name}ForSequenceClassification"}
    return {
        **settings(model),
        "architectures": [kinds.get(type(model.head), f"{name}Model")],
        "vocab_size": model.encoder.embedding.vocabulary,
        "max_position_embeddings": positions.length + positions.offset,
        "type_vocab_size": types.types,
    }

