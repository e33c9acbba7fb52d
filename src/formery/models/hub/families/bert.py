"""BERT (Devlin et al., 2019): its vectors, its missing words, or a class for a text."""

from typing import Any

from formery.models.encoder import Reader
from formery.models.hub import bidirectional
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names

NAMES: Names = bidirectional.text_names("bert") | {
    "head.dense": "bert.pooler.dense",
    "head.pool.dense": "bert.pooler.dense",
    "head.map": "classifier",
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
    "head.output.shift": "cls.predictions.bias",
}


def build(config: Config) -> Reader:
    """The head is what the architecture's name tells of."""
    act = config.activation("hidden_act", default="gelu")
    return bidirectional.text_reader(config, bidirectional.text_encoder(config), "Bert", act)


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    return bidirectional.text_settings(model, "Bert")


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
