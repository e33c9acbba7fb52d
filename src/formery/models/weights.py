"""Weights in safetensors files: a table of what they hold, checked before anything is read, and the tensors themselves.

A file is mapped, not copied: a tensor that is wanted as it is stored stays where it is, in the file's pages.
"""

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from formery.errors import FormeryError, brief, first_line, shown, unknown

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
WHOLE = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32}  # of weights that are codes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_HEADER, _MOST_DIMENSIONS, _LARGEST = 100_000_000, 64, 2**63
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "BF16": 2, "F16": 2}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8}


def named_dtype(name: str | None) -> torch.dtype | None:
    """The type of that name; raises FormeryError, with those known, for any other."""
    if name is None:
        return None
    if name not in DTYPES:
        raise unknown("type", name, DTYPES)
    return DTYPES[name]


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: where, by which name, of which type and shape."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def table_of(folder: Path) -> dict[str, Entry]:
    """All tensors of a checkpoint's one file, or of its shards.

    Raises FormeryError where there are no safetensors, or where a header or the index is damaged or lies.
    """
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
        return _sharded(folder)
    if not (folder / WEIGHTS).is_file():
        raise FormeryError(f"{folder} holds no {WEIGHTS}{_pickles_instead(folder)}.")
    return table(folder / WEIGHTS)


def _pickles_instead(folder: Path) -> str:
    """What to do where there are only pickles: the command that converts them, with the class that is named."""
    pickles = sorted(one.name for one in folder.iterdir() if one.suffix in PICKLES)
    if not pickles:
        return ""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        named = None
    kind = named if isinstance(named, str) and named.isidentifier() else "AutoModel"
    return (
        f", only the pickle {pickles[0]}, which is never opened, since it could run any code; where you trust it, "
        f'transformers converts it: python -c "import transformers as t; '
        f"t.{kind}.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\""
    )


def table(path: Path) -> dict[str, Entry]:
    """The tensors of one file, as its header tells of them; raises FormeryError where that cannot be true."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(size - 8, _LONGEST_HEADER):
                raise FormeryError(
                    f"{path} is truncated or no safetensors file: its header should be {length} bytes long."
                )
            header: Any = json.loads(file.read(length).decode(), object_pairs_hook=_once)
    except OSError as error:
        raise FormeryError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise FormeryError(f"{path} has a damaged header ({first_line(error)}).") from error
    if not isinstance(header, dict):
        raise FormeryError(f"{path} has a damaged header: it is no table of tensors.")
    header.pop("__metadata__", None)
    places = {name: _place(path, name, entry) for name, entry in header.items()}
    end = 0
    for name, (first, last) in sorted(places.items(), key=lambda one: one[1]):
        if first != end:
            raise FormeryError(
                f"{path}: {shown(name)} overlaps another tensor, or leaves a gap before it: it is damaged."
            )
        end = last
    if 8 + length + end != size:
        raise FormeryError(
            f"{path} is truncated or damaged: {size} bytes, where its header tells of {8 + length + end}."
        )
    return {name: Entry(path, name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The table of these pairs; ValueError where a name comes twice: readers differ in which of the two counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(name)} comes twice")
    return found


def _place(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor lies behind the header; raises FormeryError where its entry contradicts itself."""
    told: list[Any] = [
        entry.get(key) if isinstance(entry, dict) else None for key in ("shape", "dtype", "data_offsets")
    ]
    shape, dtype, offsets = told
    if not _whole(shape) or len(shape) > _MOST_DIMENSIONS:
        raise FormeryError(f"{path}: {shown(name)} has shape {brief(shape)}, which is none.")
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise FormeryError(f"{path}: {shown(name)} has type {brief(dtype)}, which is none of {', '.join(_SIZES)}.")
    if not _whole(offsets) or len(offsets) != 2:
        raise FormeryError(f"{path}: {shown(name)} has no place in the file.")
    first, last = offsets
    if last - first != math.prod(shape) * _SIZES[dtype]:
        raise FormeryError(
            f"{path}: {shown(name)} has shape {brief(shape)} of {dtype}, which its place in the file does not hold: "
            "it is truncated or damaged."
        )
    return first, last


def _whole(values: Any) -> bool:
    """Whether these are sizes that a file can have."""
    return isinstance(values, list) and all(type(one) is int and 0 <= one < _LARGEST for one in values)


def _sharded(folder: Path) -> dict[str, Entry]:
    index = folder / INDEX
    try:
        data: Any = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FormeryError(f"{index} is not readable JSON ({first_line(error)}).") from error
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise FormeryError(f"{index} has no weight_map, so it does not tell which file holds which tensor.")
    found: dict[str, Entry] = {}
    for file in places.values():
        # A name only, and of a weights file: an index could point anywhere.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise FormeryError(f"{index} names {brief(file)}, which is no safetensors file of this folder.")
    for file in dict.fromkeys(places.values()):
        if not os.path.isfile(folder / file):
            raise FormeryError(f"{folder} lacks {shown(file)}, which {INDEX} names: fetch the missing shard.")
        for name, entry in table(folder / file).items():
            if places.get(name) != file:
                raise FormeryError(f"{folder / file} holds {shown(name)}, which {INDEX} does not place there.")
            found[name] = entry
    if missing := sorted(places.keys() - found.keys()):
        raise FormeryError(f"{folder / places[missing[0]]} lacks {shown(missing[0])}, which {INDEX} places there.")
    return found


def check(
    path: Path,
    found: Mapping[str, Entry],
    wanted: Mapping[str, tuple[int, ...]],
    codes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Raises FormeryError unless the tensors found are those wanted, in name, shape and kind of number.

    codes: those that are whole numbers, and of which type.
    """
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        which = f"lacks {missing[0]}" if missing else f"has {shown(extra[0])}, which the model does not know"
        raise FormeryError(f"{path} {which} ({len(missing)} tensors missing, {len(extra)} unknown).")
    for name, shape in wanted.items():
        entry = found[name]
        if entry.shape != shape:
            raise FormeryError(
                f"{entry.path}: {name} has shape {list(entry.shape)}, the model needs {list(shape)}."
            )
        if codes is not None and name in codes:
            if WHOLE.get(entry.dtype) != codes[name]:
                raise FormeryError(f"{entry.path}: {name} has type {entry.dtype}, the model needs {codes[name]}.")
        elif entry.dtype not in FLOATS:
            raise FormeryError(f"{entry.path}: {name} has type {entry.dtype}, not one of {', '.join(FLOATS)}.")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file, mapped; what is wrong with it becomes a FormeryError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise FormeryError(f"{path} cannot be read: {first_line(error)}.") from error


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each weight, shared ones named once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def codes(model: nn.Module) -> dict[str, torch.dtype]:
    """The weights that are whole numbers, and their types."""
    return {name: one.dtype for name, one in model.named_parameters() if not one.is_floating_point()}
