"""llama2.c's files: the numbers of a plain float64 Llama, the tokens of merging by score, errors for anything else."""

import math
import os
import pickle
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import formery
from formery.data.scoring import negative_log_likelihood
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError
from formery.models import Decoder, load, save
from formery.models.hub import llama2c
from formery.models.hub.llama2c_tokenizer import read_tokenizer
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Linear,
    Output,
    Part,
    PreNorm,
    RMSNorm,
    Rotary,
    TiedOutput,
    causal,
    window,
)

real_data = pytest.mark.skipif(
    not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data"
)
DATA = Path(os.environ.get("FORMERY_DATA", "."))
REAL = DATA / "ckpt_stories260k" / "stories260K.bin"

Sizes = tuple[int, int, int, int, int, int, int]
# width, hidden, layers, heads, key and value heads, vocabulary (negative: an output of its own), length
SIZES: list[Sizes] = [
    (8, 12, 2, 4, 2, 11, 16),
    (24, 20, 3, 3, 1, -13, 9),
    (16, 32, 1, 2, 2, -7, 5),
    (2, 1, 1, 1, 1, 1, 1),
]


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The arrays that the format has, in its order and with its names."""
    width, hidden, layers, heads, groups, vocabulary, length = sizes
    head = width // heads
    return {
        "tok_embeddings": (abs(vocabulary), width),
        "rms_att": (layers, width),
        "wq": (layers, width, width),
        "wk": (layers, groups * head, width),
        "wv": (layers, groups * head, width),
        "wo": (layers, width, width),
        "rms_ffn": (layers, width),
        "w1": (layers, hidden, width),
        "w2": (layers, width, hidden),
        "w3": (layers, hidden, width),
        "rms_final": (width,),
        "freq_real": (length, head // 2),
        "freq_imag": (length, head // 2),
        **({"wcls": (-vocabulary, width)} if vocabulary < 0 else {}),
    }


def random_file(path: Path, sizes: Sizes, seed: int = 0) -> dict[str, np.ndarray]:
    """Writes a file of random weights; the arrays that are in it."""
    draw = np.random.default_rng(seed)
    # What goes into the residual stream is small, so that the norms' epsilon counts.
    small = {"tok_embeddings": 0.02, "wo": 0.02, "w2": 0.02}
    arrays = {
        name: (draw.normal(size=shape) * small.get(name, 1)).astype("<f4") for name, shape in shapes(sizes).items()
    }
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(array.tobytes() for array in arrays.values()))
    return arrays


def plain_llama(arrays: dict[str, np.ndarray], sizes: Sizes, tokens: list[int]) -> np.ndarray:
    """Logits in float64, neighbouring entries turned as complex numbers, one head at a time."""
    width, _, layers, heads, groups, _, _ = sizes
    head, time = width // heads, len(tokens)
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    turn = np.exp(1j * np.outer(np.arange(time), 10_000.0 ** (-np.arange(0, head, 2) / head)))

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight

    def turned(x: np.ndarray) -> np.ndarray:
        pairs = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(time, head)

    x = w["tok_embeddings"][tokens]
    for layer in range(layers):
        h = norm(x, w["rms_att"][layer])
        query, key, value = (h @ w[name][layer].T for name in ("wq", "wk", "wv"))
        mixed = []
        for one in range(heads):
            own, its = (slice(at * head, (at + 1) * head) for at in (one, one // (heads // groups)))
            scores = turned(query[:, own]) @ turned(key[:, its]).T / math.sqrt(head)
            scores[np.triu_indices(time, 1)] = -np.inf
            share = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(share / share.sum(-1, keepdims=True) @ value[:, its])
        x = x + np.concatenate(mixed, -1) @ w["wo"][layer].T
        h = norm(x, w["rms_ffn"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["rms_final"]) @ w.get("wcls", w["tok_embeddings"]).T


def vocabulary_file(path: Path, pieces: list[tuple[bytes, float]]) -> Path:
    longest = max(len(piece) for piece, _ in pieces)
    records = [struct.pack("<fi", score, len(piece)) + piece for piece, score in pieces]
    path.write_bytes(struct.pack("<i", longest) + b"".join(records))
    return path


def pieces_in(path: Path) -> list[tuple[bytes, float]]:
    data, at, pieces = path.read_bytes(), 4, []
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        pieces.append((data[at + 8 : at + 8 + length], score))
        at += 8 + length
    return pieces


BYTES = [f"<0x{byte:02X}>".encode() for byte in range(256)]
SIGNS = [(piece, 0.0) for piece in (b"<unk>", b"\n<s>\n", b"\n</s>\n", *BYTES)]


def merged(pieces: list[tuple[bytes, float]], text: str) -> list[int]:
    """The tokens of `text`: characters or bytes, then always the best and leftmost merge of all."""
    ids = {piece: id for id, (piece, _) in enumerate(pieces)}
    tokens: list[int] = []
    for character in " " + text if text else "":
        known = ids.get(character.encode())
        tokens += [byte + 3 for byte in character.encode()] if known is None else [known]
    while True:
        found = [
            (-pieces[id][1], at, id)
            for at in range(len(tokens) - 1)
            if (id := ids.get(pieces[tokens[at]][0] + pieces[tokens[at + 1]][0])) is not None
        ]
        if not found:
            return tokens
        _, at, id = min(found)
        tokens[at : at + 2] = [id]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama2c")


# ---------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_are_those_of_a_plain_llama(sizes: Sizes, tmp_path: Path) -> None:
    arrays = random_file(tmp_path / "model.bin", sizes)
    tokens = [(7 * place + 3) % abs(sizes[5]) for place in range(sizes[6])]
    wanted = torch.from_numpy(plain_llama(arrays, sizes, tokens))
    assert llama2c.looks_like(tmp_path / "model.bin")
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-3), (None, 1e-3)):
        model = llama2c.read(tmp_path / "model.bin", dtype=dtype)
        assert model.output.__class__ is (TiedOutput if sizes[5] > 0 else Output)
        assert model.max_length == sizes[6] and model.tokenizer is None and not model.training
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0].double()
        torch.testing.assert_close(logits, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_written_is_read_as_it_was(sizes: Sizes, tmp_path: Path) -> None:
    random_file(tmp_path / "model.bin", sizes)
    model = llama2c.read(tmp_path / "model.bin")
    llama2c.write(model, tmp_path / "again.bin")
    again = llama2c.read(tmp_path / "again.bin")
    assert again.describe() == model.describe()
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    # Everything but the tables, which nobody reads, is the file's own bytes.
    start, end = (4 * sum(math.prod(shape) for shape in some) for some in around_tables(sizes))
    first, second = (tmp_path / "model.bin").read_bytes(), (tmp_path / "again.bin").read_bytes()
    assert len(first) == len(second) == 28 + end + (len(first) - 28 - end)
    assert first[: 28 + start] == second[: 28 + start] and first[28 + end :] == second[28 + end :]


def around_tables(sizes: Sizes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The arrays before the rotary tables, and those up to their end."""
    named = shapes(sizes)
    order = [*named]
    return [named[one] for one in order[:11]], [named[one] for one in order[:13]]


def test_weights_stay_in_the_file_until_they_are_changed(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    random_file(path, SIZES[2])
    before = path.read_bytes()
    model = llama2c.read(path)
    storages: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        storages.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
    [mapped] = [names for names in storages.values() if len(names) > 1]
    copied = {name for names in storages.values() for name in names} - {*mapped}
    assert copied and all(name.endswith((".query.weight", ".key.weight")) for name in copied)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    llama2c.write(model, path)  # in the place of the file whose pages the model still uses
    assert torch.equal(llama2c.read(path).embedding.weight, model.embedding.weight)


def test_a_model_read_can_be_saved_as_a_checkpoint(tmp_path: Path) -> None:
    random_file(tmp_path / "model.bin", SIZES[1])
    model = llama2c.read(tmp_path / "model.bin")
    save(model, tmp_path / "folder")
    again = load(tmp_path / "folder")
    assert again.describe() == model.describe()
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


# ---------------------------------------------------------------------------------------- damaged files


def fits(data: bytes) -> bool:
    """Whether the bytes are a file of version 0, by the format's own account."""
    if len(data) < 28:
        return False
    sizes: Sizes = struct.unpack("<7i", data[:28])
    width, hidden, layers, heads, groups, vocabulary, length = sizes
    if min(width, hidden, layers, heads, groups, abs(vocabulary), length) < 1 or width % (2 * heads) or heads % groups:
        return False
    return len(data) == 28 + 4 * sum(math.prod(shape) for shape in shapes(sizes).values())


NUMBERS = st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 40)


@given(
    st.sampled_from(SIZES[:3]), st.dictionaries(st.integers(0, 6), NUMBERS), st.just(0) | st.integers(-400, 40)
)
def test_a_damaged_file_gives_a_sentence(folder: Path, sizes: Sizes, changed: dict[int, int], more: int) -> None:
    path = folder / "damaged.bin"
    random_file(path, sizes)
    header = [changed.get(place, number) for place, number in enumerate(sizes)]
    whole = struct.pack("<7i", *header) + path.read_bytes()[28:]
    whole = whole[:more] if more < 0 else whole + bytes(more)
    path.write_bytes(whole)
    assert llama2c.looks_like(path) == fits(whole)
    if fits(whole):
        assert isinstance(llama2c.read(path), Decoder)
    else:
        with pytest.raises(FormeryError) as raised:
            llama2c.read(path)
        assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_other_files_are_told_apart(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(40)}, tmp_path / "pytorch_model.bin")
    torch.save({"weight": torch.ones(40)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps([1.0] * 100))
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "folder.bin").mkdir()
    random_file(tmp_path / "model.dat", SIZES[0])
    for name in ("pytorch_model.bin", "old.bin", "pickle.bin", "empty.bin", "folder.bin", "none.bin", "nul\0.bin"):
        assert not llama2c.looks_like(tmp_path / name)
        with pytest.raises(FormeryError, match=name.partition("\0")[0]):
            llama2c.read(tmp_path / name)
    assert not llama2c.looks_like(tmp_path / "model.dat")
    assert isinstance(llama2c.read(tmp_path / "model.dat"), Decoder)


def test_what_is_wrong_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    random_file(path, SIZES[0])
    whole = path.read_bytes()

    def told(data: bytes) -> str:
        path.write_bytes(data)
        with pytest.raises(FormeryError) as raised:
            llama2c.read(path)
        return str(raised.value)

    assert "truncated" in (sentence := told(whole[:-4]))
    assert f"{len(whole) - 4} bytes" in sentence and f"tells of {len(whole)}" in sentence
    assert "longer than it should be" in told(whole + b"....")
    assert "20 bytes" in told(whole[:20])
    assert "2 heads for a width of 6, which does not give them an even width" in told(
        struct.pack("<7i", 6, 12, 2, 2, 1, 11, 16)
    )
    assert "3 heads for a width of 8" in told(struct.pack("<7i", 8, 12, 2, 3, 1, 11, 16))
    assert "heads cannot share evenly" in told(struct.pack("<7i", 8, 12, 2, 4, 3, 11, 16))
    assert "version 2" in told(struct.pack("<2i", 0x616B3432, 2) + whole)
    many = (2, 1, 2000, 1, 1, 1, 1)
    random_file(path, many)
    with pytest.raises(FormeryError, match="2000 layers"):
        llama2c.read(path)


# ------------------------------------------------------------------------------------ what does not fit


def standard() -> Decoder:
    """A model that fits, put together by hand, its positions apart."""
    embedding = Embedding(9, 8, deviation=0.5)
    layers = [
        Layer(
            [
                PreNorm(RMSNorm(8, 1e-5), Attention(8, 2, position=Rotary())),
                PreNorm(RMSNorm(8, 1e-5), GatedMLP(8, 10)),
            ]
        )
        for _ in range(2)
    ]
    return Decoder(embedding, layers, RMSNorm(8, 1e-5), TiedOutput(embedding), 6)


def last_attention(model: Decoder, attention: Attention) -> None:
    model.layers[1].sublayers[0].replace("inner", attention)


def last(model: Decoder, name: str, part: Part) -> None:
    model.layers[1].sublayers[1].replace(name, part)


CHANGES: dict[str, Callable[[Decoder], object]] = {
    "layers.1.sublayers.0.inner.bias is True, not False": lambda model: last_attention(
        model, Attention(8, 2, position=Rotary(), bias=True)
    ),
    "layers.1.sublayers.0.inner.position.base is 500000.0, not 10000.0": lambda model: last_attention(
        model, Attention(8, 2, position=Rotary(500_000.0))
    ),
    "layers.1.sublayers.0.inner.position.interleaved is True": lambda model: last_attention(
        model, Attention(8, 2, position=Rotary(interleaved=True))
    ),
    "layers.1.sublayers.0.inner.position is Alibi, not": lambda model: last_attention(
        model, Attention(8, 2, position=Alibi())
    ),
    "layers.1.sublayers.0.inner.position is None": lambda model: last_attention(model, Attention(8, 2)),
    "layers.1.sublayers.0.inner.mask is .*, not": lambda model: last_attention(
        model, Attention(8, 2, position=Rotary(), mask=causal & window(3))
    ),
    "layers.1.sublayers.0.inner.head_width is 2": lambda model: last_attention(
        model, Attention(8, 2, head_width=2, position=Rotary())
    ),
    "layers.1.sublayers.0.inner.key_value_heads is 1, not 2": lambda model: last_attention(
        model, Attention(8, 2, 1, position=Rotary())
    ),
    "layers.1.sublayers.1.inner.hidden is 12": lambda model: last(model, "inner", GatedMLP(8, 12)),
    "layers.1.sublayers.1.inner is MLP": lambda model: last(model, "inner", MLP(8, 10)),
    "layers.1.sublayers.1.norm.epsilon is 1e-06, not 1e-05": lambda model: last(
        model, "norm", RMSNorm(8)
    ),
    "norm is LayerNorm, not RMSNorm": lambda model: model.replace("norm", LayerNorm(8)),
    "norm is None, not RMSNorm": lambda model: setattr(model, "norm", None),
    "embedding.scale is 2.0": lambda model: setattr(model.embedding, "scale", 2.0),
    "output.soft_cap is 30.0": lambda model: setattr(model.output, "soft_cap", 30.0),
    "output.embedding.weight is that of output.embedding.weight, not that of embedding.weight": lambda model: setattr(
        model.output, "embedding", Embedding(9, 8)
    ),
    "layers.1.sublayers.0.norm.weight is that of layers.0": lambda model: model.layers.__setitem__(1, model.layers[0]),
    "length of layers.0.sublayers is 1, not 2": lambda model: model.layers[0].sublayers.pop(1),
    "set its max_length": lambda model: setattr(model, "max_length", None),
    "is torch.float64": lambda model: model.double(),
    "shape of embedding.weight is": lambda model: setattr(
        model.embedding, "weight", nn.Parameter(torch.ones(10, 8))),
    "positive numbers of 32 bits": lambda model: setattr(model, "max_length", 2**40),
    "attention and gated feed-forwards alone": lambda model: model.layers.__delitem__(slice(None)),
}


@pytest.mark.parametrize("sentence", CHANGES)
def test_what_the_format_has_no_room_for_is_named(sentence: str, tmp_path: Path) -> None:
    model = standard()
    CHANGES[sentence](model)
    with pytest.raises(FormeryError, match=sentence):
        llama2c.write(model, tmp_path / "model.bin")
    assert not [*tmp_path.iterdir()]


def test_only_decoders_are_written(tmp_path: Path) -> None:
    with pytest.raises(FormeryError, match="holds decoders"):
        llama2c.write(Linear(2, 2), tmp_path / "model.bin")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_model_put_together_by_hand_is_written(dtype: torch.dtype, tmp_path: Path) -> None:
    model = standard().to(dtype)
    llama2c.write(model, tmp_path / "model.bin")
    again = llama2c.read(tmp_path / "model.bin")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one.float(), other)


# ------------------------------------------------------------------------------------------- tokenizers


@st.composite
def vocabularies(draw: st.DrawFn) -> list[tuple[bytes, float]]:
    """Pieces over a few characters in any order, each with a score of its own; some characters are unknown."""
    some = st.text(st.sampled_from("ab é"), min_size=1, max_size=5)
    pieces = draw(st.lists(some, unique=True, min_size=1, max_size=25))
    scores = draw(st.permutations(range(len(pieces))))
    return [*SIGNS, *((piece.encode(), -float(score)) for piece, score in zip(pieces, scores, strict=True))]


@given(vocabularies(), st.text(st.sampled_from("ab é猫▁") | st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_vocabulary_merges_by_score(folder: Path, pieces: list[tuple[bytes, float]], text: str) -> None:
    tokenizer = read_tokenizer(vocabulary_file(folder / "any.bin", pieces), len(pieces))
    assert tokenizer.encode(text) == merged(pieces, text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def small_vocabulary() -> list[tuple[bytes, float]]:
    pieces = ["<s", "<s>", "<", "s", ">", " ", "0x", "<0x", "x", "0", "A", "0A", "0A>"]
    return [*SIGNS, *((piece.encode(), -float(at)) for at, piece in enumerate(pieces))]


def test_no_text_makes_a_special_token_or_a_byte(tmp_path: Path) -> None:
    pieces = [one for one in small_vocabulary() if one[0] != b"<s>"]
    tokenizer = read_tokenizer(vocabulary_file(tmp_path / "tokenizer.bin", pieces), len(pieces))
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocabulary_size) == (1, 2, len(pieces))
    assert tokenizer.special == {0, 1, 2}
    for text in ("<s>", "<unk>", "</s>", "<0x0A>", "<0xAA> \n<s>\n"):
        ids = tokenizer.encode(text)
        assert not set(ids) & {0, 1, 2} and tokenizer.decode(ids) == text
    assert tokenizer.decode([1, 0, *tokenizer.encode("s x"), 2]) == "s x"
    assert tokenizer.decode([3 + byte for byte in "é\n".encode()]) == "é\n"
    assert tokenizer.inner.encode("s x").ids == [1, *tokenizer.encode("s x")]  # as the published tokenizer begins


def test_a_vocabulary_without_bytes_has_an_unknown_token(tmp_path: Path) -> None:
    pieces = [*SIGNS[:3], (b" ", 0.0), (b"a", -1.0), (b" a", -2.0)]
    tokenizer = read_tokenizer(vocabulary_file(tmp_path / "tokenizer.bin", pieces), len(pieces))
    assert tokenizer.encode("aéa") == [5, 0, 4]


def test_the_vocabulary_beside_the_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    pieces = [*SIGNS[:3], (b" ", 0.0), (b"a", -1.0), (b"b", -2.0), (b"c", -3.0)]
    other = [*pieces[:6], (b"d", -3.0)]
    random_file(path, SIZES[2])
    assert llama2c.read(path).tokenizer is None
    vocabulary_file(tmp_path / "tokenizer.bin", other)
    assert found(path).decode([6]) == "d"
    vocabulary_file(tmp_path / "tok7.bin", pieces)
    assert found(path).decode([6]) == "c"
    assert found(path, tmp_path / "tokenizer.bin").decode([6]) == "d"
    with pytest.raises(FormeryError, match="there is no vocabulary .*none.bin"):
        llama2c.read(path, tmp_path / "none.bin")


def found(path: Path, tokenizer: Path | None = None) -> Tokenizer:
    one = llama2c.read(path, tokenizer).tokenizer
    assert one is not None
    return one


def test_a_wrong_vocabulary_gives_a_sentence(tmp_path: Path) -> None:
    pieces = small_vocabulary()

    def told(some: list[tuple[bytes, float]], size: int = 20, cut: int | None = None) -> str:
        path = vocabulary_file(tmp_path / "tokenizer.bin", some)
        path.write_bytes(path.read_bytes()[:cut])
        with pytest.raises(FormeryError) as raised:
            read_tokenizer(path, size)
        assert str(path) in str(raised.value)
        return str(raised.value)

    assert "twice, the second time as 260" in told(pieces, len(pieces))
    pieces.remove((b"<s>", -1.0))
    assert "has 271 pieces, where the model knows 272" in told(pieces, 272)
    assert "has more pieces, where the model knows 270" in told(pieces, 270)
    assert "piece 270 is not whole" in told(pieces, 271, -1)
    assert "piece 0 is not whole" in told(pieces, 271, 9)
    assert "has 0 pieces" in told(pieces, 271, 2)
    assert "2 pieces, too few for" in told(pieces[:2], 2)
    assert "piece 271 is not UTF-8" in told([*pieces, (b"\xff", 0.0)], 272)
    assert "piece 271 is not whole" in told([*pieces, (b"", 0.0)], 272)
    assert "piece 271 is not whole" in told([*pieces, (b"q", math.nan)], 272)
    assert "piece 271 is not whole" in told([*pieces, (b"q" * 300, 0.0)], 272)


@given(st.integers(0, 4000), st.binary(min_size=1, max_size=12), st.integers(1, 300))
def test_a_damaged_vocabulary_is_read_or_refused(folder: Path, at: int, put: bytes, size: int) -> None:
    path = vocabulary_file(folder / "damaged_vocabulary.bin", small_vocabulary()[:size])
    data = bytearray(path.read_bytes())
    data[at : at + len(put)] = put
    path.write_bytes(bytes(data))
    with suppress(FormeryError):
        assert read_tokenizer(path, size).vocabulary_size == size


# -------------------------------------------------------------------------------- a model of the world


@pytest.fixture(scope="module")
def stories() -> Decoder:
    return llama2c.read(REAL)


@real_data
def test_the_real_model_says_what_is_documented(stories: Decoder) -> None:
    [one] = formery.generate(stories, [[1]], max_new_tokens=256)
    assert one.text == (REAL.parent / "expected_greedy.txt").read_text().rstrip("\n")


@real_data
def test_a_story_ends_where_the_next_would_begin(stories: Decoder) -> None:
    [one] = formery.generate(stories, [[1]], max_new_tokens=500)
    assert one.stop == "end" and 256 < len(one.tokens) < 500 and not {1, 2} & {*one.tokens}


@real_data
def test_the_real_model_costs_what_was_measured(stories: Decoder) -> None:
    sample = (DATA / "lm_tinystories2m" / "tinystories_sample.txt").read_text(errors="replace")
    assert stories.tokenizer is not None
    texts = [one.strip() for one in sample.split("<|endoftext|>")[1:101]]
    documents = [[1, *ids][:512] for ids in stories.tokenizer.encode_batch(texts)]
    targets = sum(len(ids) - 1 for ids in documents)
    assert targets == 37_096
    assert negative_log_likelihood(stories, documents) / targets == pytest.approx(1.4086, abs=1e-4)


@real_data
def test_methods_say_what_greedy_says(stories: Decoder) -> None:
    draft = llama2c.read(REAL)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    assert stories.tokenizer is not None
    prompts = [[1], [1, *stories.tokenizer.encode("Tim had a big red")]]
    greedy = [one.tokens for one in formery.generate(stories, prompts, max_new_tokens=80)]
    for method, options in (
        ("speculative-sampling", {"draft": draft, "length": 4}),
        ("aggressive-decoding", {}),
        ("parallel-jacobi-decoding", {}),
    ):
        results = formery.generate(stories, prompts, method=method, max_new_tokens=80, **options)
        assert [one.tokens for one in results] == greedy, method
        if method != "parallel-jacobi-decoding":
            assert any(one.accepted for one in results)


@real_data
def test_the_real_file_is_written_byte_for_byte(stories: Decoder, tmp_path: Path) -> None:
    llama2c.write(stories, tmp_path / "again.bin")
    again, real = (np.frombuffer(path.read_bytes(), "<f4") for path in (tmp_path / "again.bin", REAL))
    # The rotary tables come from sines and cosines, whose last bits are the machine's.
    assert len(again) == len(real)
    assert again[: -2 * 512 * 4].tobytes() == real[: -2 * 512 * 4].tobytes()
    np.testing.assert_allclose(again[-2 * 512 * 4 :], real[-2 * 512 * 4 :], atol=1e-5)


@real_data
@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.text(st.sampled_from("theand TILyw's,.\"\n é“"), max_size=60)
)
def test_the_real_vocabulary_merges_by_score(stories: Decoder, text: str) -> None:
    assert stories.tokenizer is not None
    ids = stories.tokenizer.encode(text)
    assert ids == merged(pieces_in(REAL.parent / "tok512.bin"), text)
    assert stories.tokenizer.decode(ids) == text
