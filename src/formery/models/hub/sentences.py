"""Encoders of sentences as sentence-transformers publishes them (Reimers and Gurevych, 2019).

Beside a family's model lie `modules.json`, which lists what is made of its vectors step by step, a folder with the
settings of each step, and `sentence_bert_config.json`, with how many tokens of a text are read.
"""

import re
from pathlib import Path
from typing import Any

from tokenizers import normalizers

from formery.data.tokenizer import Tokenizer
from formery.data.tokens import read_beside
from formery.errors import FormeryError
from formery.models.encoder import Encoder, Reader
from formery.models.hub.config import Config, read_json, read_tables
from formery.parts import Classifier, Embedding, FirstPlace, Learned, MeanPool, Normalised, Part

MODULES, WHOLE = "modules.json", "config_sentence_transformers.json"
ENCODER = ("sentence_bert_config.json", "sentence_roberta_config.json")
POOLING, NORMALISE = "1_Pooling", "2_Normalize"
POOLINGS: dict[str, type[Part]] = {"mean": MeanPool, "cls": FirstPlace}
# One flag for each way of pooling came before one setting that names it.
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_ARRANGEMENTS = (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
_LIBRARY = "sentence_transformers."


def headed(folder: Path, model: Any) -> Any:
    """The model with the head and the length that a folder's `modules.json` tells of; as it is where there is none.

    A model that reads a pair to judge it keeps its own head. Raises FormeryError for a module or a setting that asks
    for something that is not known here.
    """
    if not (folder / MODULES).is_file() or not _reads_texts(model):
        return model
    modules = _modules(folder / MODULES)
    kinds = [kind for kind, _ in modules]
    if kinds == ["Transformer"] and isinstance(model.head, Classifier):
        return model
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if kinds not in _ARRANGEMENTS:
        what = f"a module {unknown[0]}" if unknown else f"the modules {', '.join(kinds) or 'none'}, in this order"
        raise FormeryError(
            f"{folder / MODULES} asks for {what}, which is not supported; known are a Transformer, a Pooling and, "
            "where there is one, a Normalize, in this order."
        )
    if modules[0][1]:
        raise FormeryError(f"{folder / MODULES} has its Transformer in {modules[0][1]}, not in the folder itself.")
    _check_prompt(folder)
    length, own = _length(folder), model.max_length
    model.encoder.max_length = min((one for one in (length, own) if one is not None), default=None)
    pool = _pooling(folder / modules[1][1] / "config.json", model.encoder.embedding.width)
    return Reader(model.encoder, Normalised(pool) if "Normalize" in kinds else pool)


def lowering(folder: Path, tokenizer: Tokenizer | None) -> Tokenizer | None:
    """The tokenizer, made to ignore upper case where the settings of a folder's sentence encoder say so."""
    if tokenizer is None or not (folder / MODULES).is_file():
        return tokenizer
    if _encoder_settings(folder).flag("do_lower_case", default=False):
        after = [] if tokenizer.inner.normalizer is None else [tokenizer.inner.normalizer]
        tokenizer.inner.normalizer = normalizers.Sequence([normalizers.Lowercase(), *after])
    return tokenizer


def bare(model: Any) -> Any:
    """The model without what `files` tells of it: without its pooling, and as long as its table of positions."""
    if _pool(model) is None:
        return model
    encoder = model.encoder
    table = next((one.length for one in encoder.embedding.modules() if isinstance(one, Learned)), 0)
    length = encoder.max_length if encoder.max_length is None else max(encoder.max_length, table)
    whole = Reader(Encoder(encoder.embedding, encoder.layers, encoder.norm, length))
    whole.origin = model.origin
    return whole


def files(model: Any) -> dict[str, Any]:
    """What lies beside the files of `bare(model)`, by path: the modules and their settings; nothing for others."""
    pool = _pool(model)
    if pool is None:
        return {}
    steps = {"": "Transformer", POOLING: "Pooling", **({NORMALISE: "Normalize"} if pool is not model.head else {})}
    flags = {flag: isinstance(pool, POOLINGS[mode]) for flag, mode in _FLAGS.items()}
    return {
        MODULES: [
            {"idx": number, "name": str(number), "path": path, "type": f"{_LIBRARY}models.{kind}"}
            for number, (path, kind) in enumerate(steps.items())
        ],
        ENCODER[0]: {"max_seq_length": model.max_length, "do_lower_case": False},
        f"{POOLING}/config.json": {"word_embedding_dimension": model.encoder.embedding.width, **flags},
    }


def _reads_texts(model: Any) -> bool:
    return isinstance(model, Reader) and isinstance(model.encoder.embedding, Embedding)


def _pool(model: Any) -> Part | None:
    """How a sentence encoder pools; None for any other model."""
    head: Any = model.head if _reads_texts(model) else None
    pool: Part | None = head.pool if isinstance(head, Normalised) else head
    return pool if isinstance(pool, tuple(POOLINGS.values())) else None


def _modules(path: Path) -> list[tuple[str, str]]:
    """The kind of each module, and its folder's name ("" for the folder itself)."""
    found = []
    for number, module in enumerate(read_tables(path)):
        config = Config(module, f"{path}, module {number}")
        kind, place = config.get("type"), config.get("path", default="")
        if not isinstance(kind, str) or not kind.startswith(_LIBRARY):
            raise config.wrong("type", f"should name a module of {_LIBRARY.rstrip('.')}; code of others is never run")
        if not isinstance(place, str) or not re.fullmatch(r"(\w[\w-]*)?", place, re.ASCII):
            raise config.wrong("path", "should be the plain name of a folder beside it")
        found.append((kind.rpartition(".")[2], place))
    return found


def _pooling(path: Path, width: int) -> Part:
    config = Config(read_json(path), str(path))
    for name in ("embedding_dimension", "word_embedding_dimension"):
        config.only(name, width)
    modes = config.get("pooling_mode")
    if modes is None:
        flags = [name for name in config.data if name.startswith("pooling_mode_")]
        modes = [_FLAGS.get(name, name) for name in flags if config.flag(name, default=False)] if flags else "mean"
    named = modes if isinstance(modes, list) else [modes]
    if len(named) != 1 or not isinstance(named[0], str) or named[0] not in POOLINGS:
        said = " and ".join(str(one) for one in named) or "nothing"
        raise FormeryError(f"{path} asks to pool by {said:.200}, which is not supported; known are mean and cls.")
    return POOLINGS[named[0]]()


def _encoder_settings(folder: Path) -> Config:
    path = next((folder / name for name in ENCODER if (folder / name).is_file()), None)
    return Config({} if path is None else read_json(path), str(path))


def _length(folder: Path) -> int | None:
    """How many tokens of a text are read: newer folders leave it to the tokenizer's settings."""
    config = _encoder_settings(folder)
    config.only("transformer_task", "feature-extraction")
    config.only("module_output_name", "token_embeddings")
    if (modes := config.inner("modality_config")) is not None and (text := modes.inner("text")) is not None:
        text.only("method", "forward")
        text.only("method_output_name", "last_hidden_state")
    length: int | None = config.whole("max_seq_length", default=None)
    return read_beside(folder).maximum_length if length is None else length


def _check_prompt(folder: Path) -> None:
    """FormeryError where words are put before each text: the vectors would be others without them."""
    if not (folder / WHOLE).is_file():
        return
    config = Config(read_json(folder / WHOLE), str(folder / WHOLE))
    name, prompts = config.get("default_prompt_name"), config.inner("prompts")
    if name is not None and (prompts is None or not isinstance(name, str) or prompts.data.get(name)):
        raise config.wrong("default_prompt_name", "asks for words before each text, which is not supported")
