"""Text to token ids and back: a thin, strict wrapper around the `tokenizers` library.

What a user types is only ever text. A document that contains the letters "<eos>" is encoded as those letters
and never as the token that ends a sequence, so that no prompt can forge one.
"""

import hashlib
from collections.abc import Iterable, Sequence
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
    """Turns text into ids and ids into text; everything it knows is in one `tokenizer.json`.

    `bos`, `eos` and `pad` are the ids of the special tokens, found by their names (`<bos>`, `<eos>`,
    `<pad>`, or the names that published models use), or None where the vocabulary has none.
    """

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        inner.no_truncation()
        inner.no_padding()
        known = {
            kind: [name for name in names if inner.token_to_id(name) is not None]
            for kind, names in NAMES.items()
        }
        named = {name for names in known.values() for name in names}
        # A file may list them as plain tokens; only those marked special are never made from user text.
        inner.add_special_tokens(
            [tokenizers.AddedToken(n, normalized=False, special=True) for n in sorted(named)]
        )
        inner.encode_special_tokens = True
        self.inner = inner
        ids = {kind: inner.token_to_id(names[0]) if names else None for kind, names in known.items()}
        self.bos: int | None = ids["bos"]
        self.eos: int | None = ids["eos"]
        self.pad: int | None = ids["pad"]

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
        return [e.ids for e in self.inner.encode_batch_fast(checked, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; special tokens, and ids outside of the vocabulary, leave no text."""
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token_text(self, id: int) -> str:
        """One token, to look at: its text, a special token's name, `\\xNN` for a byte of a cut character."""
        token = self.inner.id_to_token(id) if id >= 0 else None
        if token is None:
            raise FormeryError(
                f"there is no token {id}; the vocabulary has the ids 0 to {self.vocabulary_size - 1}."
            )
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
        try:
            return cls(tokenizers.Tokenizer.from_str(text))
        except Exception as error:  # the library raises the bare class
            raise FormeryError(f"{path} is not a tokenizer.json that can be used: {error}.") from error


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
