"""Models on disk, ours and other people's.

Our own folder holds formery.json (what the model is made of), model.safetensors and tokenizer.json. A published folder
has a config.json instead, and a file of llama2.c holds all in one; both are read by the room `hub`.

A checkpoint is untrusted. The description can name registered parts only; the model is laid out without memory
first, and every tensor's name, shape and type is compared with the file's header before anything is allocated.
"""

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from formery.data.published import read_tokenizer, write_tokenizer
from formery.errors import FormeryError
from formery.files import atomic_folder
from formery.models import weights
from formery.models.conventions import Conventions
from formery.models.decoder import Decoder
from formery.models.encoder import Encoder, Reader
from formery.models.encoder_decoder import EncoderDecoder
from formery.models.filling import Group, fill
from formery.models.guide import Guide
from formery.models.quantise import Quantise, quantise
from formery.models.weights import PICKLES, WEIGHTS, shapes
from formery.parts import Codes, Part, build
from formery.parts.native import build as kernels
from formery.parts.native.mode import Compile, checked

Model = Decoder | EncoderDecoder
SHIPPED = Path(__file__).parents[1] / "shipped"
DESCRIPTION = "formery.json"


def shipped() -> list[str]:
    """The names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob(f"*/{DESCRIPTION}"))


def guides() -> list[str]:
    """The names of the guides that come with the package: the model's, a slash, and the method's."""
    return sorted(path.parent.relative_to(SHIPPED).as_posix() for path in SHIPPED.glob(f"*/*/{DESCRIPTION}"))


def locate(path: str | Path, revision: str | None = None) -> Path:
    """The folder (or llama2.c file) of a checkpoint, given by its path, a shipped model's name, or an id on the hub.

    revision: of the hub's repository; "owner/name@revision" says it too. Raises FormeryError where there is nothing.
    """
    if str(path) in (*shipped(), *guides()):
        return SHIPPED / str(path)
    folder = Path(path)
    # os.path's own tests say no, where pathlib's raise, to a name that no file can have.
    if os.path.isdir(folder):
        return folder
    if os.path.isfile(folder):
        from formery.models.hub import llama2c

        if llama2c.looks_like(folder):
            return folder
        if folder.suffix in PICKLES:
            raise FormeryError(
                f"{folder} is a pickle, which can run any code when opened, or a llama2.c file that is not whole; "
                "convert a pickle to safetensors where you trust it."
            )
        raise FormeryError(f"there is no checkpoint at {folder}: that is a file; give the folder of one.")
    from formery.models.hub import download

    if isinstance(path, str) and download.is_hub_id(path):
        return download.fetch(path, revision)
    raise FormeryError(
        f"there is no checkpoint at {folder}: give a folder, an id on the hub (owner/name), or one of "
        f"{', '.join(shipped()) or 'none'}."
    )


def save(model: Model | Reader | Guide, path: str | Path, dtype: torch.dtype | None = None) -> None:
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
    if differ := shapes(model).items() ^ shapes(twin).items():
        name = min(differ)[0]
        raise FormeryError(f"the model's description does not tell how {name} came about: use replace() for new parts.")
    tensors = {
        name: tensor.detach().to(dtype if dtype and tensor.is_floating_point() else tensor.dtype).contiguous().cpu()
        for name, tensor in model.named_parameters()
    }
    with atomic_folder(path) as folder:
        try:
            save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        told: dict[str, Any] = {"formery": 1, "model": description}
        if conventions := model.conventions.to_json():
            told["conventions"] = conventions
        if getattr(model, "preprocessor", None) is not None:
            told["preprocessor"] = model.preprocessor
        (folder / DESCRIPTION).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if model.tokenizer is not None:
            write_tokenizer(model.tokenizer, folder)


def load(
    path: str | Path,
    dtype: torch.dtype | str | None = torch.float32,
    device: str | torch.device = "cpu",
    revision: str | None = None,
    quantize: Quantise | None = None,
    compile: Compile = "auto",
) -> Any:
    """The model in a folder, of an id on the hub, or the shipped model of that name, ready to be used.

    A Decoder, an EncoderDecoder, a Reader or a Guide. dtype: of the loaded weights ("bfloat16" names one too); None
    leaves them as stored, and then they stay in the mapped file. revision: of the hub's repository. quantize: "int8" or
    "int4" makes the weights codes of so many bits (not exact). compile: True has the fast kernels built if they are not
    yet, "auto" uses them where that pays, False never. Raises FormeryError, saying what is wrong and where, for a
    missing, truncated or foreign file, an unknown part or architecture, and a tensor that is missing, extra or
    misshapen.
    """
    mode, kind = checked(compile), weights.named_dtype(dtype) if isinstance(dtype, str) else dtype
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise FormeryError(f"there is no {device} here: this PyTorch sees no graphics card; leave device out.")
    model = _loaded(locate(path, revision), kind, device)
    if quantize is not None:
        quantise(model, quantize)
    if any(isinstance(part, Codes) for part in model.modules()):
        model.float()  # codes are computed with in 32 bits
    if mode is True:
        kernels.build()
    for part in model.modules():
        if isinstance(part, Decoder | Encoder):
            part.compiled = mode
    return model


def _loaded(folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    if folder.is_file():
        from formery.models.hub import llama2c

        return llama2c.read(folder, dtype=dtype or torch.float32).to(device).eval()
    if not (folder / DESCRIPTION).is_file():
        from formery.models.hub import load as published

        if published.is_published(folder):
            return published.load(folder, dtype, device)
        raise FormeryError(
            f"{folder} holds neither {DESCRIPTION} nor {published.CONFIG}, so it is no checkpoint that is known here."
        )
    return _load_own(folder, dtype, device)


def _load_own(folder: Path, dtype: torch.dtype | None, device: str | torch.device) -> Any:
    model = described(folder)
    found, expected = weights.table_of(folder), shapes(model)
    weights.check(folder / WEIGHTS, found, expected, weights.codes(model))
    fill(model, [Group(name, (name,)) for name in expected], found, dtype, device)
    model.tokenizer = read_tokenizer(folder)
    known = model.vocabulary if not isinstance(model, Reader) else None
    if model.tokenizer is not None and known is not None and model.tokenizer.vocabulary_size > known:
        raise FormeryError(
            f"{folder}: the tokenizer has {model.tokenizer.vocabulary_size} tokens, the model only {known}."
        )
    return model.eval()


def writing(model: Any, name: str = "this model") -> Model:
    """The model, if it is one that writes text; FormeryError for an encoder that only reads."""
    if not isinstance(model, Decoder | EncoderDecoder):
        raise FormeryError(f"{name} is an encoder: it reads (call it, or its read()), and writes no text.")
    return model


def described(folder: Path) -> Any:
    """The model of our own folder, laid out on the meta device: shapes without memory."""
    path = folder / DESCRIPTION
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormeryError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict) or data.get("formery") != 1 or "model" not in data:
        raise FormeryError(f"{path} is no description of version 1.")
    if folder.parent.parent == SHIPPED:
        importlib.import_module("formery.methods").discover()  # papers lie above this room, and guides are theirs
    try:
        with torch.device("meta"):
            model = build(data["model"])
        conventions = Conventions.from_json(data.get("conventions", {}))
    except FormeryError as error:
        raise FormeryError(f"{path}: {error}") from error
    if not isinstance(model, Decoder | EncoderDecoder | Reader | Guide):
        raise FormeryError(f"{path} describes a {type(model).__name__}, which is no whole model.")
    model.conventions = conventions
    preprocessor = data.get("preprocessor")
    if preprocessor is not None and not (isinstance(preprocessor, dict) and hasattr(model, "preprocessor")):
        raise FormeryError(f"{path}: the preprocessor is no table, or the model has no use for one.")
    if preprocessor is not None:
        model.preprocessor = preprocessor
    return model
