"""RoBERTa (Liu et al., 2019): BERT with positions from the row after the padding token's on."""

from typing import Any

from formery.models.encoder import Reader
from formery.models.hub import bidirectional
from formery.models.hub.config import Config
from formery.models.hub.family import Family, register
from formery.models.hub.names import Names

NAMES: Names = bidirectional.text_names("roberta") | {
    "head.dense": "roberta.pooler.dense",
    "head.pool.dense": "classifier.dense",
    "head.map": "classifier.out_proj",
    "head.transform": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.output.shift": "lm_head.bias",
}


def build(config: Config) -> Reader:
    """The head is what the architecture's name tells of."""
    offset = config.whole("pad_token_id", default=1, least=0, most=65536) + 1
    return bidirectional.text_reader(config, bidirectional.text_encoder(config, offset), "Roberta", "gelu")


def settings(model: Any) -> dict[str, Any]:
    """The configuration of a model of this family."""
    offset = model.encoder.embedding.position.parts[0].offset
    return {**bidirectional.text_settings(model, "Roberta"), "pad_token_id": offset - 1}


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
