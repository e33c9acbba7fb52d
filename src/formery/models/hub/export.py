"""From a model of our parts to a folder that transformers, and what reads its folders, loads with the same logits.

A family may claim a model by any settings it likes: they count only if building from them gives that model back, part
for part. So nothing is ever written that means another model.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from formery.data.published import write_tokenizer
from formery.data.tokens import CONFIG as TOKENIZER_CONFIG
from formery.errors import FormeryError
from formery.files import atomic_folder
from formery.models.filling import Group
from formery.models.hub import sentences
from formery.models.hub.anatomy import anatomy, differences
from formery.models.hub.config import Config
from formery.models.hub.engines import check, engine_named
from formery.models.hub.family import FAMILIES, Family, families
from formery.models.hub.load import CONFIG, GENERATION, PREPROCESSOR
from formery.models.hub.names import NoPlace, groups
from formery.models.weights import INDEX, WEIGHTS
from formery.parts import Linear

SHARD = 5_000_000_000  # bytes


def export(model: Any, path: str | Path, dtype: torch.dtype | None = None, engine: str | None = None) -> Path:
    """Writes the model as a Hugging Face folder, whole or not at all; returns the folder.

    dtype: of the stored weights, as they are unless given. engine: that it is written for, "vllm", "llama.cpp" or
    "ctranslate2". Raises FormeryError, naming the part, for a model that no published family can hold or that the
    engine would not serve as it is, and where `path` holds anything else than a published checkpoint.
    """
    wanted_by = None if engine is None else engine_named(engine)
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file()):
        raise FormeryError(f"{path} holds something else than a published checkpoint; choose another folder.")
    family, told, wanted = matching(sentences.bare(model))
    if wanted_by is not None:
        check(wanted_by, model, family)
    first = next(iter(model.parameters()))
    stored = str(dtype or first.dtype).removeprefix("torch.")
    tokens = _special_tokens(model)
    config = {"architectures": [family.architectures[0]], "model_type": family.kind, **told, **tokens}
    config |= {"dtype": stored, "torch_dtype": stored}
    with atomic_folder(path) as folder:
        _write_weights(model, wanted, folder, dtype)
        _write_json(folder / CONFIG, config)
        for name, data in sentences.files(model).items():
            _write_json(folder / name, data)
        if hasattr(model, "step"):
            _write_json(folder / GENERATION, _generation(tokens, told))
        if getattr(model, "preprocessor", None) is not None:
            _write_json(folder / PREPROCESSOR, model.preprocessor)
        if model.tokenizer is not None:
            write_tokenizer(model.tokenizer, folder)
            end = model.tokenizer.tokens.get("eos_token")
            _name_unknown(folder, end if wanted_by is not None and wanted_by.unknown else None)
    return path


def _name_unknown(folder: Path, name: str | None) -> None:
    """Says which token stands for the unknown, if the tokenizer has none: some readers would add one of their own."""
    path = folder / TOKENIZER_CONFIG
    told = json.loads(path.read_text())
    if told.get("unk_token") is None:
        _write_json(path, told | {"unk_token": name})


def matching(model: Any) -> tuple[Family, dict[str, Any], list[Group]]:
    """The family that can hold the model, its settings, and where the weights go; FormeryError where there is none."""
    ours = anatomy(model)
    nearest: tuple[int, str] | None = None
    furthest = (0, f"none is put together like {type(model).__name__}")
    origin = FAMILIES.get(getattr(model, "origin", None) or "")
    for family in sorted(families(), key=lambda one: one is not origin):
        try:
            told, wanted, theirs = _attempt(family, model)
        # A model of another family may lack any part that the settings are read from.
        except (FormeryError, AttributeError, LookupError, TypeError, ValueError, AssertionError, RuntimeError) as one:
            place, what = _stumbled(one, model)
            if place > furthest[0]:
                furthest = place, f"for the nearest, {family.title}, {what}"
            continue
        differing = differences(ours, theirs)
        if not differing:
            return family, told, wanted
        if nearest is None or len(differing) < nearest[0]:
            nearest = len(differing), f"for the nearest, {family.title}, {differing[0]}"
    reason = (nearest or furthest)[1]
    raise FormeryError(f"no published family can hold this model: {reason}; it can be saved with formery.save.")


def _attempt(family: Family, model: Any) -> tuple[dict[str, Any], list[Group], dict[str, Any]]:
    """What the family would make of the model, if it can make anything of it."""
    told = family.settings(model)
    wanted = groups(model, family.places(model))
    config = Config(told, f"the settings of a {family.title}", {one.stored for one in wanted})
    with torch.device("meta"):
        twin = family.build(config)
    return told, wanted, anatomy(twin)


def _stumbled(error: Exception, model: Any) -> tuple[int, str]:
    """How far into the model a family came, and the part that it has no place for."""
    found = getattr(error, "obj", None)
    if isinstance(error, NoPlace):
        found = model.get_submodule(error.weight.rpartition(".")[0])
    for place, (name, part) in enumerate(model.named_modules()):
        # A map belongs to the part that uses it.
        if part is found or (isinstance(found, Linear) and any(one is found for one in part.children())):
            return place, f"{name} is {type(part).__name__}, which has no place there"
    return 0, ""


def _special_tokens(model: Any) -> dict[str, Any]:
    """Null where there is none: the reader's own defaults must not creep in."""
    tokenizer, conventions = model.tokenizer, model.conventions
    stop = list(conventions.stop) if conventions.stop is not None else None
    if stop is None and tokenizer is not None and tokenizer.eos is not None:
        stop = [tokenizer.eos]
    begin = conventions.begin if conventions.begin is not None or tokenizer is None else tokenizer.bos
    pad = conventions.pad if conventions.pad is not None or tokenizer is None else tokenizer.pad
    return {
        "bos_token_id": begin,
        "eos_token_id": stop[0] if stop and len(stop) == 1 else stop,
        "pad_token_id": pad,
        **({"suppress_tokens": list(conventions.suppressed)} if conventions.suppressed else {}),
        **({"begin_suppress_tokens": list(conventions.suppressed_first)} if conventions.suppressed_first else {}),
    }


def _generation(tokens: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    names = ("decoder_start_token_id", "forced_bos_token_id", "forced_decoder_ids")
    return {**tokens, **{name: told[name] for name in names if name in told}}


def _write_weights(model: Any, wanted: list[Group], folder: Path, dtype: torch.dtype | None) -> None:
    """One file, or shards and their index."""
    weights = dict(model.named_parameters())
    shards: list[list[Group]] = [[]]
    size = 0
    for one in wanted:
        bytes_ = sum(weights[name].numel() for name in one.ours) * (dtype or weights[one.ours[0]].dtype).itemsize
        if shards[-1] and size + bytes_ > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(one)
        size += bytes_
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        places = {one.stored: name for name, shard in zip(names, shards, strict=True) for one in shard}
        _write_json(folder / INDEX, {"metadata": {}, "weight_map": places})
    for name, shard in zip(names, shards, strict=True):
        try:
            save_file({one.stored: _joined(one, weights, dtype) for one in shard}, folder / name, {"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error


def _joined(group: Group, weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> Tensor:
    whole = group.layout.join([weights[name].detach().cpu() for name in group.ours])
    return whole.to(dtype or whole.dtype).contiguous()


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
