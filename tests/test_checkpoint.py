"""Checkpoints: bit-exact there and back; any file, however broken or hostile, gives one clear sentence."""

import errno
import json
import os
import resource
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import formery.files
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.errors import FormeryError
from formery.models import Decoder, EncoderDecoder, Model, checkpoint, load, save, shipped
from formery.models.compose import language_model, translator
from formery.parts import MLP, Layer, Linear, PreNorm, RMSNorm

TEXTS = ["a small text about a small text", "another text, not so small"]


def random(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.eval()


def decoder() -> Decoder:
    return random(language_model(11, 8, 2, 2, 1, 12, 20))


def encoder_decoder() -> EncoderDecoder:
    return random(translator(11, 8, 1, 1, 2, 12, 20, 1))


def changed() -> Decoder:
    """A model that was changed after it was built, as a method would."""
    model: Any = decoder()
    model.layers[1].sublayers[0].inner.replace("query", Linear(8, 8, True))
    model.layers[0] = Layer([PreNorm(RMSNorm(8), MLP(8, 9, "relu"))])
    return random(model)


MODELS: dict[str, Callable[[], Model]] = {
    "decoder": decoder,
    "encoder-decoder": encoder_decoder,
    "changed": changed,
}


def equal(ours: Model, theirs: Model) -> bool:
    """Same description, same names, same bits, same sharing."""
    pairs = zip(
        ours.named_parameters(remove_duplicate=False),
        theirs.named_parameters(remove_duplicate=False),
        strict=True,
    )
    return (
        ours.describe() == theirs.describe()
        and all(a == b and torch.equal(x, y) and x.dtype == y.dtype for (a, x), (b, y) in pairs)
        and len(list(ours.parameters())) == len(list(theirs.parameters()))
    )


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(folder: Path, *says: str) -> str:
    """Loading says one sentence; returns it."""
    with pytest.raises(FormeryError) as caught:
        load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 2000
    for one in says:
        assert one in sentence
    return sentence


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(decoder(), tmp_path / "model")
    return tmp_path / "model"


def rewrite_header(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the table of tensors, leaving the data behind it."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    new = change(header)
    text = json.dumps(header if new is None else new).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def rewrite_description(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "formery.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(MODELS))
def test_there_and_back(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    save(model, tmp_path / "a" / "model")
    twin = load(tmp_path / "a" / "model")
    assert equal(model, twin) and not twin.training and twin.tokenizer is None
    tokens = torch.randint(11, (2, 5))
    inputs = (tokens, tokens) if name == "encoder-decoder" else (tokens,)
    assert torch.equal(model(*inputs), twin(*inputs))
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in twin.parameters())
    assert sorted(read_all(tmp_path / "a" / "model")) == ["formery.json", "model.safetensors"]
    save(twin, tmp_path / "b")
    assert read_all(tmp_path / "a" / "model") == read_all(tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["model"]


def test_tied_weights_are_stored_once_and_tied_again(saved: Path) -> None:
    assert [name for name in load_file(saved / "model.safetensors") if "embedding" in name] == ["embedding.weight"]
    twin: Any = load(saved)
    assert twin.output.embedding.weight is twin.embedding.weight
    with torch.no_grad():
        twin.embedding.weight.zero_()
    assert not twin(torch.tensor([[1, 2]])).any()


def test_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_bpe(TEXTS, 270)
    model = random(language_model(tokenizer.vocabulary_size, 8, 1, 2, 1, 12, 20))
    model.tokenizer = tokenizer
    save(model, tmp_path / "model")
    twin = load(tmp_path / "model")
    assert isinstance(twin.tokenizer, Tokenizer) and twin.tokenizer.digest == tokenizer.digest
    assert equal(model, twin)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    refused(tmp_path / "model", "the tokenizer in", "cannot be used")
    small = decoder()
    small.tokenizer = tokenizer
    save(small, tmp_path / "small")
    refused(tmp_path / "small", "the tokenizer has", "the model only 11")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_of_storage(dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder()
    save(model, tmp_path / "model", dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    for asked, found in ((torch.float32, torch.float32), (None, dtype), (torch.float64, torch.float64)):
        twin = load(tmp_path / "model", asked)
        for one, other in zip(twin.parameters(), model.parameters(), strict=True):
            assert one.dtype == found and torch.equal(one, other.to(dtype).to(found))


def test_a_model_that_is_not_what_it_says_is_not_saved(tmp_path: Path) -> None:
    """Better no checkpoint than one whose weights nothing can read."""
    behind_its_back: Any = decoder()
    tied: Any = decoder()
    behind_its_back.layers[1].sublayers[0].inner.query = Linear(8, 8, True)
    tied.layers[1].sublayers[1].inner.up.weight = tied.layers[0].sublayers[1].inner.up.weight
    for model in (behind_its_back, tied):
        with pytest.raises(FormeryError, match=r"layers\.1\..*use replace\(\)"):
            save(model, tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_saving_over_a_checkpoint_replaces_it(saved: Path) -> None:
    (saved / "tokenizer.json").write_text("of the old one")
    model = encoder_decoder()
    save(model, saved)
    assert equal(model, load(saved))
    assert sorted(read_all(saved)) == ["formery.json", "model.safetensors"] and os.listdir(saved.parent) == ["model"]


def test_saving_into_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(decoder(), tmp_path / "model")
    load(tmp_path / "model")


def test_nothing_but_a_checkpoint_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("precious")
    for path in (tmp_path / "notes", tmp_path / "notes" / "precious.txt"):
        with pytest.raises(FormeryError, match="choose another folder"):
            save(decoder(), path)
    assert read_all(tmp_path / "notes") == {"precious.txt": b"precious"}


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: the system itself refuses, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls_before: int = 0) -> Iterator[None]:
    """That function raises "no space left" from its n-th call on, once."""
    real, calls = getattr(owner, name), iter(range(1000))

    def refuse(*arguments: Any, **options: Any) -> Any:
        if next(calls) == calls_before:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        yield


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("size", [0, 10, 500, 3000])
def test_a_full_disk_leaves_everything_as_it_was(size: int, exists: bool, saved: Path) -> None:
    before, path = read_all(saved), saved if exists else saved.parent / "new"
    with small_disk(size), pytest.raises(FormeryError, match="cannot write .*; nothing was changed there"):
        save(encoder_decoder(), path)
    assert read_all(saved) == before and os.listdir(saved.parent) == ["model"]


@pytest.mark.parametrize(
    ("owner", "name", "calls_before"),
    [
        (checkpoint, "save_file", 0),
        (Path, "write_text", 0),
        (formery.files.tempfile, "mkdtemp", 0),
        (formery.files.tempfile, "mkdtemp", 1),
        (formery.files.os, "replace", 0),
        (formery.files.os, "replace", 1),
    ],
)
def test_a_disk_that_fills_at_any_moment(
    owner: Any, name: str, calls_before: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_all(saved)
    with failing(monkeypatch, owner, name, calls_before), pytest.raises(FormeryError, match="No space left"):
        save(encoder_decoder(), saved)
    assert read_all(saved) == before and os.listdir(saved.parent) == ["model"]


def test_a_tokenizer_that_cannot_be_written(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = read_all(saved), decoder()
    model.tokenizer = train_bpe(TEXTS, 259)
    with failing(monkeypatch, formery.files.os, "fsync"), pytest.raises(FormeryError, match="No space left"):
        save(model, saved)
    assert read_all(saved) == before and os.listdir(saved.parent) == ["model"]


def test_truncated_at_every_length(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = {
        *range(20),
        *range(20, header, 97),
        *range(header - 3, header + 3),
        *range(header, len(data), 331),
        len(data) - 1,
    }
    for cut in sorted(cuts):
        path.write_bytes(data[:cut])
        refused(saved, "model.safetensors")
    path.write_bytes(data + b"\0")
    refused(saved, "model.safetensors")
    path.write_bytes(data)
    load(saved)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Decoder, bytes, bytes]:
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("flipped") / "model", decoder()
    save(model, folder)
    return folder, model, (folder / "model.safetensors").read_bytes(), (folder / "formery.json").read_bytes()


def flip(data: bytes, flips: list[tuple[int, int]], end: int) -> bytes:
    """The data with some of its first `end` bytes replaced."""
    changed = bytearray(data)
    for place, value in flips:
        changed[place % end] = value
    return bytes(changed)


BYTES = st.integers(0, 255) | st.sampled_from(list(b'0123456789{}[]",:.-eFBIU'))
FLIPS = st.lists(st.tuples(st.integers(0, 10**6), BYTES), min_size=1, max_size=3)


@settings(max_examples=60)
@given(flips=FLIPS)
def test_a_flipped_header(original: tuple[Path, Decoder, bytes, bytes], flips: list[tuple[int, int]]) -> None:
    folder, model, weights, _ = original
    end = 8 + struct.unpack("<Q", weights[:8])[0]
    (folder / "model.safetensors").write_bytes(flip(weights, flips, end))
    try:
        assert equal(model, load(folder))
    except FormeryError:
        pass
    finally:
        (folder / "model.safetensors").write_bytes(weights)


@settings(max_examples=60)
@given(flips=FLIPS)
def test_a_flipped_description(original: tuple[Path, Decoder, bytes, bytes], flips: list[tuple[int, int]]) -> None:
    """A changed number may still be a model (another epsilon); what loads is whole and says what it is."""
    folder, model, _, description = original
    (folder / "formery.json").write_bytes(flip(description, flips, len(description)))
    try:
        twin = load(folder)
        assert twin.describe() == model.describe() or json.loads((folder / "formery.json").read_text())
        assert [tuple(one.shape) for one in twin.parameters()] == [tuple(one.shape) for one in model.parameters()]
    except FormeryError:
        pass
    finally:
        (folder / "formery.json").write_bytes(description)


def entry(header: dict[str, Any], **values: Any) -> None:
    header["embedding.weight"].update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda h: entry(h, shape=[10**12, 8]), "shape"),
        (lambda h: entry(h, shape=[8, 11]), "needs [11, 8]"),
        (lambda h: entry(h, shape=[11, 8, 1]), "shape"),
        (lambda h: entry(h, shape=[True, 8]), "shape"),
        (lambda h: entry(h, shape="11, 8"), "shape"),
        (lambda h: entry(h, dtype="I32"), "type I32"),
        (lambda h: entry(h, dtype="F64"), "model.safetensors"),
        (lambda h: entry(h, dtype="F16"), "model.safetensors"),
        (lambda h: entry(h, dtype=["F32"]), "type"),
        (lambda h: entry(h, dtype={}), "type"),
        (lambda h: entry(h, dtype=None), "type"),
        (lambda h: entry(h, data_offsets=[0, 10**15]), "truncated or damaged"),
        (lambda h: entry(h, data_offsets=[-8, 344]), "model.safetensors"),
        (lambda h: entry(h, data_offsets=[0]), "no place"),
        (lambda h: entry(h, data_offsets="all"), "no place"),
        (lambda h: entry(h, data_offsets=[0.0, 352.0]), "no place"),
        (lambda h: h.update({"embedding.weight": None}), "shape"),
        (lambda h: h.update({"embedding.weight": [11, 8]}), "shape"),
        (
            lambda h: h.update(other=h.pop("embedding.weight")),
            "lacks embedding.weight (1 tensors missing, 1 unknown)",
        ),
        (lambda h: h.update(other=h["embedding.weight"]), "other overlaps another tensor"),
        (lambda h: [h], "no table"),
        (lambda h: 3, "no table"),
        (lambda h: {}, "truncated or damaged"),
    ],
)
def test_lying_headers(change: Callable[[dict[str, Any]], Any], says: str, saved: Path) -> None:
    rewrite_header(saved, change)
    refused(saved, says)


def test_a_header_without_an_end(saved: Path) -> None:
    path = saved / "model.safetensors"
    data = path.read_bytes()
    for length in (2**63, 2**64 - 1, len(data), len(data) - 7):
        path.write_bytes(struct.pack("<Q", length) + data[8:])
        refused(saved, "model.safetensors")
    for text in (b"[" * 100_000, b"\xff\xfe{}", b'{"a": ' + b"9" * 5000 + b"}"):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        refused(saved, "damaged header")


def test_missing_and_extra_and_misshapen_tensors(saved: Path) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    name = "layers.1.sublayers.0.inner.key.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    refused(saved, f"lacks {name}")
    save_file({**tensors, "extra": torch.zeros(1)}, path)
    refused(saved, "has extra")
    save_file({**tensors, name: tensors[name].T.contiguous()}, path)
    refused(saved, name, "[8, 4]", "[4, 8]")
    save_file({**tensors, name: tensors[name].int()}, path)
    refused(saved, name, "I32")
    save_file(tensors, path)
    load(saved)


@pytest.mark.parametrize("vocabulary", [10**12, 10**18, 10**30])
def test_a_giant_takes_no_memory(vocabulary: int, saved: Path) -> None:
    """Both files tell of a table of 10^12 rows and more; there are 352 bytes of it, and nothing is made."""

    def describe(data: dict[str, Any]) -> None:
        data["model"]["embedding"]["vocabulary"] = vocabulary

    rewrite_description(saved, describe)
    rewrite_header(saved, lambda header: entry(header, shape=[vocabulary, 8], data_offsets=[0, vocabulary * 32]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        refused(saved)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.update(formery=2), "no description of version 1"),
        (lambda data: data.pop("model"), "no description of version 1"),
        (lambda data: data.update(model={"part": "RMSNorm", "width": 8}), "RMSNorm, which is no whole model"),
        (lambda data: data.update(model={"part": "Decodr"}), "did you mean Decoder"),
        (lambda data: data.update(model={"part": "Decoder"}), "embedding"),
        (lambda data: data.update(model=[]), "not a part"),
        (lambda data: data.update(model={"same_as": []}), "not there"),
        (lambda data: data["model"].update(layers=7), "layers"),
        (lambda data: data["model"].update(embedding={"part": "RMSNorm", "width": 8}), "embedding"),
        (lambda data: data["model"].update(max_length="long"), "max_length"),
        (lambda data: data["model"]["norm"].update(part="os.system"), "no part named 'os.system'"),
        (
            lambda data: data["model"]["norm"].update(width=9),
            "norm.weight has shape [8], the model needs [9]",
        ),
        (lambda data: data["model"]["layers"].pop(), "which the model does not know"),
        (lambda data: data["model"]["layers"].append(data["model"]["layers"][0]), "lacks layers.2"),
    ],
)
def test_bad_descriptions(change: Callable[[dict[str, Any]], Any], says: str, saved: Path) -> None:
    rewrite_description(saved, change)
    refused(saved, says)


DEEP = '{"formery": 1, "model": ' + '{"part": "Not", "mask": ' * 900 + '{"part": "Causal"}' + "}" * 901


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "{",
        "{}",
        "[" * 200_000,
        DEEP,
        '{"formery": 1, "model": ' + "9" * 5000 + "}",
        "nul",
        "\0",
    ],
)
def test_broken_json(text: str, saved: Path) -> None:
    (saved / "formery.json").write_text(text)
    refused(saved, "formery.json")


def test_description_that_is_no_text(saved: Path) -> None:
    (saved / "formery.json").write_bytes(b"\xff\xfe\x00")
    refused(saved, "not readable JSON")
    (saved / "formery.json").unlink()
    refused(saved, "holds neither formery.json nor config.json")
    (saved / "formery.json").mkdir()
    refused(saved, "formery.json")


def test_pickles_are_never_opened(saved: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    for name in ("model.pt", "pytorch_model.bin", "model.ckpt"):
        torch.save({"weight": Trap()}, tmp_path / name)
        refused(tmp_path / name, "is a pickle, which can run any code")
    (saved / "model.safetensors").unlink()
    refused(saved, "holds no model.safetensors.")
    torch.save({"weight": Trap()}, saved / "pytorch_model.bin")
    refused(saved, "only the pickle pytorch_model.bin, which is never opened")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    torch.save({"weight": Trap()}, foreign / "pytorch_model.bin")
    (foreign / "config.json").write_text("{}")
    refused(foreign, "only the pickle pytorch_model.bin, which is never opened", "save_pretrained")
    torch.save({"weight": Trap()}, saved / "model.safetensors")
    refused(saved, "model.safetensors")
    assert not (tmp_path / "sprung").exists()


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no checkpoint at", "nothing")
    refused(tmp_path / ("x" * 300), "no checkpoint at")
    refused(Path("a\0b"), "no checkpoint at")
    (tmp_path / "file.txt").write_text("text")
    refused(tmp_path / "file.txt", "no checkpoint at")
    assert shipped() == sorted(shipped())
