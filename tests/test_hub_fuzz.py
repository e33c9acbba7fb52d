"""Damaged checkpoints of others give a whole model, weight for weight what the file says, or one sentence."""

import json
import os
import resource
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import pytest
import torch
from mutations import mutated_file, mutated_shards
from published import saved
from safetensors.torch import load_file, save_file
from torch import Tensor

import formery
from formery import FormeryError
from formery.models.weights import INDEX, WEIGHTS

_FOLDERS = TemporaryDirectory(prefix="damaged-")  # gone when the process ends
CASES = int(os.environ.get("FORMERY_FUZZ", "2500"))
SECONDS, BYTES = 2.0, 300_000_000
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextmanager
def bounded(folder: Path) -> Iterator[None]:
    """Little time of the processor and little memory; an error is one sentence that can be printed and says where."""
    memory, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    try:
        yield
    except FormeryError as error:
        said = str(error)
        assert "\n" not in said and said.endswith(".") and len(said) < 2000, said[:3000]
        assert said.encode() and str(folder) in said, said
        raise
    finally:
        assert time.process_time() - started < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < BYTES


@contextmanager
def told(case: str) -> Iterator[None]:
    """What fails within says in which case."""
    try:
        yield
    except BaseException as error:
        error.add_note(case)
        raise


def loaded(folder: Path, dtype: torch.dtype | None = torch.float32) -> Any:
    """The model, or None where it is refused as it should be."""
    try:
        with bounded(folder):
            return formery.load(folder, dtype=dtype)
    except FormeryError:
        return None


def pointed_at(*files: Path) -> dict[str, Tensor]:
    """The tensors that the headers point to, read with nothing but this."""
    found = {}
    for file in files:
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8:end], object_pairs_hook=list)
        assert len(dict(table)) == len(table)
        for name, pairs in table:
            entry = {} if name == "__metadata__" else dict(pairs)
            if entry and entry["dtype"] in TYPES and 0 not in entry["shape"]:
                first, last = entry["data_offsets"]
                own = bytearray(raw[end + first : end + last])
                found[name] = torch.frombuffer(own, dtype=TYPES[entry["dtype"]]).view(entry["shape"])
    return found


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class Base:
    """A checkpoint to be damaged: where each weight of ours is stored, under which prefix, and which are copies."""

    folder: Path
    stored: dict[str, str]
    prefix: str
    copies: dict[str, str]

    def check(self, model: Any, dtype: torch.dtype | None) -> None:
        """Each weight is what the files say of it now."""
        if (self.folder / WEIGHTS).exists():
            found = pointed_at(self.folder / WEIGHTS)
        else:
            places = json.loads((self.folder / INDEX).read_bytes())["weight_map"]
            found = {name: pointed_at(self.folder / file)[name] for name, file in places.items()}
        if not any(name.startswith(self.prefix) for name in found):
            found |= {f"{self.prefix}{name}": tensor for name, tensor in found.items()}
        weights = dict(model.named_parameters())
        assert weights.keys() == self.stored.keys()
        for ours, theirs in self.stored.items():
            stored = found[theirs].to(dtype or found[theirs].dtype)
            assert weights[ours].shape == stored.shape and bits(weights[ours]) == bits(stored)
        for copy, theirs in self.copies.items():
            assert copy not in found or torch.equal(found[copy], found[theirs])


@cache
def base(name: str) -> Base:
    """The checkpoint of that name, in a folder of its own."""
    kind, _, form = name.partition(" ")
    folder = Path(mkdtemp(dir=_FOLDERS.name)) / "damaged"
    theirs, _source = saved(kind)
    theirs.save_pretrained(folder, max_shard_size="8KB" if form == "sharded" else "1GB")
    prefix, copies = f"{theirs.base_model_prefix}.", dict[str, str]()
    tensors = {key: one for file in folder.glob("*.safetensors") for key, one in load_file(file).items()}
    if form == "mixed":
        kinds = [torch.float16, torch.bfloat16, torch.float64, torch.float32]
        tensors = {key: one.to(kinds[place % 4]) for place, (key, one) in enumerate(tensors.items())}
    if kind == "bert-words":
        copies = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
        copies |= {"cls.predictions.decoder.bias": "cls.predictions.bias"}
        tensors |= {copy: tensors[other].clone() for copy, other in copies.items()}
        tensors |= {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.bias": torch.ones(2)}
        tensors |= {"bert.embeddings.position_ids": torch.arange(100)[None]}
    if form != "sharded":
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model = formery.load(folder, dtype=torch.float64)
    known = {(bits(one.double()), one.shape): key for key, one in tensors.items() if key not in copies}
    stored = {key: known[bits(one), one.shape] for key, one in model.named_parameters()}
    assert len(set(stored.values())) == len(stored)
    return Base(folder, stored, prefix, copies)


def counted(outcomes: Counter[tuple[str, bool]]) -> None:
    """Enough of the damage is harmless, and enough is not, for the test to mean something."""
    for fine in (True, False):
        kinds = {kind for kind, loads in outcomes if loads is fine}
        assert len(kinds) > 3 and sum(outcomes[kind, fine] for kind in kinds) > 0.08 * outcomes.total(), outcomes


BASES = ["llama", "llama mixed", "bert-words"]


@pytest.mark.parametrize("name", BASES)
def test_damaged_weights(name: str) -> None:
    one = base(name)
    path = one.folder / WEIGHTS
    whole, outcomes = path.read_bytes(), Counter[tuple[str, bool]]()
    for case in range(CASES // len(BASES)):
        random = Random(f"{name} {case}")
        kind, file = mutated_file(whole, random)
        dtype = random.choice([torch.float32, None])
        path.write_bytes(file)
        with told(f"case {case} of {name}: {kind}"):
            model = loaded(one.folder, dtype)
            outcomes[kind, model is not None] += 1
            if model is not None:
                one.check(model, dtype)
    path.write_bytes(whole)
    assert loaded(one.folder) is not None
    counted(outcomes)


def test_damaged_shards() -> None:
    one = base("llama sharded")
    whole = {path.name: path.read_bytes() for path in one.folder.iterdir()}
    # A shard that lies elsewhere, for an index to point at.
    for name in whole:
        (one.folder.parent / name).write_bytes(whole[name])
    now, outcomes = dict(whole), Counter[tuple[str, bool]]()
    for case in range(CASES // 4):
        random = Random(f"shards {case}")
        kind, files = mutated_shards(whole, INDEX, random)
        for name in now.keys() - files.keys():
            (one.folder / name).unlink()
        for name, data in files.items():
            if now.get(name) is not data:
                (one.folder / name).write_bytes(data)
        now = files
        with told(f"case {case}: {kind}"):
            model = loaded(one.folder)
            outcomes[kind, model is not None] += 1
            if model is not None:
                one.check(model, torch.float32)
    counted(outcomes)
