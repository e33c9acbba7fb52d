"""What a checkpoint is, told from its configuration and its headers: no weight is read."""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formery.data.tokenizer import Tokenizer
from formery.models import weights
from formery.models.checkpoint import DESCRIPTION, described, locate
from formery.models.conventions import Conventions
from formery.models.encoder import Reader
from formery.models.encoder_decoder import EncoderDecoder
from formery.models.hub import download, llama2c
from formery.models.hub import load as published
from formery.models.weights import FLOATS, Entry, shapes
from formery.parts import CrossAttention, Part


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's facts.

    family, architecture: of a published model, None for our own. parameters: numbers in the weights, shared ones
    counted once. stored: bytes by type. context: positions that it takes, None where nothing bounds it.
    state_bytes_per_token, state_bytes: what decoding a row keeps for each token, and besides, in the type that most
    weights are stored in; memory_bytes_per_token: for each place of what an encoder read. tree: of its parts.
    """

    name: str
    format: str
    family: str | None
    architecture: str | None
    parameters: int
    tensors: int
    files: int
    stored: dict[str, int]
    vocabulary: int | None
    context: int | None
    state_bytes_per_token: int | None
    state_bytes: int | None
    memory_bytes_per_token: int | None
    tokenizer: dict[str, Any] | None
    conventions: dict[str, Any] = field(default_factory=dict)
    tree: str = ""


def inspect(name: str | Path, revision: str | None = None) -> Inspection:
    """The facts of a checkpoint that `load` would take; of one on the hub only small files and headers are fetched.

    Raises FormeryError as `load` does, but for what only the weights could tell.
    """
    on_hub = isinstance(name, str) and not os.path.exists(name) and download.is_hub_id(name)
    place = download.fetch(str(name), revision, weights=False) if on_hub else locate(name, revision)
    family = architecture = None
    tokenizer: Tokenizer | None = None
    if place.is_file():
        form, model, found = "llama2.c v0", llama2c.laid_out(place), {}
        found = {one: Entry(place, one, "F32", shape) for one, shape in shapes(model).items()}
        tokenizer = model.tokenizer
    elif (place / DESCRIPTION).is_file():
        form, model, found = "formery", described(place), weights.table_of(place)
        weights.check(place, found, shapes(model))
        tokenizer = published.read_tokenizer(place)
    else:
        form = "Hugging Face"
        found = published.renamed(_on_hub(str(name), revision) if on_hub else weights.table_of(place))
        model, chosen = published.laid_out(place, found)
        published.places(model, chosen, found)
        family, architecture = chosen.title, published.configuration(place, found).architecture
        tokenizer = published.read_tokenizer(place)
    return _facts(str(name), form, model, found, family, architecture, tokenizer)


def _on_hub(name: str, revision: str | None) -> dict[str, Entry]:
    """The tables of a repository on the hub, by range requests."""
    told = download.headers(name, revision)
    return {tensor: Entry(Path(name), tensor, dtype, tuple(shape)) for tensor, (dtype, shape) in told.items()}


def _facts(
    name: str,
    form: str,
    model: Any,
    found: Mapping[str, Entry],
    family: str | None,
    architecture: str | None,
    tokenizer: Tokenizer | None,
) -> Inspection:
    stored: Counter[str] = Counter()
    for entry in found.values():
        stored[entry.dtype] += entry.bytes
    usual = FLOATS.get(stored.most_common(1)[0][0], torch.float32) if stored else torch.float32
    each, once, memory = state_bytes(model.to(usual))
    conventions: Conventions = model.conventions
    return Inspection(
        name=name,
        format=form,
        family=family,
        architecture=architecture,
        parameters=model.parameter_count(),
        tensors=len(found),
        files=len({entry.path for entry in found.values()}),
        stored=dict(stored),
        vocabulary=getattr(model.encoder.embedding if isinstance(model, Reader) else model, "vocabulary", None),
        context=model.max_length,
        state_bytes_per_token=each,
        state_bytes=once,
        memory_bytes_per_token=memory,
        tokenizer=None if tokenizer is None else _told(tokenizer),
        conventions=conventions.to_json(),
        tree=repr(model),
    )


def state_bytes(model: Part) -> tuple[int | None, int | None, int | None]:
    """Bytes that decoding one row keeps for each token, besides, and for each place of what an encoder read.

    The model may lie on the meta device. None where there is no such thing.
    """
    decoder: Any = model.decoder if isinstance(model, EncoderDecoder) else model
    if not hasattr(decoder, "start"):
        return None, None, None
    short, long = (decoder.start(1, capacity).nbytes for capacity in (64, 128))
    each = (long - short) // 64
    crossing = [one for one in model.modules() if isinstance(one, CrossAttention)]
    memory = sum(2 * one.groups * one.dim * one.key.dtype.itemsize for one in crossing)
    return each, short - 64 * each, memory if crossing else None


def _told(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "tokens": tokenizer.vocabulary_size,
        "begin": None if tokenizer.bos is None else tokenizer.token_text(tokenizer.bos),
        "end": None if tokenizer.eos is None else tokenizer.token_text(tokenizer.eos),
        "chat": tokenizer.chat_template is not None,
    }
