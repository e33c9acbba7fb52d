"""RoBERTa (Liu et al., 2019): BERT with positions from the row after the padding token's on."""

from typing import Any

from formery.models.encoder import Encoder, Reader
from formery.models.hub import bidirectional
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names
from formery.parts import Classifier, Layer, Linear, MaskedOutput, Part, Pooler, PostNorm

NAMES: Names = bidirectional.text_names("roberta") | {
    "head.dense": "roberta.pooler.dense",
    "head.pool.dense": "classifier.dense",
    "head.map": "classifier.out_proj",
    "head.transform": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.output.shift": "lm_head.bias",
}


def build(config: Config) -> Reader:
    """Norms after each sub-layer; the head that the architecture's name tells of."""
    offset = config.whole("pad_token_id", default=1, least=0, most=65536) + 1
    embedding = bidirectional.text_embedding(config, offset)
    width = config.whole("hidden_size")

    def layer() -> Layer:
        return Layer([PostNorm(bidirectional.norm(config), one) for one in bidirectional.inner(config)])

    layers = [layer() for _ in range(config.layers("num_hidden_layers"))]
    encoder = Encoder(embedding, layers, None, config.whole("max_position_embeddings", default=512) - offset)
    kind = config.architecture
    head: Part | None = None
    if kind == "RobertaForMaskedLM":
        config.only("tie_word_embeddings", True)
        head = MaskedOutput(embedding, "gelu", bidirectional.norm(config))
    elif kind == "RobertaForSequenceClassification":
        labels = bidirectional.labels(config)
        return Reader(encoder, Classifier(Pooler(width), Linear(width, len(labels), True)), labels)
    elif any(name.endswith("pooler.dense.weight") for name in config.holds):
        head = Pooler(width)
    return Reader(encoder, head)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    kinds = {MaskedOutput: "RobertaForMaskedLM", Classifier: "RobertaForSequenceClassification"}
    offset = model.encoder.embedding.position.parts[0].offset
    kind = kinds.get(type(model.head), "RobertaModel")
    return {**bidirectional.text_settings(model), "pad_token_id": offset - 1, "architectures": [kind]}


FAMILY = register(
    Family(
        "roberta", "RoBERTa", ("RobertaModel", "RobertaForMaskedLM", "RobertaForSequenceClassification"), build,
        settings, NAMES, base="roberta",
        derived=("embeddings.position_ids", "pooler.dense.*"),
        copies={
            "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
            "lm_head.decoder.bias": "lm_head.bias",
        },
    )
)  # fmt: skip
