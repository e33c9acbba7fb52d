"""Corpora larger than memory: pieces that make up the whole, tokenising that goes on, windows that come once each."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.data.corpus import documents, files, pieces
from formery.data.shards import INDEX, ShardBatches, Shards, shuffled
from formery.data.tokenise import tokenise
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.errors import FormeryError

LINES = ["def add(a, b):", "    return a + b", "", "# naïve 😀", "class Sum:", "    total = 0", "\tmore = 1"]
TOKENIZER = train_bpe(["\n".join(LINES)] * 3, 300)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(path)
    return path


def written(folder: Path, tokens: list[list[int]], kind: str = "uint16") -> Shards:
    """Shards of these tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number, some in enumerate(tokens):
        (folder / f"{number}.bin").write_bytes(numpy.asarray(some, kind).tobytes())
        listed.append({"file": f"{number}.bin", "tokens": len(some)})
    index = {"format": 1, "dtype": kind, "tokenizer": "", "shards": listed}
    (folder / INDEX).write_text(json.dumps(index))
    return Shards(folder)


# ------------------------------------------------------------------------------------------- pieces


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=40), st.integers(1, 60))
def test_pieces_of_a_text_make_up_the_text(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], most: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "one.txt"
    path.write_text("\n".join(lines))
    found = [one for piece in pieces(path, most) for one in documents(piece)]
    assert "".join(one.text for one in found) == path.read_text()
    assert all(not one.text[:1].isspace() for one in found if not one.begins)


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), max_size=20), st.integers(1, 80))
def test_each_line_is_in_one_piece(tmp_path_factory: pytest.TempPathFactory, texts: list[str], most: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "some.jsonl"
    path.write_text("".join(json.dumps({"n": 1, "text": one}) + "\n" for one in texts))
    assert [one.text for piece in pieces(path, most) for one in documents(piece)] == texts


def test_rows_of_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"row {number} " * (number % 7) for number in range(500)]
    parquet.write_table(pyarrow.table({"body": texts}), tmp_path / "some.parquet", row_group_size=60)
    parts = pieces(tmp_path / "some.parquet", 2000)
    assert len(parts) > 2
    assert [one.text for piece in parts for one in documents(piece, "body")] == texts
    with pytest.raises(FormeryError, match="no column 'text', but body"):
        list(documents(parts[0]))
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "some.parquet").read_bytes()[:-30])
    with pytest.raises(FormeryError, match="no whole parquet file"):
        pieces(tmp_path / "cut.parquet")


def test_what_is_no_corpus_is_told(tmp_path: Path) -> None:
    with pytest.raises(FormeryError, match="no file or folder"):
        files([tmp_path / "nowhere"])
    with pytest.raises(FormeryError, match="no file ends in"):
        files([tmp_path])
    (tmp_path / "one.exe").touch()
    with pytest.raises(FormeryError, match=r"is none of \.parquet"):
        files([tmp_path / "one.exe"])
    for name, data, said in (
        ("a.jsonl", b'{"text": "a"}\n{"text"\n', "no JSON, at byte 14"),
        ("b.jsonl", b'{"body": "a"}\n', "without 'text', at byte 0"),
        ("c.jsonl", b'{"text": 3}\n', "int in 'text'"),
        ("d.txt", b"ab\xff", "byte 2 fits no character"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(FormeryError, match=said):
            list(documents(pieces(tmp_path / name)[0]))


# ------------------------------------------------------------------------------------------- tokenising


def corpus(folder: Path, documents: int) -> tuple[Path, list[str]]:
    texts = [f"def f{number}(a, b):\n    return a + {number}\n" * (1 + number % 5) for number in range(documents)]
    folder.mkdir()
    half = len(texts) // 2
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts[:half]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in texts[half:]))
    return folder, texts


def framed(texts: list[str]) -> list[int]:
    bos, eos = TOKENIZER.bos, TOKENIZER.eos
    assert bos is not None and eos is not None
    return [token for row in TOKENIZER.encode_batch(texts) for token in (bos, *row, eos)]


def test_shards_hold_what_the_tokenizer_makes(tmp_path: Path) -> None:
    folder, texts = corpus(tmp_path / "corpus", 300)
    told: list[tuple[int, int, str]] = []
    shards = tokenise([folder], TOKENIZER, tmp_path / "out", jobs=2, piece=4000, tell=lambda *one: told.append(one))
    assert len(shards.paths) > 4 and shards.take(0, len(shards)).tolist() == framed(texts)
    assert told[-1][:2] == (len(shards.paths), len(shards.paths)) and shards.tokenizer == TOKENIZER.digest
    shards.paths[1].unlink()
    (tmp_path / "out" / INDEX).unlink()
    with pytest.raises(FormeryError, match="no token shards"):
        Shards(tmp_path / "out")
    kept = shards.paths[0].stat().st_mtime_ns
    again = tokenise([folder], TOKENIZER, tmp_path / "out", jobs=1, piece=4000)
    assert again.paths[0].stat().st_mtime_ns == kept and again.take(0, len(again)).tolist() == framed(texts)
    with pytest.raises(FormeryError, match="holds another corpus"):
        tokenise([folder / "a.jsonl"], TOKENIZER, tmp_path / "out", piece=4000)
    with pytest.raises(FormeryError, match="at least 1 process"):
        tokenise([folder], TOKENIZER, tmp_path / "out", jobs=0)


def test_a_text_of_many_pieces_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("\n".join(LINES * 30))
    shards = tokenise([tmp_path / "long.txt"], TOKENIZER, tmp_path / "out", jobs=1, piece=500)
    tokens = shards.take(0, len(shards)).tolist()
    assert len(shards.paths) > 3 and tokens.count(TOKENIZER.bos) == tokens.count(TOKENIZER.eos) == 1
    assert TOKENIZER.decode(tokens) == (tmp_path / "long.txt").read_text()


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGINT])
def test_tokenising_that_is_stopped_goes_on(tmp_path: Path, tokenizer: Path, signal_: signal.Signals) -> None:
    folder, texts = corpus(tmp_path / "corpus", 8_000)
    out = tmp_path / "out"
    code = (
        "import sys\nfrom formery.__main__ import one_sentence\nfrom formery.data.tokenise import tokenise\n"
        "from formery.data.tokenizer import Tokenizer\n"
        "if __name__ == '__main__':\n"
        "    with one_sentence():\n"
        "        tokenise([sys.argv[1]], Tokenizer.load(sys.argv[2]), sys.argv[3], jobs=2, piece=10_000)\n"
    )
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), str(folder), str(tokenizer), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(out.glob("shard-*.bin"))) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    if signal_ == signal.SIGINT:
        os.killpg(process.pid, signal_)  # as a terminal does
    else:
        os.kill(process.pid, signal_)  # the processes that it began find that out
    assert process.wait(30) != 0
    assert process.stderr is not None and "Traceback" not in process.stderr.read()
    done = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.bin")}
    assert len(done) >= 5 and not (out / INDEX).exists()
    subprocess.run(command, check=True, timeout=120)
    shards = Shards(out)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()) and len(shards.paths) > len(done)
    assert shards.take(0, len(shards)).tolist() == framed(texts)


def test_small_files_share_a_shard(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(20):
        (tmp_path / "corpus" / f"{number:02}.txt").write_text(f"{number} " * number)
    shards = tokenise([tmp_path / "corpus"], TOKENIZER, tmp_path / "out", jobs=1, piece=200)
    assert 2 < len(shards.paths) < 8
    assert shards.take(0, len(shards)).tolist() == framed([f"{number} " * number for number in range(1, 20)])


# ------------------------------------------------------------------------------------------- batches


@given(st.integers(1, 300), st.integers(0, 2**40))
def test_shuffling_is_a_permutation(count: int, seed: int) -> None:
    keys = [int(one) for one in numpy.random.default_rng(seed).integers(2**62, size=4)]
    assert sorted(shuffled(place, count, keys) for place in range(count)) == list(range(count))


def test_shuffling_shuffles() -> None:
    def order(seed: int) -> list[int]:
        keys = [int(one) for one in numpy.random.default_rng(seed).integers(2**62, size=4)]
        return [shuffled(place, 1000, keys) for place in range(1000)]

    one, other = order(1), order(2)
    assert one != other
    for some in (one, other):
        assert abs(numpy.corrcoef(range(1000), some)[0, 1]) < 0.12
        assert sum(abs(a - b) == 1 for a, b in pairwise(some)) < 15


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=6).filter(lambda one: sum(one) > 5),
    st.integers(1, 5),
    st.integers(0, 9),
)
def test_an_epoch_has_each_window_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, seed: int
) -> None:
    total = sum(sizes)
    numbers = iter(range(total))
    shards = written(tmp_path_factory.mktemp("shards"), [[next(numbers) for _ in range(size)] for size in sizes])
    batches = ShardBatches(shards, length, 1, seed)
    rows = [batches.batch(step)["tokens"][0].tolist() for step in range(batches.windows)]
    for row in rows:  # contiguous, across the borders of shards and the end of the text
        assert row == [(row[0] + at) % total for at in range(length + 1)]
    seen = [token for row in rows for token in row[:-1]]
    assert len(seen) == len(set(seen)) == batches.windows * length
    assert torch.equal(ShardBatches(shards, length, 2, seed).batch(3)["tokens"][1], batches.batch(7)["tokens"][0])


def test_memory_stays_flat_on_two_gigabytes(tmp_path: Path) -> None:
    block = numpy.random.default_rng(0).integers(2**16, size=2**24, dtype=numpy.uint16).tobytes()
    listed = []
    for number in range(8):
        with (tmp_path / f"{number}.bin").open("wb") as file:
            for _ in range(8):
                file.write(block)
        listed.append({"file": f"{number}.bin", "tokens": 8 * 2**24})
    index = {"format": 1, "dtype": "uint16", "tokenizer": "", "shards": listed}
    (tmp_path / INDEX).write_text(json.dumps(index))
    shards = Shards(tmp_path)
    assert len(shards) * 2 == 2**31
    batches = ShardBatches(shards, 1024, 64)
    batches.batch(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for step in range(500):  # 33 million tokens, from all over the files
        batches.batch(step)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB


def test_shards_that_are_not_whole_are_told(tmp_path: Path) -> None:
    shards = written(tmp_path / "one", [[1, 2, 3], [4, 5, 6]])
    with pytest.raises(FormeryError, match="too few for a window of 6"):
        ShardBatches(shards, 6, 1)
    with pytest.raises(FormeryError, match="hold nothing"):
        ShardBatches(shards, 0, 1)
    shards.paths[1].write_bytes(b"\1\0")
    with pytest.raises(FormeryError, match="has become shorter"):
        shards.take(0, 6)
    with pytest.raises(FormeryError, match="is not the shard that index.json tells of"):
        Shards(tmp_path / "one")
    index = tmp_path / "one" / INDEX
    for old, new in (('"format": 1', '"format": 2'), ('"0.bin"', '"../0.bin"'), ("{", "")):
        whole = index.read_text()
        index.write_text(whole.replace(old, new, 1))
        with pytest.raises(FormeryError, match="is damaged"):
            Shards(tmp_path / "one")
        index.write_text(whole)


def test_the_tokenizer_lies_beside_its_shards(tmp_path: Path) -> None:
    folder, _ = corpus(tmp_path / "corpus", 4)
    shards = tokenise([folder], TOKENIZER, tmp_path / "out", jobs=1)
    assert Tokenizer.load(tmp_path / "out" / "tokenizer.json").digest == shards.tokenizer
