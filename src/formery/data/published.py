"""Tokenizers as published model folders hold them: read in their several formats, and written for others to read.

A `tokenizer.json` says everything about ids and is followed to the letter where there is one; older folders hold a
vocabulary only. The names of special tokens and the chat templates stand beside it. All files are untrusted.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from formery.data.tokenizer import Tokenizer, library_errors
from formery.data.tokens import CONFIG, read_beside, read_text
from formery.data.vocabularies import from_vocabulary
from formery.files import atomic_write

TOKENIZER = "tokenizer.json"


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a published folder, or None where it holds none.

    Read from `tokenizer.json`, else `vocab.json` and `merges.txt`, else Marian's three files, else `vocab.txt`, else
    a sentencepiece model. Raises FormeryError for files that are damaged, of wrong types, too large, or of a class
    that is not known.
    """
    folder = Path(folder)
    beside = read_beside(folder)
    with library_errors(f"the tokenizer in {folder} cannot be used"):
        if (folder / TOKENIZER).is_file():
            inner = tokenizers.Tokenizer.from_str(read_text(folder / TOKENIZER))
            beside.add(inner)
        elif (found := from_vocabulary(folder, beside)) is not None:
            inner = found
        else:
            return None
        tokens = beside.tokens if beside.told else None
        return Tokenizer(inner, tokens, beside.chat_templates, beside.maximum_length).tried()


def write_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes `tokenizer.json` and `tokenizer_config.json`, from which `read_tokenizer` and others make its equal."""
    folder = Path(folder)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.tokens
    if any(tokenizer.pair("", "")[1]):
        # The generic class leaves away which of two texts a token is of, unless told.
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    if tokenizer.maximum_length is not None:
        config["model_max_length"] = tokenizer.maximum_length
    templates = tokenizer.chat_templates
    if list(templates) == ["default"]:
        config["chat_template"] = templates["default"]
    elif templates:
        config["chat_template"] = [{"name": name, "template": template} for name, template in templates.items()]
    tokenizer.save(folder / TOKENIZER)
    with atomic_write(folder / CONFIG) as temporary:
        temporary.write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
