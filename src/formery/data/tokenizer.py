"""Text to token ids and back: a thin, strict wrapper around the `tokenizers` library.

What a user types is only ever text. A document that contains the letters "<eos>" is encoded as those letters
and never as the token that ends a sequence, so that no prompt can forge one.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from formery.errors import FormeryError
from formery.files import atomic_write

SPECIALS = ("<pad>", "<bos>", "<eos>")
# The first name that a vocabulary holds counts; our own come first, then those that published models use.
NAMES = {
    "pad": ("<pad>", "[PAD]", "<|pad|>"),
    "bos": ("<bos>", "<s>", "<|begin_of_text|>", "<|endoftext|>"),
    "eos": ("<eos>", "</s>", "<|end_of_text|>", "<|endoftext|>"),
}


def byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: which byte each printable stand-in character means (GPT-2, 2019)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Tokenizer:
    """Turns text into ids and ids into text; everything that decides an id is in one `tokenizer.json`.

    tokens: the names of the special tokens as published files give them (`{"bos_token": "<s>", ...}`, None for
    one that is said to be missing). `bos`, `eos` and `pad` are their ids; a kind that `tokens` does not tell is
    found by its name (`<bos>`, `<eos>`, `<pad>`, or the names that published models use), or None.
    chat_templates: by name, the usual one is called "default". maximum_length: in tokens, None where not known.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        tokens: Mapping[str, str | None] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        maximum_length: int | None = None,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        given = dict(tokens or {})
        known = {
            kind: [name for name in names if inner.token_to_id(name) is not None]
            for kind, names in NAMES.items()
            if f"{kind}_token" not in given
        }
        named = {name for names in known.values() for name in names}
        named |= {name for name in given.values() if name and inner.token_to_id(name) is not None}
        already = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
        # A file may list them as plain tokens; only those marked special are never made from user text.
        inner.add_special_tokens(
            [tokenizers.AddedToken(n, normalized=False, special=True) for n in sorted(named - already)]
        )
        inner.encode_special_tokens = True
        _cut_names(inner)
        self.inner = inner
        found = given | {f"{kind}_token": names[0] if names else None for kind, names in known.items()}
        self.tokens: dict[str, str | None] = {k: v for k, v in found.items() if v} if tokens is None else given
        ids = {kind: inner.token_to_id(name) if name else None for kind, name in found.items()}
        self.bos: int | None = ids["bos_token"]
        self.eos: int | None = ids["eos_token"]
        self.pad: int | None = ids["pad_token"]
        templates = dict(chat_templates or {})
        self.chat_templates = {k: templates[k] for k in sorted(templates, key=lambda name: name != "default")}
        self.maximum_length = maximum_length

    @property
    def chat_template(self) -> str | None:
        """The template that `chat` follows (jinja), None where the model is not made for chats."""
        return self.chat_templates.get("default")

    @property
    def wraps(self) -> bool:
        """Whether `prompt` adds tokens around a text."""
        return self.inner.num_special_tokens_to_add(False) > 0

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id: the width that a model's embedding needs."""
        return max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def digest(self) -> str:
        """sha256 of the json; two tokenizers of one digest give the same ids for the same text."""
        return hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    @cached_property
    def special(self) -> frozenset[int]:
        """The ids that stand for no text."""
        return frozenset(i for i, token in self.inner.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added; raises FormeryError for text that UTF-8 cannot hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, on all cores."""
        checked = [unicode_text(text) for text in texts]
        with library_errors("the tokenizer cannot encode this text"):
            return [e.ids for e in self.inner.encode_batch_fast(checked, add_special_tokens=False)]

    def prompt(self, text: str, max_length: int | None = None) -> list[int]:
        """The ids of `text` as its model expects a whole text: `<s>` in front, `[CLS]` and `[SEP]` around it, ...

        max_length: of all ids; the text loses its end for it, never what is around it.
        """
        with library_errors("the tokenizer cannot encode this text"):
            return self._wrapped(max_length, unicode_text(text)).ids

    def pair(self, first: str, second: str, max_length: int | None = None) -> tuple[list[int], list[int]]:
        """The ids of two texts that a model reads as a pair, and for each id which text it belongs to (0 or 1).

        max_length: of all ids; the longer text loses its end for it, and where they are even, both do.
        """
        with library_errors("the tokenizer cannot encode this pair"):
            both = self._wrapped(max_length, unicode_text(first), unicode_text(second))
        return both.ids, both.type_ids

    def _wrapped(self, max_length: int | None, first: str, second: str | None = None) -> tokenizers.Encoding:
        """One text or two, and what belongs around them, in no more tokens than `max_length` where that can be."""
        whole = self.inner.encode(first, second)
        if max_length is None or len(whole) <= max_length:
            return whole
        # The library's own truncation is a setting of the tokenizer, which others may be using at the same time.
        one = self.inner.encode(first, add_special_tokens=False)
        other = None if second is None else self.inner.encode(second, add_special_tokens=False)
        room = max(0, max_length - self.inner.num_special_tokens_to_add(other is not None))
        if other is not None:
            # The shorter text keeps all that it has, up to half of the room.
            less = min(len(one), len(other), room // 2)
            more = room - less
            room, rest = (more, less) if len(one) > len(other) else (less, more)
            other.truncate(rest)
        one.truncate(room)
        return self.inner.post_process(one, other)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The ids of a conversation, laid out by the chat template; see `formery.data.chat.encode_chat`."""
        from formery.data.chat import encode_chat

        return encode_chat(self, messages, add_generation_prompt)

    @cached_property
    def trusting(self) -> tokenizers.Tokenizer:
        """A twin that reads the names of special tokens as these tokens: for templates, never for a user's text."""
        return tokenizers.Tokenizer.from_str(self.inner.to_str())

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens, and ids outside of the vocabulary, leave no text."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token_text(self, id: int) -> str:
        """One token, to look at: its text, a special token's name, `\\xNN` for a byte of a cut character."""
        token = self.inner.id_to_token(id) if id >= 0 else None
        if token is None:
            raise FormeryError(f"there is no token {id}; the vocabulary has the ids 0 to {self.vocabulary_size - 1}.")
        if id in self.special or not isinstance(self.inner.decoder, decoders.ByteLevel):
            return token.replace("▁", " ")
        alphabet = byte_of_character()
        if not all(character in alphabet for character in token):
            return token
        return bytes(alphabet[character] for character in token).decode("utf-8", "backslashreplace")

    def save(self, path: str | Path) -> None:
        """Writes the `tokenizer.json`, whole or not at all."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.inner.to_str(pretty=True), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`; raises FormeryError when there is none, or it is not one."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise FormeryError(f"cannot read the tokenizer {path}: {reason}.") from error
        with library_errors(f"{path} is not a tokenizer.json that can be used"):
            return cls(tokenizers.Tokenizer.from_str(text)).tried()

    def tried(self) -> "Tokenizer":
        """Itself, once it has shown that it works: what a file's post-processor lacks only shows in use."""
        self.inner.encode("")
        self.inner.encode("", "")
        return self


@contextmanager
def library_errors(sentence: str) -> Iterator[None]:
    """Turns what the tokenizers library raises, also its panics, into a FormeryError that begins with `sentence`."""
    try:
        yield
    except (FormeryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises the bare class; a panic is not even an Exception
        raise FormeryError(f"{sentence}: {error}.") from error


def _cut_names(inner: tokenizers.Tokenizer) -> None:
    """Cuts the name of a special token in two where the model itself could make the token out of its letters.

    Models that look whole pieces up (unigram, words) know `</s>` as one of them; others only ever merge letters.
    """
    model = inner.model
    looks_up = not isinstance(model, models.BPE | models.WordPiece) or getattr(model, "ignore_merges", False)

    def makes(name: str) -> bool:
        texts = (name, f" {name}", f"x{name}x")
        return any(inner.token_to_id(name) in inner.encode(one, add_special_tokens=False).ids for one in texts)

    names = [token.content for token in inner.get_added_tokens_decoder().values() if token.special]
    names = [name for name in names if len(name) > 1 and model.token_to_id(name) is not None]
    tails: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: (-len(name), name)):
        if looks_up or makes(name):
            tails.setdefault(name[0], []).append(re.escape(name[1:]))
    if not tails:
        return
    pattern = "|".join(f"{re.escape(head)}(?={'|'.join(tail)})" for head, tail in sorted(tails.items()))
    cut = pre_tokenizers.Split(tokenizers.Regex(pattern), "merged_with_previous")
    if inner.pre_tokenizer is None:
        inner.pre_tokenizer = cut
    elif cut.__getstate__() not in inner.pre_tokenizer.__getstate__():
        inner.pre_tokenizer = pre_tokenizers.Sequence([inner.pre_tokenizer, cut])


def unicode_text(text: str) -> str:
    """`text` itself; raises FormeryError when it holds half a surrogate pair, which no UTF-8 file can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormeryError(
            f"the text has half a surrogate pair at character {error.start}, which is no text; remove it."
        ) from error
    return text


def train_bpe(
    texts: Iterable[str],
    vocabulary_size: int,
    specials: Sequence[str] = SPECIALS,
    minimum_frequency: int = 2,
) -> Tokenizer:
    """Learns a byte-level BPE vocabulary from `texts`; any text then encodes and decodes without loss.

    The special tokens take the first ids, the 256 bytes the next; merges seen fewer than `minimum_frequency`
    times are not made, so that a small corpus can give a smaller vocabulary than asked for. Raises
    FormeryError when `vocabulary_size` leaves no room for the bytes. Source: Sennrich et al. 2016, Neural
    Machine Translation of Rare Words with Subword Units; GPT-2 for the bytes.
    """
    smallest = 256 + len(specials)
    if vocabulary_size < smallest:
        raise FormeryError(
            f"a byte-level vocabulary of {vocabulary_size} is too small: 256 bytes and {len(specials)} "
            f"special tokens need at least {smallest}."
        )
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=minimum_frequency,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(map(unicode_text, texts), trainer)
    return Tokenizer(inner)
