"""Prompts from a file of the user's own."""

import json
import sys
from pathlib import Path
from typing import Any

from formery.data.base import Example
from formery.data.code import functions
from formery.errors import FormeryError


def read_prompts(path: str, lines: bool, cut: bool = False) -> list[Example]:
    """The prompts in a file, or on the standard input where `path` is "-".

    A `.jsonl` file holds an object a line, with "prompt" and, where there is one, "reference". Any other file
    is one prompt, its last line break left out; with `lines`, as for translation, each line that is not blank
    is one. With `cut`, a `.py` file gives a prompt for each function that is long enough to be cut in its
    middle, if it has one. Raises FormeryError when the file cannot be read, is no text, or holds no prompt.
    """
    text = read_text(path)
    if path.endswith(".jsonl"):
        examples = [
            _example(path, number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]
    elif lines:
        examples = [
            Example(line.strip(), "", f"{path}:{number}")
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    else:
        examples = _functions(path, text) if cut and path.endswith(".py") else []
        examples = examples or ([Example(text.removesuffix("\n"), "", path)] if text.strip() else [])
    if not examples:
        raise FormeryError(f"{_shown(path)} holds no prompt: there is no text in it.")
    return examples


def read_text(path: str) -> str:
    """The UTF-8 text of a file, or of the standard input for "-"."""
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return content.decode("utf-8").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise FormeryError(f"there is no file {path} to read prompts from.") from error
    except OSError as error:
        raise FormeryError(f"{_shown(path)} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise FormeryError(f"{_shown(path)} is no text: byte {error.start} is not UTF-8.") from error


def _functions(path: str, text: str) -> list[Example]:
    try:
        return [Example(prompt, rest, f"{path}:{line}") for prompt, rest, line in functions(text)]
    except (SyntaxError, ValueError):
        return []


def _example(path: str, number: int, line: str) -> Example:
    try:
        data: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormeryError(f"line {number} of {_shown(path)} is not JSON: {error}.") from error
    prompt = data.get("prompt") if isinstance(data, dict) else None
    reference = data.get("reference", "") if isinstance(data, dict) else ""
    if not isinstance(prompt, str) or not isinstance(reference, str):
        raise FormeryError(
            f"line {number} of {_shown(path)} should be an object with the text of a prompt: "
            '{"prompt": "...", "reference": "..."}, the reference being optional.'
        )
    return Example(prompt, reference, f"{path}:{number}")


def _shown(path: str) -> str:
    return "the standard input" if path == "-" else path
