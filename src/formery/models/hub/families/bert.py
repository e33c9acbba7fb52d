"""BERT (Devlin et al., 2019): its vectors, its missing words, or a class for a text."""

from typing import Any

from formery.models.encoder import Encoder, Reader
from formery.models.hub import bidirectional
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names
from formery.parts import Classifier, Layer, Linear, MaskedOutput, Part, Pooler, PostNorm

NAMES: Names = bidirectional.text_names("bert") | {
    "head.dense": "bert.pooler.dense",
    "head.pool.dense": "bert.pooler.dense",
    "head.map": "classifier",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.output.shift": "cls.predictions.bias",
}


def build(config: Config) -> Reader:
    """Norms after each sub-layer; the head that the architecture's name tells of."""
    embedding = bidirectional.text_embedding(config)
    width = config.whole("hidden_size")

    def layer() -> Layer:
        return Layer([PostNorm(bidirectional.norm(config), one) for one in bidirectional.inner(config)])

    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    encoder = Encoder(embedding, layers, None, config.whole("max_position_embeddings", default=512))
    kind = config.architecture
    head: Part | None = None
    if kind == "BertForMaskedLM":
        config.only("tie_word_embeddings", True)
        head = MaskedOutput(embedding, config.activation("hidden_act", default="gelu"), bidirectional.norm(config))
    elif kind == "BertForSequenceClassification":
        labels = bidirectional.labels(config)
        return Reader(encoder, Classifier(Pooler(width), Linear(width, len(labels), True)), labels)
    elif any(name.endswith("pooler.dense.weight") for name in config.holds):
        head = Pooler(width)
    return Reader(encoder, head)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    kinds = {MaskedOutput: "BertForMaskedLM", Classifier: "BertForSequenceClassification"}
    kind = kinds.get(type(model.head), "BertModel")
    return {**bidirectional.text_settings(model), "architectures": [kind]}


FAMILY = register(
    Family(
        "bert", "BERT", ("BertModel", "BertForMaskedLM", "BertForSequenceClassification"), build, settings, NAMES,
        base="bert",
        derived=("embeddings.position_ids", "pooler.dense.*", "cls.seq_relationship.*"),
        copies={
            "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.bias": "cls.predictions.bias",
        },
    )
)  # fmt: skip
