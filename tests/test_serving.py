"""Models that leave: what an engine serves is what we compute, and what it would serve wrong is refused by name."""

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from published import DECODERS, SPECS, YARN, is_pair, randomised, tokens
from torch import Tensor

import formery
from formery.__main__ import main
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.models.compose import language_model
from formery.models.hub.engines import ENGINES
from formery.models.hub.gguf import convert, unlike
from formery.parts import Alibi

VOCABULARY = 320
TEXT = [Path(formery.__file__).with_name(name).read_text() for name in ("files.py", "errors.py")]
PROMPTS = ["def mean(values):\n", "class Stack:\n    def push(self, item):\n", "import os\n\nfor name in os.listdir("]
CONVERTER = os.environ.get("FORMERY_LLAMA_CPP", "")
# What is asked of a family beyond the small models that are published for the other tests.
CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-wide-heads": ("llama", {"head_dim": 16}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-loud": ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
    "mistral-wide-window": ("mistral", {"sliding_window": 160}),
    "mixtral-full": ("mixtral", {"sliding_window": None}),
    "gpt2-unscaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt2-epsilon": ("gpt2", {"layer_norm_epsilon": 1e-2}),
    "gpt2-narrow": ("gpt2", {"n_inner": 40}),
    "qwen3-biased": ("qwen3", {"attention_bias": True}),
    "gemma2-uncapped": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "mamba2-bounded": ("mamba2", {"time_step_limit": [0.1, 0.2]}),
    "olmoe-all-heads": ("olmoe", {"num_key_value_heads": 4}),
    "olmoe-normalised": ("olmoe", {"num_key_value_heads": 4, "norm_topk_prob": True}),
    "t5-epsilon": ("t5", {"layer_norm_epsilon": 1e-2}),
}
NAMES = [*SPECS, *CHANGED]
SERVED = {
    "ctranslate2": {
        "bart", "bloom", "gpt2", "gpt2-narrow", "llama", "llama-linear", "marian", "marian-apart", "mistral-full",
        "mistral-wide-window", "opt", "opt-350m", "qwen2", "qwen3", "qwen3-biased", "t5",
    },
    "llama.cpp": {
        "bloom", "gpt2", "gpt2-epsilon", "llama", "llama-linear", "llama-tied-biased", "llama-wide-heads", "llama-yarn",
        "llama3", "mamba2", "mistral-full", "mistral-wide-window", "mixtral-full", "olmoe-all-heads", "qwen2", "qwen3",
        "qwen3-yarn",
    },
    "vllm": {*DECODERS, *(name for name, (of, _) in CHANGED.items() if of in DECODERS)}
    - {"gpt2-scaled", "gpt2-unscaled", "llama-gelu", "mamba2-bounded", "qwen2-windows"},
}  # fmt: skip


@pytest.fixture(scope="module")
def padded_last() -> Tokenizer:
    """A tokenizer as a Marian's, whose last token is the padding."""
    tokenizer = train_bpe(TEXT, VOCABULARY - 1, specials=("<bos>", "<eos>"))
    tokenizer.inner.add_special_tokens([tokenizers.AddedToken("<pad>", normalized=False, special=True)])
    return Tokenizer(tokenizer.inner)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return train_bpe(TEXT, VOCABULARY)


@pytest.fixture
def made(plain: Tokenizer, padded_last: Tokenizer, tmp_path: Path) -> Callable[[str], Any]:
    """Makes a small published model with a tokenizer."""

    def made(name: str) -> Any:
        of, changes = CHANGED.get(name, (name, {}))
        tokenizer = padded_last if of.startswith("marian") else plain
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
        if is_pair(of):
            ends["decoder_start_token_id"] = tokenizer.eos if of.startswith("bart") else tokenizer.pad
        sizes = {"vocab_size": VOCABULARY, "decoder_vocab_size": VOCABULARY} if of == "marian-apart" else {}
        settings = {**SPECS[of].settings, "vocab_size": VOCABULARY, **sizes, **ends, **changes}
        spec = replace(SPECS[of], settings=settings)
        torch.manual_seed(0)
        theirs = randomised(getattr(transformers, spec.kind)(spec.config), spec.seed)
        if spec.generation:
            theirs.generation_config.update(**spec.generation)
        theirs.save_pretrained(tmp_path / "theirs")
        model = formery.load(tmp_path / "theirs")
        model.tokenizer = tokenizer
        if of.startswith("marian"):
            with torch.no_grad():  # no random weights, but what every Marian has
                model.encoder.embedding.weight[-1] = model.decoder.embedding.weight[-1] = 0
        return model

    return made


@torch.no_grad()
def likelihoods(model: Any, source: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        return model(source).log_softmax(-1)
    begun = torch.cat([torch.full((len(target), 1), model.start_token), target], 1)[:, :-1]
    logits = model(source, begun)
    if model.origin == "MarianMTModel":
        logits[..., -1] = -torch.inf
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def words(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[str(tokenizer.inner.id_to_token(token)) for token in row] for row in rows]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", NAMES)
def test_served_or_refused(name: str, made: Callable[[str], Any], tmp_path: Path) -> None:
    model = made(name)
    for engine, served in SERVED.items():
        out = tmp_path / engine
        if name in served:
            assert formery.export(model, out, engine=engine) == out
        else:
            sentence = rf"^{ENGINES[engine].title} cannot serve this model as it is: .+\.$"
            with pytest.raises(formery.FormeryError, match=sentence):
                formery.export(model, out, engine=engine)
    assert {one.name for one in tmp_path.iterdir()} == {"theirs", *(one for one in SERVED if name in SERVED[one])}


@pytest.mark.parametrize(
    ("name", "engine", "sentence"),
    [
        ("mistral", "llama.cpp", r"no notion of Window\(size=7\) at layers\.0\.sublayers\.0\.inner\.mask\.right\."),
        ("llama-gelu", "ctranslate2", r"of GatedMLP\(activation='gelu'\) at layers\.0\.sublayers\.1\.inner\."),
        ("mamba2", "ctranslate2", r"no notion of Mamba2\(\) at layers\.0\.sublayers\.0\.inner\."),
        ("gpt2-scaled", "vllm", r"no notion of Attention\(scale=0\.17.*\) at layers\.1\.sublayers\.0\.inner\."),
        ("llama3", "ctranslate2", r"Llama3Scaling\(\) at layers\.0\.sublayers\.0\.inner\.position\.scaling\."),
        ("t5", "vllm", r"EncoderDecoder is exported as t5, and what is known to work is gpt2, .+\."),
        ("bart-forced", "ctranslate2", r"first tokens that are forced \(\[0\]\)\."),
        ("mixtral-full", "ctranslate2", r"no notion of Experts\(\) at layers\.0\.sublayers\.1\.inner\."),
    ],
)
def test_the_part_is_named(name: str, engine: str, sentence: str, made: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(formery.FormeryError, match=sentence):
        formery.export(made(name), tmp_path / "out", engine=engine)


def test_what_the_whole_lacks(made: Callable[[str], Any], padded_last: Tokenizer, tmp_path: Path) -> None:
    def refused(engine: str, sentence: str) -> None:
        with pytest.raises(formery.FormeryError, match=sentence):
            formery.export(model, tmp_path / "out", engine=engine)
        assert not (tmp_path / "out").exists()

    model = made("gpt2")
    short = train_bpe(TEXT, VOCABULARY - 10)
    model.tokenizer = short
    refused("ctranslate2", "310 tokens do not fill the embedding's 320 rows")
    model.tokenizer = train_bpe(TEXT, VOCABULARY + 1)
    refused("vllm", "the tokenizer has 321 tokens, and the embedding 320")
    model.tokenizer = None
    refused("vllm", "it needs a tokenizer")
    model = made("llama")
    model.conventions = replace(model.conventions, stop=(2, 5))
    refused("llama.cpp", r"with one token, and here it may with \[2, 5\]")
    model.conventions = replace(model.conventions, stop=(2,), suppressed=(7,))
    refused("vllm", r"tokens that are never written \(\[7\]\)")
    model = made("marian")
    with torch.no_grad():
        model.encoder.embedding.weight[-1, 3] = 1
    refused("ctranslate2", "the last row should be <pad>, begin a text, and be zero")


def test_a_model_that_no_folder_can_hold_tells_which_part(tmp_path: Path) -> None:
    sentence = r"for the nearest, BART, encoder\.layers\.0\.sublayers\.1\.inner is GatedMLP, which has no place there;"
    with pytest.raises(formery.FormeryError, match=sentence):
        formery.export(formery.load("translate"), tmp_path / "out")
    model = language_model(300, width=16, layers=2, heads=2, key_value_heads=1, hidden=32, max_length=64)
    model.layers[1].sublayers[0].inner.position = Alibi()
    with pytest.raises(formery.FormeryError, match=r"layers\.1\.sublayers\.0\.inner\.position is Alibi, not Rotary;"):
        formery.export(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_the_command_line_tells_what_to_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plain: Tokenizer
) -> None:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(one) for one in arguments])
        return int(str(stopped.value.code)), *capsys.readouterr()

    model = language_model(VOCABULARY, width=16, layers=1, heads=2, key_value_heads=1, hidden=32, max_length=64)
    model.tokenizer = plain
    formery.save(model, tmp_path / "ours")
    out = tmp_path / "a folder"
    for engine, told in {
        "vllm": f"vllm serve '{out}'\n",
        "llama.cpp": f"formery gguf '{out}' '{out}.gguf' --converter path/to/llama.cpp\n"
        f"llama-server --model '{out}.gguf'\n",
        "ctranslate2": f"ct2-transformers-converter --model '{out}' --output_dir '{out}-ctranslate2' "
        "--quantization float32\n",
    }.items():
        assert run("export", tmp_path / "ours", out, "--for", engine) == (0, told, f"written: {out}\n")
    code, told, wrong = run("export", tmp_path / "ours", tmp_path / "new", "--for", "vlm")
    assert (code, told) == (2, "") and "did you mean vllm?" in wrong and not (tmp_path / "new").exists()
    code, told, wrong = run("export", "translate", tmp_path / "new", "--for", "ctranslate2")
    assert (code, told) == (2, "") and "which has no place there" in wrong and not (tmp_path / "new").exists()
    code, told, wrong = run("gguf", out, tmp_path / "new.gguf", "--converter", tmp_path)
    assert (code, told) == (2, "") and "there is no convert_hf_to_gguf.py" in wrong
    assert not (tmp_path / "new.gguf").exists()


def test_tokenizers_that_are_not_cut_as_by_gpt2(plain: Tokenizer) -> None:
    def told(change: Callable[[tokenizers.Tokenizer], Any]) -> str | None:
        inner = tokenizers.Tokenizer.from_str(plain.inner.to_str())
        change(inner)
        return unlike(Tokenizer(inner))

    split = tokenizers.pre_tokenizers.Whitespace()
    around = tokenizers.processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    assert told(lambda inner: None) is None
    assert "Whitespace" in str(told(lambda inner: setattr(inner, "pre_tokenizer", split)))
    assert "NFC" in str(told(lambda inner: setattr(inner, "normalizer", tokenizers.normalizers.NFC())))
    assert "around a text" in str(told(lambda inner: setattr(inner, "post_processor", around)))
    assert "'shall'" in str(told(lambda inner: inner.add_tokens(["shall"])))
    assert "missing" in str(told(lambda inner: setattr(inner, "pre_tokenizer", None)))
    assert unlike(Tokenizer(tokenizers.Tokenizer(tokenizers.models.Unigram([("a", 0.0)])))) == "Unigram model"


# ---------------------------------------------------------------------------------------------------------- CTranslate2


@pytest.fixture(scope="module")
def ctranslate2() -> Any:
    return pytest.importorskip("ctranslate2")


def for_ctranslate2(model: Any, folder: Path) -> str:
    """The model exported, and converted by its own converter."""
    from ctranslate2.converters import TransformersConverter

    formery.export(model, folder, engine="ctranslate2", dtype=torch.float32)
    return str(TransformersConverter(str(folder)).convert(f"{folder}-ctranslate2", quantization="float32"))


@pytest.mark.parametrize("name", sorted(SERVED["ctranslate2"]))
def test_ctranslate2_computes_the_same(name: str, ctranslate2: Any, made: Callable[[str], Any], tmp_path: Path) -> None:
    model = made(name)
    place = for_ctranslate2(model, tmp_path / "out")
    source = tokens(2, 40)
    read = words(model.tokenizer, source.tolist())
    target = tokens(2, 24, 1) if is_pair(CHANGED.get(name, (name, {}))[0]) else None
    if target is None:
        found = ctranslate2.Generator(place, compute_type="float32").forward_batch(read)
        theirs = torch.from_numpy(np.array(found))[..., :VOCABULARY].log_softmax(-1)
    else:
        scores = ctranslate2.Translator(place, compute_type="float32")
        scored = scores.score_batch(read, words(model.tokenizer, target.tolist()))
        theirs = torch.tensor([one.log_probs[:-1] for one in scored])
    torch.testing.assert_close(theirs, likelihoods(model, source, target), rtol=0, atol=3e-4)


def test_ctranslate2_writes_the_same_code(ctranslate2: Any, tmp_path: Path) -> None:
    model = formery.load("code")
    generator = ctranslate2.Generator(for_ctranslate2(model, tmp_path / "out"), compute_type="float32")
    prompts = words(model.tokenizer, [model.tokenizer.prompt(one) for one in PROMPTS])
    found = generator.generate_batch(prompts, beam_size=1, max_length=48, include_prompt_in_result=False)
    assert [one.sequences_ids[0] for one in found] == greedily(model)


def greedily(model: Any) -> list[list[int]]:
    return [[*one.tokens] for one in formery.generate(model, PROMPTS, method="greedy", max_new_tokens=48)]


# ------------------------------------------------------------------------------------------------------------ llama.cpp


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    if not CONVERTER:
        pytest.skip("FORMERY_LLAMA_CPP names no folder with llama.cpp's sources")
    library = pytest.importorskip("llama_cpp")
    library.silent = library.llama_log_callback(lambda level, text, data: None)  # kept as long as the library
    library.llama_log_set(library.silent, ctypes.c_void_p(0))
    return library


def for_llama_cpp(model: Any, folder: Path) -> Path:
    """The model exported, and converted by its own converter."""
    formery.export(model, folder, engine="llama.cpp", dtype=torch.float32)
    return convert(folder, f"{folder}.gguf", CONVERTER)


def opened(llama_cpp: Any, file: Path, **more: Any) -> Any:
    """The model with keys and values in float32: as it comes, it keeps them in half precision."""
    return llama_cpp.Llama(str(file), n_ctx=512, type_k=0, type_v=0, flash_attn=False, verbose=False, **more)


@pytest.mark.parametrize("name", sorted(SERVED["llama.cpp"]))
def test_llama_cpp_computes_the_same(name: str, llama_cpp: Any, made: Callable[[str], Any], tmp_path: Path) -> None:
    model = made(name)
    one = tokens(1, 40)
    program = opened(llama_cpp, for_llama_cpp(model, tmp_path / "out"), logits_all=True)
    program.eval(one[0].tolist())
    theirs = torch.from_numpy(np.array(program.scores[:40])).log_softmax(-1)
    # It looks GELU up in a table of half precision.
    atol = 2e-3 if name.startswith(("gpt2", "bloom")) else 3e-4
    torch.testing.assert_close(theirs, likelihoods(model, one, None)[0], rtol=0, atol=atol)


def test_llama_cpp_reads_and_writes_the_same_code(llama_cpp: Any, tmp_path: Path) -> None:
    model = formery.load("code")
    program = opened(llama_cpp, for_llama_cpp(model, tmp_path / "out"))
    sources = [path.read_text() for path in sorted(Path(formery.__file__).parent.glob("*.py"))]
    odd = "it's  \t\n\n 12 ½ Ünï  \u2003\u00a0x नमस्ते 你好 🤷🏽 <eos> ''"
    for text in [*PROMPTS, *sources, odd]:
        assert program.tokenize(text.encode(), add_bos=False, special=False) == model.tokenizer.encode(text)
    found = []
    for prompt in PROMPTS:
        read = program.tokenize(prompt.encode(), special=False)
        writing = program.generate(read, temp=0.0, top_k=1, repeat_penalty=1.0)
        found.append([token for token, _ in zip(writing, range(48), strict=False)])
    assert [row[: row.index(2)] if 2 in row else row for row in found] == greedily(model)
