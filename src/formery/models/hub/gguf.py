"""From a published folder to a file for llama.cpp, by llama.cpp's own converter.

The converter knows a tokenizer's way of cutting text by the ids that one test sentence gets, which it has on a list for
published tokenizers; the ids of a tokenizer that was trained just now are on no list. What cuts our texts, the regular
expression of GPT-2, is known to llama.cpp all the same, as "gpt-2". So the converter runs as it is, and this one answer
is given in its place, once the tokenizer is found to be like GPT-2's in everything that counts.
"""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from formery.data.published import read_tokenizer
from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError, first_line
from formery.files import atomic_write

SCRIPT = "convert_hf_to_gguf.py"
TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
KNOWN_AS = "gpt-2"
_MODEL = {"type": "BPE", "dropout": None, "unk_token": None, "byte_fallback": False, "ignore_merges": False}
_CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def unlike(tokenizer: Tokenizer) -> str | None:
    """What of a tokenizer is not like GPT-2's, as a part of a sentence; None where ids will be the same."""
    data = json.loads(tokenizer.inner.to_str())
    model, cut = data["model"], data["pre_tokenizer"] or {}
    if model.get("type", "BPE") != "BPE":
        return f"{model['type']} model"
    if wrong := [name for name, value in _MODEL.items() if model.get(name, value) != value]:
        return f"BPE with {wrong[0]} {model[wrong[0]]!r}"
    if wrong := [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]:
        return f"BPE with {wrong[0]} {model[wrong[0]]!r}"
    if data["normalizer"] is not None:
        return f"{data['normalizer']['type']} normalizer"
    if any(cut.get(name) != value for name, value in _CUT.items()):
        return f"{cut.get('type', 'missing')} pre-tokenizer that cuts otherwise than GPT-2's"
    if tokenizer.wraps:
        return f"{data['post_processor']['type']} that puts tokens around a text"
    plain = [one["content"] for one in data["added_tokens"] if not one["special"]]
    return f"added token {plain[0]!r} that is not special" if plain else None


def convert(folder: str | Path, file: str | Path, converter: str | Path, kind: str = "f32") -> Path:
    """Writes the file, whole or not at all; returns it.

    converter: the folder with llama.cpp's sources. kind: how weights are stored, one of `TYPES`. Raises FormeryError
    where there is no converter, where it fails, and for a tokenizer that llama.cpp would follow otherwise.
    """
    folder, file, converter = Path(folder), Path(file), Path(converter)
    if kind not in TYPES:
        raise FormeryError(f"weights are stored as one of {', '.join(TYPES)}, not {kind!r}.")
    if not (converter / SCRIPT).is_file():
        raise FormeryError(f"there is no {SCRIPT} in {converter}; name the folder with llama.cpp's sources.")
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise FormeryError(f"{folder} holds no tokenizer, which a file for llama.cpp needs.")
    if (told := unlike(tokenizer)) is not None:
        raise FormeryError(f"llama.cpp's converter may know this tokenizer, but not from here: a {told}.")
    with atomic_write(file) as temporary:
        command = [sys.executable, "-m", __name__, str(converter.resolve()), str(folder), "--outtype", kind]
        ran = subprocess.run([*command, "--outfile", str(temporary)], capture_output=True, text=True, check=False)
        if ran.returncode:
            last = ran.stderr.strip().rpartition("\n")[2]
            raise FormeryError(f"llama.cpp's converter failed on {folder} ({first_line(Exception(last))}).")
    return file


def _answer(converter: str, arguments: list[str]) -> None:
    """Runs the converter in this process, with the one answer given."""
    sys.path.insert(0, converter)
    sys.argv = [SCRIPT, *arguments]
    script: Any = importlib.import_module(Path(SCRIPT).stem)
    # In older versions the class lies in the script itself.
    home: Any = script if hasattr(script, "TextModel") else importlib.import_module("conversion.base")
    home.TextModel.get_vocab_base_pre = lambda self, tokenizer: KNOWN_AS
    script.main()


if __name__ == "__main__":
    _answer(sys.argv[1], sys.argv[2:])
