"""What a published folder says beside its vocabulary: special tokens by kind, added tokens, chat templates.

It is spread over `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and jinja files, and it is
untrusted: every value has the right type and a bounded size, or a FormeryError names the file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from formery.errors import FormeryError

CONFIG = "tokenizer_config.json"
KINDS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_BYTES, MOST_CONFIG_BYTES, MOST_TEMPLATE_BYTES = 2**29, 2**26, 2**20
MOST_ADDED, MOST_TEMPLATES, LONGEST_NAME, LARGEST_ID = 100_000, 100, 1000, 2**24
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Beside:
    """What stands beside a vocabulary; `told` where any file names special tokens by kind.

    tokens: names by kind, None for one that is said to be missing. added: the tokens that are found in text before
    all else, with the id that they are said to have, or None. maximum_length: in tokens.
    """

    config: dict[str, Any]
    tokens: dict[str, str | None] = field(default_factory=dict)
    added: list[tuple[int | None, AddedToken]] = field(default_factory=list)
    chat_templates: dict[str, str] = field(default_factory=dict)
    maximum_length: int | None = None
    told: bool = False

    def flag(self, name: str, usual: bool = False) -> bool:
        """A yes or no of the configuration, such as `add_bos_token`."""
        value = self.config.get(name)
        if not isinstance(value, bool | None):
            raise FormeryError(f"{CONFIG}: {name} is {value!r}, not true or false.")
        return usual if value is None else value

    def add(self, inner: tokenizers.Tokenizer) -> None:
        """Makes the added tokens known to a tokenizer; those that it knows as such already stay as they are.

        Raises FormeryError where a new token would get another id than it is said to have.
        """
        known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
        for id, token in self.added:
            old = known.get(token.content)
            found = inner.token_to_id(token.content)
            if id is None and (found is None or old is not None):
                continue
            if repr(token) != repr(old):
                inner.add_tokens([token])
                known[token.content] = token
            now = inner.token_to_id(token.content)
            if found is None and now != id:
                raise FormeryError(
                    f"the token {token.content} is said to have the id {id}, but the next one that is free is {now}."
                )


def read_beside(folder: Path) -> Beside:
    """Reads all that a folder says beside its vocabulary; missing files say nothing."""
    config = read_object(folder / CONFIG)
    found = Beside(config)
    _read_kinds(found, config, folder / CONFIG)
    decoder = config.get("added_tokens_decoder")
    if decoder is not None:
        for key, value in _mapping(decoder, "added_tokens_decoder", folder / CONFIG).items():
            id = int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1
            found.added.append((_id(id, key, folder / CONFIG), _token(value, key, folder / CONFIG)))
    else:
        path = folder / "special_tokens_map.json"
        _read_kinds(found, read_object(path), path)
        path = folder / "added_tokens.json"
        special = {name for name in found.tokens.values() if name} | {token.content for _, token in found.added}
        for name, id in _mapping(read_object(path), "it", path).items():
            made = AddedToken(_name(name, name, path), normalized=name not in special, special=name in special)
            found.added.append((_id(id, name, path), made))
    found.added.sort(key=lambda entry: (entry[0] is None, entry[0]))
    length = config.get("model_max_length")
    # Files write some astronomic number where they do not know.
    if isinstance(length, int | float) and not isinstance(length, bool) and 0 < length < 10**9:
        found.maximum_length = int(length)
    found.chat_templates = _templates(folder, config)
    return found


def _read_kinds(found: Beside, data: Mapping[str, Any], path: Path) -> None:
    """The special tokens of one file by kind (the seven usual ones, and a model's own), and the additional ones."""
    for key, value in data.items():
        if key in KINDS or (key.endswith("_token") and isinstance(value, str | dict)):
            found.told = True
            name = None if value in (None, "") else _token(value, key, path).content
            found.tokens[key] = name
            if name is not None:
                found.added.append((None, _token(value, key, path, special=True)))
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = data.get(key)
        if isinstance(more, dict):
            _read_kinds(found, {f"{name.removesuffix('_token')}_token": one for name, one in more.items()}, path)
        elif isinstance(more, list) and len(more) <= MOST_ADDED:
            found.added += [(None, _token(one, key, path, special=True)) for one in more]
        elif more is not None:
            raise FormeryError(f"{path}: {key} is no list of tokens.")


def _token(value: Any, key: str, path: Path, special: bool | None = None) -> AddedToken:
    """An added token, written as its name alone or with how it is to be found in text."""
    if not isinstance(value, dict):
        return AddedToken(_name(value, key, path), normalized=False, special=True)
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if wrong := [flag for flag in flags if not isinstance(flags[flag], bool)]:
        raise FormeryError(f"{path}: {key} has {wrong[0]} {flags[wrong[0]]!r}, not true or false.")
    if special is not None:
        flags["special"] = special
    flags.setdefault("normalized", not flags.get("special", False))
    return AddedToken(_name(value.get("content"), key, path), **flags)


def _name(value: Any, key: str, path: Path) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= LONGEST_NAME or not _is_text(value):
        raise FormeryError(f"{path}: {key} should be the name of a token, which is a text, and not too long a one.")
    return value


def _id(value: Any, key: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST_ID:
        raise FormeryError(f"{path}: {key} has the id {value!r}, which can be none.")
    return value


def _mapping(value: Any, key: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > MOST_ADDED:
        raise FormeryError(f"{path}: {key} is no table of tokens, or too large a one.")
    return value


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates by name; files of their own count before those in the configuration."""
    files = {"default": folder / "chat_template.jinja"} if (folder / "chat_template.jinja").is_file() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in sorted((folder / "chat_templates").glob("*.jinja"))}
    if len(files) > MOST_TEMPLATES:
        raise FormeryError(f"{folder} has {len(files)} chat templates; {MOST_TEMPLATES} at most are read.")
    if files:
        return {name: read_text(path, MOST_TEMPLATE_BYTES) for name, path in files.items()}
    value = config.get("chat_template")
    if value is None:
        return {}
    found = {"default": value}
    if isinstance(value, list) and len(value) <= MOST_TEMPLATES and all(isinstance(one, dict) for one in value):
        found = {one.get("name"): one.get("template") for one in value}
    texts = [*found.keys(), *found.values()]
    if not all(isinstance(one, str) and len(one) <= MOST_TEMPLATE_BYTES and _is_text(one) for one in texts):
        raise FormeryError(f"{folder / CONFIG}: chat_template is neither a text nor a list of named texts.")
    return found


# -------------------------------------------------------------------------------------------------- files


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's bytes; raises FormeryError where it cannot be read or has more than `most` of them."""
    try:
        size = path.stat().st_size
        if size > most:
            raise FormeryError(f"{path} has {size} bytes, more than the {most} that such a file may have.")
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise FormeryError(f"cannot read {path}: {error.strerror or error}.") from error


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """A file's text; raises FormeryError where it cannot be read, is too long or not UTF-8."""
    try:
        return read_bytes(path, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormeryError(f"{path} is not UTF-8 text.") from error


def read_object(path: Path, most: int = MOST_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON file's table, empty where there is no file; raises FormeryError for anything else."""
    if not path.is_file():
        return {}
    try:
        data: Any = json.loads(read_text(path, most))
    except (ValueError, RecursionError) as error:
        raise FormeryError(f"{path} is not readable JSON ({error}).") from error
    if not isinstance(data, dict):
        raise FormeryError(f"{path} holds no table, but a {type(data).__name__}.")
    return data


def read_vocabulary(path: Path) -> dict[str, int]:
    """A `vocab.json`: the id of each piece, each id once."""
    data = read_object(path, MOST_BYTES)
    for name, id in data.items():
        _id(id, repr(name), path)
    if len(set(data.values())) != len(data):
        raise FormeryError(f"{path} gives one id to two pieces.")
    return data


def _is_text(value: str) -> bool:
    """Whether UTF-8 can hold it; JSON can smuggle half a surrogate pair in."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
