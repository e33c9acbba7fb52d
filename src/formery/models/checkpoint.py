"""Models on disk: a folder of formery.json (what the model is made of), model.safetensors and tokenizer.json.

A checkpoint is untrusted. The description can name registered parts only; the model is laid out without memory
first, and every tensor's name, shape and type is compared with the file's header before anything is allocated.
"""

import json
import os
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError
from formery.files import atomic_folder
from formery.models.decoder import Decoder
from formery.models.encoder_decoder import EncoderDecoder
from formery.parts import Part, build

Model = Decoder | EncoderDecoder
SHIPPED = Path(__file__).parents[1] / "shipped"
DESCRIPTION, WEIGHTS, TOKENIZER = "formery.json", "model.safetensors", "tokenizer.json"
_FLOATS = ("BF16", "F16", "F32", "F64")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{DESCRIPTION}"))


def locate(path: str | Path) -> Path:
    """The folder of a checkpoint, given by its path or by the name of a shipped model."""
    if str(path) in shipped():
        return SHIPPED / str(path)
    folder = Path(path)
    # os.path's own tests say no, where pathlib's raise, to a name that no file can have.
    if os.path.isfile(folder) and folder.suffix in _PICKLES:
        raise FormeryError(
            f"{folder} is a pickle, which can run any code when opened; convert it to safetensors where you trust it."
        )
    if not os.path.isdir(folder):
        raise FormeryError(
            f"there is no checkpoint at {folder}: give a folder, or one of {', '.join(shipped()) or 'none'}."
        )
    return folder


def save(model: Model, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes `model` to the folder `path`, whole or not at all, in the place of a checkpoint that is there.

    dtype: of the stored weights, as they are unless given. Raises FormeryError where `path` holds anything else
    than a checkpoint, and where the disk refuses; what was there is then untouched.
    """
    path = Path(path)
    if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / DESCRIPTION).is_file()):
        raise FormeryError(f"{path} holds something else than a checkpoint; choose another folder.")
    description = model.describe()
    with torch.device("meta"):
        twin = build(description)
    assert isinstance(twin, Part)
    if differ := _shapes(model).items() ^ _shapes(twin).items():
        name = min(differ)[0]
        raise FormeryError(f"the model's description does not tell how {name} came about: use replace() for new parts.")
    tensors = {
        name: tensor.detach().to(dtype or tensor.dtype).contiguous().cpu() for name, tensor in model.named_parameters()
    }
    with atomic_folder(path) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        text = json.dumps({"formery": 1, "model": description}, indent=1)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save(folder / TOKENIZER)


def load(path: str | Path, dtype: torch.dtype | None = torch.float32, device: str | torch.device = "cpu") -> Model:
    """The model in a folder, or the shipped model of that name, ready to generate.

    dtype: of the loaded weights; None leaves them as stored. Raises FormeryError, saying what is wrong and where,
    for a missing, truncated or foreign file, an unknown part, and a tensor that is missing, extra or misshapen.
    """
    folder = locate(path)
    model = _described(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        pickles = sorted(one.name for one in folder.iterdir() if one.suffix in _PICKLES)
        found = f", only the pickle {pickles[0]}, which is never opened" if pickles else ""
        raise FormeryError(f"{folder} holds no {WEIGHTS}{found}.")
    expected = _shapes(model)
    try:
        _check_header(weights, expected)
        with safe_open(weights, framework="pt", device=str(device)) as file:
            for name in expected:
                tensor = file.get_tensor(name)
                _place(model, name, tensor if dtype is None else tensor.to(dtype))
    except (SafetensorError, OSError) as error:
        raise FormeryError(f"{weights} cannot be read: {error}.") from error
    if (folder / TOKENIZER).is_file():
        model.tokenizer = Tokenizer.load(folder / TOKENIZER)
        if model.tokenizer.vocabulary_size > model.vocabulary:
            raise FormeryError(
                f"{folder}: the tokenizer has {model.tokenizer.vocabulary_size} tokens, "
                f"the model only {model.vocabulary}."
            )
    return model.eval()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, shared ones named once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _described(folder: Path) -> Model:
    """The model laid out on the meta device: shapes without memory."""
    path = folder / DESCRIPTION
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormeryError(f"{folder} holds no {DESCRIPTION}, so it is no checkpoint of this library.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise FormeryError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("formery") != 1 or "model" not in data:
        raise FormeryError(f"{path} is no description of version 1.")
    try:
        with torch.device("meta"):
            model = build(data["model"])
    except FormeryError as error:
        raise FormeryError(f"{path}: {error}") from error
    if not isinstance(model, Decoder | EncoderDecoder):
        raise FormeryError(f"{path} describes a {type(model).__name__}, which is no whole model.")
    return model


def _check_header(path: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Compares the file's own table of tensors with what the model needs, before reading any."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, 100_000_000):
            raise FormeryError(f"{path} is truncated or no safetensors file: its header should be {length} bytes long.")
        try:
            header: Any = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise FormeryError(f"{path} has a damaged header ({error}).") from error
    if not isinstance(header, dict):
        raise FormeryError(f"{path} has a damaged header: it is no table of tensors.")
    header.pop("__metadata__", None)
    missing, extra = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
    if missing or extra:
        which = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which the model does not know"
        raise FormeryError(f"{path} {which} ({len(missing)} tensors missing, {len(extra)} unknown).")
    end = 0
    for name, shape in expected.items():
        entry = header[name]
        found = entry.get("shape") if isinstance(entry, dict) else None
        if found != list(shape):
            raise FormeryError(f"{path}: {name} has shape {found}, the model needs {list(shape)}.")
        if entry.get("dtype") not in _FLOATS:
            raise FormeryError(f"{path}: {name} has type {entry.get('dtype')}, not one of {', '.join(_FLOATS)}.")
        offsets = entry.get("data_offsets")
        if not (isinstance(offsets, list) and len(offsets) == 2 and all(isinstance(one, int) for one in offsets)):
            raise FormeryError(f"{path}: {name} has no place in the file.")
        end = max(end, offsets[1])
    if 8 + length + end != size:
        raise FormeryError(
            f"{path} is truncated or damaged: {size} bytes, where its header tells of {8 + length + end}."
        )


def _place(model: Part, name: str, tensor: torch.Tensor) -> None:
    """Puts the tensor in the place of a parameter, wherever that parameter is shared."""
    old = model.get_parameter(name)
    new = torch.nn.Parameter(tensor, requires_grad=True)
    for part in model.modules():
        for key, parameter in part._parameters.items():
            if parameter is old:
                part._parameters[key] = new
