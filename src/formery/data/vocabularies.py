"""Tokenizers made from a vocabulary alone, as folders without a `tokenizer.json` hold it.

The files tell the pieces; how a text is split and which tokens are put around it follows from the class that the
folder names. Only classes whose layout is known are read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from formery.data.pieces import Pieces, fairseq, marian, plain, read_pieces
from formery.data.tokens import CONFIG, Beside, read_bytes, read_object, read_text, read_vocabulary
from formery.errors import FormeryError

_END = "<|endoftext|>"
GPT2 = {"bos_token": _END, "eos_token": _END, "unk_token": _END}
ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}
BERT = {
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
MARIAN = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
# The layouts, each with the classes and model types that have it.
FAMILIES = {
    "gpt2": "GPT2 CodeGen gpt2 opt gpt_neo gptj codegen",
    "roberta": "Roberta Bart Longformer LED Mvp roberta bart longformer led mvp",
    "whisper": "Whisper whisper",
    "bert": "Bert DistilBert Electra MobileBert ConvBert SqueezeBert bert distilbert electra mobilebert convbert",
    "t5": "T5 MT5 t5 mt5",
    "xlm-roberta": "XLMRoberta xlm-roberta",
    "marian": "Marian marian",
    "llama": "Llama CodeLlama Gemma llama mistral mixtral gemma gemma2",
}
SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")


def from_vocabulary(folder: Path, beside: Beside) -> tokenizers.Tokenizer | None:
    """The tokenizer of a folder without `tokenizer.json`, None where there is no vocabulary either.

    Adds to `beside` the names of special tokens that the class takes for granted. Raises FormeryError for files that
    are damaged or of a class that is not known.
    """
    has = {name for name in ("vocab.json", "merges.txt", "vocab.txt", "source.spm") if (folder / name).is_file()}
    models_here = [folder / name for name in SENTENCEPIECE if (folder / name).is_file()]
    if not (has & {"vocab.txt", "source.spm"} or has >= {"vocab.json", "merges.txt"} or models_here):
        return None
    family = _family(folder, beside.config)
    if has >= {"vocab.json", "merges.txt"}:
        vocabulary = read_vocabulary(folder / "vocab.json")
        family = family or ("roberta" if {"<s>", "</s>", "<mask>"} <= vocabulary.keys() else "gpt2")
        if family in ("gpt2", "roberta", "whisper"):
            return _byte_level(vocabulary, _merges(folder / "merges.txt"), family, beside)
    if "source.spm" in has and family in (None, "marian"):
        return _marian(folder, beside)
    if "vocab.txt" in has and family in (None, "bert"):
        return _word_pieces(read_text(folder / "vocab.txt"), beside)
    if models_here and family in (None, "llama", "t5", "xlm-roberta"):
        model = read_pieces(models_here[0], read_bytes(models_here[0]))
        return _sentence_pieces(model, family, beside)
    raise FormeryError(f"{folder}: a tokenizer of the kind {family} is not read from the files that are there.")


def _family(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The layout of the class that a folder names, None where it names none."""
    named = config.get("tokenizer_class")
    if not isinstance(named, str):
        named = read_object(folder / "config.json").get("model_type")
    if not isinstance(named, str) or named.startswith(("PreTrainedTokenizer", "TokenizersBackend")):
        return None
    short = named.removesuffix("Fast").removesuffix("Tokenizer")
    for family, members in FAMILIES.items():
        if short in members.split():
            return family
    raise FormeryError(
        f"{folder}: a tokenizer of the class {named} is only read from a tokenizer.json, which is missing; "
        "save it once with the library that it comes from."
    )


def _byte_level(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], family: str, beside: Beside
) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2, 2019), as RoBERTa, BART, OPT and Whisper use it too."""
    inner = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=beside.flag("add_prefix_space"))
    inner.decoder = decoders.ByteLevel()
    names = _names(inner, beside, ROBERTA if family == "roberta" else GPT2)
    if family == "roberta":
        end = names["sep_token"]
        return _wrap(inner, [names["cls_token"]], [end], [end, end])
    if family == "whisper":
        begin = [name for name in ("<|startoftranscript|>", "<|notimestamps|>") if inner.token_to_id(name) is not None]
        return _wrap(inner, begin, [names["eos_token"]], [])
    return _mark(inner, names, beside)


def _word_pieces(text: str, beside: Beside) -> tokenizers.Tokenizer:
    """The word pieces of BERT (Devlin et al. 2019), one a line."""
    lines = text.removesuffix("\n").split("\n")
    vocabulary = {line.removesuffix("\r"): id for id, line in enumerate(lines)}
    unknown = beside.tokens.get("unk_token") or BERT["unk_token"]
    inner = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    inner.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=beside.flag("tokenize_chinese_chars", usual=True),
        # Not told means: as the lower-casing.
        strip_accents=None if beside.config.get("strip_accents") is None else beside.flag("strip_accents"),
        lowercase=beside.flag("do_lower_case", usual=True),
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece(prefix="##")
    names = _names(inner, beside, BERT)
    return _wrap(inner, [names["cls_token"]], [names["sep_token"]], [names["sep_token"]], second=1)


def _marian(folder: Path, beside: Beside) -> tokenizers.Tokenizer:
    """Marian's translators: the source's sentencepiece model cuts, the vocabulary of both sides gives the ids."""
    if beside.flag("separate_vocabs"):
        raise FormeryError(f"{folder} has one vocabulary for each side; only shared ones are read.")
    model = read_pieces(folder / "source.spm", read_bytes(folder / "source.spm"))
    inner = marian(model, read_vocabulary(folder / "vocab.json"), folder / "vocab.json")
    names = _names(inner, beside, MARIAN)
    return _wrap(inner, [], [names["eos_token"]], [])


def _sentence_pieces(model: Pieces, family: str | None, beside: Beside) -> tokenizers.Tokenizer:
    """A sentencepiece model, with the ids that T5, XLM-R or Llama give its pieces."""
    if family == "xlm-roberta":
        inner = fairseq(model)
        _names(inner, beside, ROBERTA)
        return _wrap(inner, ["<s>"], ["</s>"], ["</s>", "</s>"])
    if family == "t5":
        count = beside.config.get("extra_ids", 100)
        if not isinstance(count, int) or not 0 <= count <= 10_000:
            raise FormeryError(f"{CONFIG}: extra_ids is {count!r}, not a number of tokens.")
        inner = plain(model, [f"<extra_id_{i}>" for i in reversed(range(count))])
        names = _names(inner, beside, model.names)
        return _wrap(inner, [], [names["eos_token"]], [names["eos_token"]])
    inner = plain(model)
    return _mark(inner, _names(inner, beside, model.names), beside)


def _merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a `merges.txt`, best first."""
    found = []
    for number, line in enumerate(read_text(path).removesuffix("\n").split("\n"), start=1):
        if line.startswith("#version"):
            continue
        left, space, right = line.removesuffix("\r").partition(" ")
        if not (left and space and right) or " " in right:
            raise FormeryError(f"{path}, line {number}: {line[:80]!r} is no merge, which is two pieces.")
        found.append((left, right))
    return found


def _names(inner: tokenizers.Tokenizer, beside: Beside, usual: Mapping[str, str]) -> dict[str, str]:
    """The names of the special tokens, as told or as usual; makes all added tokens known to `inner`."""
    beside.tokens = {**usual, **beside.tokens}
    beside.told = True
    beside.add(inner)
    return {kind: name or usual.get(kind, "") for kind, name in beside.tokens.items()}


def _mark(inner: tokenizers.Tokenizer, names: Mapping[str, str], beside: Beside) -> tokenizers.Tokenizer:
    """Puts the start and the end of a text where the configuration asks for them."""
    start = [names.get("bos_token", "<s>")] if beside.flag("add_bos_token") else []
    end = [names.get("eos_token", "</s>")] if beside.flag("add_eos_token") else []
    return _wrap(inner, start, end, [*end, *start], second=1)


def _wrap(
    inner: tokenizers.Tokenizer, start: list[str], end: list[str], between: list[str], second: int = 0
) -> tokenizers.Tokenizer:
    """Makes `inner` write `start A end`, and `start A between B end` for a pair, whose B has the type `second`."""
    ids = {name: inner.token_to_id(name) for name in sorted({*start, *end, *between})}
    if missing := [name for name, id in ids.items() if id is None]:
        raise FormeryError(f"the vocabulary lacks {missing[0]}, which belongs to each text.")

    def marks(names: list[str], kind: int) -> list[str]:
        return [f"{name}:{kind}" for name in names]

    inner.post_processor = processors.TemplateProcessing(
        single=[*marks(start, 0), "$A:0", *marks(end, 0)],
        pair=[*marks(start, 0), "$A:0", *marks(between, 0), f"$B:{second}", *marks(end, second)],
        special_tokens=list(ids.items()),
    )
    return inner
