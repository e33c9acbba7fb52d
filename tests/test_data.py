"""Tokenizers lose nothing and forge nothing, batches are pure, scores are exact, downloads are whole."""

import gzip
import hashlib
import http.server
import itertools
import json
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.data import sources
from formery.data.base import Example
from formery.data.batching import PairBatches, WindowBatches, pad
from formery.data.code import Code, functions, modules, next_line
from formery.data.scoring import negative_log_likelihood, text_cost, windows
from formery.data.tokenizer import SPECIALS, Tokenizer, train_bpe
from formery.data.works import WORKS, work
from formery.data.write import repeated_4grams
from formery.errors import FormeryError

CORPUS = [
    "def f(x):\n    return x + 1\n\n" * 3,
    "the cat sat on the mat, the cat sat <eos>" * 3,
    "naïve déjà vu 😀",
] * 4
TOKENIZER = train_bpe(CORPUS, 320)

real_data = pytest.mark.skipif(
    not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data"
)


# ------------------------------------------------------------------------------------------ tokenizers


@given(
    st.text(st.characters(exclude_categories=["Cs"]))
    | st.lists(st.sampled_from([*SPECIALS, " ", "\r\n", "x", "é"])).map("".join)
)
def test_any_text_survives_and_none_makes_a_special_token(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert not {TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos} & set(ids)
    assert max(ids, default=0) < TOKENIZER.vocabulary_size


def test_special_tokens_come_first_and_leave_no_text() -> None:
    assert (TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos) == (0, 1, 2)
    assert TOKENIZER.decode([1, *TOKENIZER.encode("the cat"), 2, 0, 0]) == "the cat"
    assert TOKENIZER.decode([10**6]) == ""


def test_batches_encode_as_single_texts_do() -> None:
    assert TOKENIZER.encode_batch(CORPUS) == [TOKENIZER.encode(text) for text in CORPUS]


def test_training_merges_and_is_repeatable() -> None:
    assert 259 < TOKENIZER.vocabulary_size <= 320
    assert len(TOKENIZER.encode("the cat sat")) < len("the cat sat")
    assert train_bpe(iter(CORPUS), 320).digest == TOKENIZER.digest
    assert train_bpe(CORPUS, 300).digest != TOKENIZER.digest


def test_a_vocabulary_without_special_tokens() -> None:
    plain = train_bpe(CORPUS, 300, specials=())
    assert (plain.pad, plain.bos, plain.eos) == (None, None, None)
    assert plain.decode(plain.encode("<eos>")) == "<eos>"


def test_too_small_a_vocabulary_is_refused() -> None:
    with pytest.raises(FormeryError, match="at least 259"):
        train_bpe(CORPUS, 258)


@pytest.mark.parametrize("use", [TOKENIZER.encode, lambda text: train_bpe([text], 300)])
def test_half_a_surrogate_pair_is_refused(use) -> None:
    with pytest.raises(FormeryError, match="surrogate pair at character 1"):
        use("a\ud800")


def test_tokens_can_be_looked_at() -> None:
    assert TOKENIZER.token_text(2) == "<eos>"
    euro = [TOKENIZER.token_text(i) for i in TOKENIZER.encode("€")]
    assert euro == ["\\xe2", "\\x82", "\\xac"]
    assert "".join(TOKENIZER.token_text(i) for i in TOKENIZER.encode("the cat\n")) == "the cat\n"
    for bad in (-1, TOKENIZER.vocabulary_size):
        with pytest.raises(FormeryError, match="there is no token"):
            TOKENIZER.token_text(bad)


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == TOKENIZER.digest
    assert (loaded.pad, loaded.bos, loaded.eos) == (0, 1, 2)
    assert [loaded.encode(text) for text in CORPUS] == [TOKENIZER.encode(text) for text in CORPUS]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_a_file_that_lists_special_tokens_as_plain_ones_cannot_be_tricked() -> None:
    data = json.loads(TOKENIZER.inner.to_str())
    for token in data["added_tokens"]:
        token["special"] = False
    loaded = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))
    assert 2 not in loaded.encode("a<eos>")
    assert loaded.decode([2]) == ""


def test_truncation_and_padding_of_a_file_are_off() -> None:
    inner = tokenizers.Tokenizer.from_str(TOKENIZER.inner.to_str())
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    assert Tokenizer(inner).encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_bad_tokenizer_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(FormeryError, match="tokenizer.json"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FormeryError, match="No such file"):
        Tokenizer.load(tmp_path / "tokenizer.json")


# -------------------------------------------------------------------------------------------- batching


@given(st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=6), st.sampled_from(["left", "right"]))
def test_padding_can_be_undone(rows: list[list[int]], side) -> None:
    tokens, positions = pad(rows, 7, side)
    assert tokens.shape == positions.shape == (len(rows), max(map(len, rows), default=0))
    for row, got, where in zip(rows, tokens, positions, strict=True):
        assert got[where >= 0].tolist() == row
        assert where[where >= 0].tolist() == list(range(len(row)))
        assert (got[where < 0] == 7).all()
        filled = (where < 0).tolist()
        assert filled == sorted(filled, reverse=side == "left")


@given(st.integers(2, 200), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2**40))
def test_windows_cover_a_text_evenly(size: int, length: int, batch_size: int, seed: int) -> None:
    length = min(length, size - 1)
    source = WindowBatches(torch.arange(size, dtype=torch.int32), length, batch_size, seed)
    epochs = batch_size  # so that the last batch ends with the last epoch
    rows = torch.cat([source.batch(step)["tokens"] for step in range(source.windows)])
    assert rows.dtype == torch.long
    assert rows.shape == (epochs * source.windows, length + 1)
    assert ((rows[:, 1:] - rows[:, :-1]) % size == 1 % size).all()
    for epoch in rows.split(source.windows):
        inputs = epoch[:, :-1].flatten().tolist()
        assert len(set(inputs)) == len(inputs) == size // length * length


def test_window_batches_depend_on_seed_and_step_alone_and_change_with_the_epoch() -> None:
    ids = torch.arange(512)
    first, second, other = (WindowBatches(ids, 8, 64, seed) for seed in (1, 1, 2))
    forwards = [first.batch(step)["tokens"] for step in range(9)]
    backwards = [second.batch(step)["tokens"] for step in reversed(range(9))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not torch.equal(forwards[0], other.batch(0)["tokens"])
    assert len({tuple(epoch[:, 0].tolist()) for epoch in forwards}) == 9
    assert len({int(epoch[0, 0]) % 8 for epoch in forwards}) > 2
    assert len({tuple(((epoch[:, 0] - epoch[0, 0]) % 512).tolist()) for epoch in forwards}) == 9


@pytest.mark.parametrize(("size", "length", "batch_size"), [(8, 8, 1), (0, 1, 1), (8, 0, 1), (8, 2, 0)])
def test_windows_that_cannot_be_are_refused(size: int, length: int, batch_size: int) -> None:
    with pytest.raises(FormeryError):
        WindowBatches(torch.arange(size), length, batch_size)


sentence = st.lists(st.integers(1, 99), min_size=1, max_size=20)


@given(
    st.lists(st.tuples(sentence, sentence), min_size=1, max_size=60),
    st.integers(40, 200),
    st.integers(0, 2**40),
)
def test_an_epoch_of_pairs_has_each_once_and_no_batch_too_large(pairs, budget: int, seed: int) -> None:
    source = PairBatches(pairs, budget, pad=0, seed=seed)
    for epoch in range(2):
        seen: Counter = Counter()
        for step in range(epoch * source.batches, (epoch + 1) * source.batches):
            batch = source.batch(step)
            assert batch["source"].numel() + batch["tokens"].numel() <= budget
            rows = zip(
                batch["source"], batch["source_positions"], batch["tokens"], batch["positions"], strict=True
            )
            seen.update((tuple(s[p >= 0].tolist()), tuple(t[q >= 0].tolist())) for s, p, t, q in rows)
        assert seen == Counter((tuple(s), tuple(t)) for s, t in pairs)


def test_pair_batches_depend_on_seed_and_step_alone_and_change_with_the_epoch() -> None:
    pairs = [([i] * (1 + i % 17), [i] * (1 + i % 13)) for i in range(300)]
    first, second, other = (PairBatches(pairs, 200, 0, seed) for seed in (1, 1, 2))
    steps = range(3 * first.batches)
    forwards = [first.batch(step) for step in steps]
    backwards = [second.batch(step) for step in reversed(steps)][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    rows = [len(batch["tokens"]) for batch in forwards]
    assert rows[: first.batches] != rows[first.batches : 2 * first.batches]
    assert [other.batch(step)["tokens"].tolist() for step in steps] != [
        b["tokens"].tolist() for b in forwards
    ]
    epochs = [
        {frozenset(batch["tokens"][:, 0].tolist()) for batch in forwards[start : start + first.batches]}
        for start in (0, first.batches)
    ]
    assert epochs[0] != epochs[1]


def test_pairs_of_like_length_meet_and_batches_are_full() -> None:
    pairs = [([1] * (1 + i % 43), [1] * (1 + i % 37)) for i in range(43 * 37 * 4)]
    source = PairBatches(pairs, 1000, 0)
    batches = [source.batch(step) for step in range(source.batches)]
    sizes = sum(batch["positions"].numel() + batch["source"].numel() for batch in batches)
    filled = sum(
        (batch[key] >= 0).sum().item() for batch in batches for key in ("positions", "source_positions")
    )
    assert filled / sizes > 0.85
    assert sizes / source.batches / 1000 > 0.85


@pytest.mark.parametrize("pairs", [[], [([], [1])], [([1], [])], [([1] * 50, [1] * 60)]])
def test_pairs_that_cannot_be_batched_are_refused(pairs) -> None:
    with pytest.raises(FormeryError):
        PairBatches(pairs, 100, pad=0)


# --------------------------------------------------------------------------------------------- scoring


class Bigram(torch.nn.Module):
    """A model whose prediction hangs on the last token alone, so that no window can change a score."""

    def __init__(self, vocabulary: int, max_length: int | None = None) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(
            torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(0))
        )
        self.max_length = max_length
        self.widest = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        assert not self.training
        self.widest = max(self.widest, tokens.shape[1])
        return self.table[tokens]


def bigram_cost(model: Bigram, ids: list[int]) -> float:
    logs = model.table.detach().double().log_softmax(-1)
    return -sum(logs[a, b].item() for a, b in itertools.pairwise(ids))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=70), max_size=5), st.integers(1, 30))
def test_every_token_is_scored_once(documents: list[list[int]], max_length: int) -> None:
    model = Bigram(10, max_length)
    model.train()
    expected = math.fsum(bigram_cost(model, ids) for ids in documents)
    assert negative_log_likelihood(model, documents) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert model.widest <= max_length
    assert model.training


@given(st.integers(2, 100), st.integers(1, 20), st.data())
def test_windows_score_each_token_once_with_context(size: int, length: int, data) -> None:
    stride = data.draw(st.integers(1, length))
    ids = list(range(size))
    scored = []
    for number, (piece, first) in enumerate(windows(ids, length, stride)):
        assert len(piece) <= length + 1
        assert piece == ids[piece[0] : piece[0] + len(piece)]
        assert number == 0 or first >= length - stride + 1
        scored += piece[first:]
    assert scored == ids[1:]


def test_a_text_costs_the_same_with_any_amount_of_other_texts() -> None:
    model = Bigram(TOKENIZER.vocabulary_size)
    alone = [text_cost(model, TOKENIZER, [text]) for text in CORPUS[:3]]
    assert text_cost(model, TOKENIZER, CORPUS[:3]) == pytest.approx(sum(alone), rel=1e-6)
    ids = TOKENIZER.encode(CORPUS[1])
    assert alone[1] == pytest.approx(bigram_cost(model, [1, *ids]), rel=1e-5)


def test_without_a_bos_the_first_token_costs_as_much_as_any() -> None:
    plain = train_bpe(CORPUS, 300, specials=())
    model = Bigram(plain.vocabulary_size)
    expected = math.log(plain.vocabulary_size) + bigram_cost(model, plain.encode("the cat"))
    assert text_cost(model, plain, ["the cat", ""]) == pytest.approx(expected, rel=1e-5)


def test_no_text_and_no_numbers_are_refused() -> None:
    with pytest.raises(FormeryError, match="no text"):
        text_cost(Bigram(TOKENIZER.vocabulary_size), TOKENIZER, [""])
    with pytest.raises(FormeryError, match="not finite"):
        negative_log_likelihood(lambda tokens: torch.full((*tokens.shape, 5), math.nan), [[1, 2, 3]])


# ----------------------------------------------------------------------------------------------- works


def test_works_are_named_and_say_what_they_measure() -> None:
    assert set(WORKS) - {"long"} == {"code", "translate", "write", "write-shakespeare"}  # that one its file adds
    for name in WORKS:
        made = work(name)
        assert made.name == name
        assert made.metrics == tuple(made.higher_is_better)
        assert made.kind == ("encoder-decoder" if name == "translate" else "decoder")
    with pytest.raises(FormeryError, match="did you mean translate"):
        work("translat")


@pytest.mark.parametrize("name", list(WORKS))
def test_a_split_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(FormeryError, match="no split 'dev'"):
        list(work(name).texts("dev"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(WORKS))
def test_quality_wants_one_output_for_each_example(name: str) -> None:
    for outputs, examples in (([], []), (["a", "b"], [Example("p", "r", "n")])):
        with pytest.raises(FormeryError, match="give one for each"):
            work(name).quality(outputs, examples)


@pytest.fixture(scope="module")
def code() -> Code:
    return Code()


def test_the_code_splits_are_disjoint_and_leave_out_what_is_not_written_by_hand(code: Code) -> None:
    splits = {split: modules(split, code.root) for split in ("train", "valid", "test")}
    everything = [path for paths in splits.values() for path in paths]
    assert len(everything) == len(set(everything)) > 400
    assert len(splits["train"]) / len(everything) > 0.85
    assert all(len(paths) >= 10 for paths in splits.values())
    assert "argparse.py" in everything
    assert not [p for p in everything if {"test", "tests", "site-packages", "encodings"} & set(p.split("/"))]
    assert not [p for p in everything if "_sysconfigdata" in p]
    assert all(len(text.encode()) > 0 for text in code.texts("valid"))


def test_code_examples_are_whole_and_always_the_same(code: Code) -> None:
    examples = code.examples("test", limit=40, seed=3)
    assert examples == Code().examples("test", limit=40, seed=3)
    assert examples[:10] == code.examples("test", limit=10, seed=3)
    assert examples != code.examples("test", limit=40, seed=4)
    sources_of = dict(code.documents("test"))
    for example in examples:
        path, line = example.name.rsplit(":", 1)
        source = sources_of[path]
        assert example.prompt + example.reference in source
        assert len(example.prompt) <= 1500
        begin = source.index(example.prompt + example.reference)
        assert begin == 0 or source[begin - 1] == "\n"
        assert source[: begin + len(example.prompt)].count("\n") + 2 == int(line)
        assert sum(bool(text.strip()) for text in example.reference.split("\n")) >= 3


def test_functions_are_cut_in_their_body() -> None:
    body = "".join(f"    x{i} = {i}\n" for i in range(10))
    source = f'import a\n\ndef f():\n    """Says\n    much."""\n{body}\ndef short():\n    return 1\n'
    assert list(functions(source)) == [
        (source[: source.index("\n    x4")], "\n" + "\n".join(f"    x{i} = {i}" for i in range(4, 10)), 10)
    ]
    assert list(functions('def f():\n    """Only a docstring."""\n')) == []


def test_the_next_line_is_compared_to_the_character(code: Code) -> None:
    example = Example("def f():", "\n\n    return 1  \n    more", "a.py:1")
    assert next_line(example.reference) == "    return 1"
    assert code.quality(["\n    return 1\n"], [example]) == {"next_line_exact": 1.0}
    assert code.quality(["\n   return 1", "\n    return 1"], [example, example]) == {"next_line_exact": 0.5}
    assert code.quality([""], [example]) == {"next_line_exact": 0.0}


def test_bits_per_byte_of_a_model_that_knows_nothing(code: Code) -> None:
    limit = 4
    vocabulary = TOKENIZER.vocabulary_size
    got = code.evaluate(lambda tokens: torch.zeros(*tokens.shape, vocabulary), TOKENIZER, "valid", limit)
    texts = list(code.texts("valid"))[:limit]
    size = sum(len(text.encode()) for text in texts)
    count = sum(len(TOKENIZER.encode(text)) for text in texts)
    assert got["bytes"] == size
    assert got["bits_per_byte"] == pytest.approx(count * math.log2(vocabulary) / size, rel=1e-5)


def test_a_folder_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormeryError, match="no Python modules"):
        list(Code(tmp_path).texts("test"))


def test_repeated_4grams() -> None:
    assert repeated_4grams(list("abc")) == 0
    assert repeated_4grams(list("abcde")) == 0
    assert repeated_4grams(["a"] * 7) == pytest.approx(0.75)


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())


WIKI = (
    " \n = One = \n \n Words here . \n \n = = Part = = \n \n More <unk> words . \n \n = Two = \n \n End . \n"
)


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FORMERY_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path / "cache"))
    pairs = {"en": "A man.\nTwo dogs\x85 run.\n", "de": "Ein Mann.\nZwei Hunde laufen.\n"}
    write_files(
        tmp_path / "data", {f"mt_multi30k/test_2016_flickr.{k}.gz": text for k, text in pairs.items()}
    )
    write_files(tmp_path / "data", {"lm_wikitext2/test.txt.gz": WIKI, "lm_wikitext2/valid.txt": WIKI})
    speeches = "".join(f"SPEAKER {i}:\nTo be, or not to be, that is question {i}.\n\n" for i in range(1000))
    write_files(tmp_path / "data", {"lm_tinyshakespeare/input.txt": speeches})
    return tmp_path


def test_translation_pairs_stay_in_step(small_data: Path) -> None:
    made = work("translate")
    assert list(made.texts("test")) == [("A man.", "Ein Mann."), ("Two dogs\x85 run.", "Zwei Hunde laufen.")]
    names = sorted(e.name for e in made.examples())
    assert names == ["test_2016_flickr:1", "test_2016_flickr:2"]
    write_files(small_data / "data", {"mt_multi30k/test_2016_flickr.de.gz": "Ein Mann.\n"})
    with pytest.raises(FormeryError, match="2 lines, .* has 1"):
        list(made.texts("test"))


def test_translation_quality_is_sacrebleu(small_data: Path) -> None:
    examples = [
        Example("", "Ein Mann geht heute die Straße hinunter.", ""),
        Example("", "Zwei Hunde laufen im Gras.", ""),
    ]
    perfect = work("translate").quality([e.reference for e in examples], examples)
    assert perfect["bleu"] == pytest.approx(100)
    assert perfect["chrf"] == pytest.approx(100)
    assert "tok:13a" in str(perfect["signature"])
    assert "case:mixed" in str(perfect["signature"])
    worse = work("translate").quality(
        ["Ein Mann geht heute die Straße.", "Zwei Hunde laufen im gras."], examples
    )
    assert 20 < float(worse["bleu"]) < 90


def test_wikipedia_articles_are_documents_and_words_are_the_published_ones(small_data: Path) -> None:
    made = work("write")
    documents = list(made.texts("test"))
    assert len(documents) == 2
    assert documents[1].startswith(" = Two = ")
    assert "".join(documents) == WIKI
    assert list(made.texts("valid")) == documents
    vocabulary = TOKENIZER.vocabulary_size
    got = made.evaluate(lambda tokens: torch.zeros(*tokens.shape, vocabulary), TOKENIZER)
    words = len(WIKI.replace("\n", "<eos> ").split())
    assert got["words"] == words
    count = sum(map(len, TOKENIZER.encode_batch(documents)))
    assert got["word_perplexity"] == pytest.approx(vocabulary ** (count / words), rel=1e-5)


def test_shakespeare_is_split_nine_to_one_and_joined_again(small_data: Path) -> None:
    made = work("write-shakespeare")
    text = sources.read("lm_tinyshakespeare/input.txt")
    train, valid = ("".join(made.texts(split)) for split in ("train", "valid"))
    assert train + valid == text
    assert len(train) == len(text) * 9 // 10
    assert len(list(made.texts("train"))) > 5
    examples = made.examples("train", 20)
    assert all(e.prompt + e.reference in train and e.reference.startswith(" ") for e in examples)
    right = made.quality([e.reference for e in examples], examples)
    assert right["next_word_exact"] == 1.0
    assert made.quality(["", *(e.reference for e in examples[1:])], examples)["next_word_exact"] == 0.95
    vocabulary = TOKENIZER.vocabulary_size
    got = made.evaluate(lambda tokens: torch.zeros(*tokens.shape, vocabulary), TOKENIZER, limit=1)
    first = next(made.texts("test"))
    assert got["nats_per_character"] == pytest.approx(
        len(TOKENIZER.encode(first)) * math.log(vocabulary) / len(first)
    )


@real_data
def test_the_published_data_are_read_whole() -> None:
    sizes = {
        split: sum(len(t.split()) + t.count("\n") for t in work("write").texts(split))
        for split in ("valid", "test")
    }
    assert sizes == {"valid": 217_646, "test": 245_569}
    assert [len(list(work("write").texts(split))) for split in ("train", "valid", "test")] == [600, 60, 60]
    assert [len(list(work("translate").texts(split))) for split in ("train", "valid", "test")] == [
        29_000,
        1_014,
        1_000,
    ]
    assert sum(map(len, work("write-shakespeare").texts("train"))) == 1_003_854


@real_data
def test_the_registered_checksums_are_those_of_the_files() -> None:
    for dataset in sources.DATASETS.values():
        for name, checksum in dataset.files.items():
            path = sources.find(f"{dataset.folder}/{name}")
            content = path.read_bytes()
            if path.name != name:
                content = gzip.decompress(content)
            assert hashlib.sha256(content).hexdigest() == checksum, name


# --------------------------------------------------------------------------------------------- sources


def test_absent_data_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORMERY_DATA", raising=False)
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path))
    with pytest.raises(FormeryError, match=r"train\.en\.gz.*formery data get multi30k.*FORMERY_DATA"):
        list(work("translate").texts("train"))
    with pytest.raises(FormeryError, match="formery data get wikitext-2"):
        list(work("write").texts("test"))
    with pytest.raises(FormeryError, match="set FORMERY_DATA"):
        sources.find("other/file")


def test_the_named_folder_comes_before_the_cache(small_data: Path) -> None:
    write_files(small_data / "cache", {"lm_wikitext2/test.txt": "cached", "lm_wikitext2/train.txt": "cached"})
    assert sources.read("lm_wikitext2/test.txt") == WIKI
    assert sources.read("lm_wikitext2/train.txt") == "cached"


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"whole" * 99, mtime=0)[:-9], gzip.compress(b"\xff\xff", mtime=0), b""]
)
def test_a_damaged_file_is_one_sentence(small_data: Path, content: bytes) -> None:
    (small_data / "data/lm_wikitext2/test.txt.gz").write_bytes(content)
    with pytest.raises(FormeryError, match="cannot be read"):
        sources.read("lm_wikitext2/test.txt")


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves /good/one.txt and /good/two.txt, and the ways in which a server can fail."""

    content = {"one.txt": b"first file\n" * 100, "two.txt": b"second file\n"}
    requests: list[str] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        mode, name = self.path.strip("/").split("/")
        body = self.content[name]
        if mode == "missing" and name == "two.txt":
            return self.send_error(404)
        self.send_response(200)
        if mode != "short":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        half = body[: len(body) // 2]
        self.wfile.write({"wrong": b"?" * len(body), "cut": half, "short": half}.get(mode, body))
        return None

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORMERY_DATA", raising=False)
    files = {name: hashlib.sha256(body).hexdigest() for name, body in Handler.content.items()}
    toy = sources.Dataset("toy", "toy_folder", "https://example.org", "http://127.0.0.1:1/none", "CC0", files)
    monkeypatch.setitem(sources.DATASETS, "toy", toy)
    Handler.requests.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.rglob("*") if path.is_file())


def test_a_dataset_is_fetched_once_with_its_licence(tmp_path: Path, server: str) -> None:
    said: list[str] = []
    paths = sources.get("toy", f"{server}/good/", said.append)
    assert [path.read_bytes() for path in paths] == list(Handler.content.values())
    assert sources.read("toy_folder/two.txt") == "second file\n"
    assert "CC0" in said[0]
    assert "https://example.org" in said[0]
    assert kept(tmp_path) == ["one.txt", "two.txt"]
    sources.get("toy", f"{server}/good", said.append)
    assert len(Handler.requests) == 2


def test_a_damaged_copy_is_replaced(tmp_path: Path, server: str) -> None:
    paths = sources.get("toy", f"{server}/good", print)
    paths[0].write_bytes(b"damaged")
    assert sources.get("toy", f"{server}/good", print)[0].read_bytes() == Handler.content["one.txt"]


@pytest.mark.parametrize(
    ("mode", "sentence", "left"),
    [
        ("wrong", "not the published file", []),
        ("short", "not the published file", []),
        ("cut", "cannot fetch", []),
        ("missing", "404", ["one.txt"]),
    ],
)
def test_a_failed_download_leaves_no_half_file(
    tmp_path: Path, server: str, mode: str, sentence: str, left
) -> None:
    with pytest.raises(FormeryError, match=sentence) as caught:
        sources.get("toy", f"{server}/{mode}", print)
    assert f"/{mode}/" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == left


def test_a_failed_download_keeps_what_was_there(tmp_path: Path, server: str) -> None:
    write_files(tmp_path / "cache", {"toy_folder/one.txt": "older"})
    with pytest.raises(FormeryError):
        sources.get("toy", f"{server}/wrong", print)
    assert (tmp_path / "cache/toy_folder/one.txt").read_text() == "older"


def test_no_network_is_one_sentence(tmp_path: Path, server: str) -> None:
    with pytest.raises(
        FormeryError, match=r"cannot fetch http://127.0.0.1:1/none/one.txt .*check the network"
    ):
        sources.get("toy", tell=print)
    with pytest.raises(FormeryError, match="cannot fetch"):
        sources.get("toy", "no-address", print)
    assert kept(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, server: str, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path / "file"))
    with pytest.raises(FormeryError, match="cannot write"):
        sources.get("toy", f"{server}/good", print)


def test_an_unknown_dataset_is_one_sentence() -> None:
    with pytest.raises(FormeryError, match="did you mean multi30k"):
        sources.get("multi30")
