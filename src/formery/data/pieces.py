"""Sentencepiece models (Kudo and Richardson 2018) as tokenizers, read from their own file format.

The file is a protocol buffer: numbered fields, nested. The few that decide ids are read here; nothing else is run.
Text is normalized by the model's own table, spaces become `▁`, and one is put in front. The pieces are then chosen
by the best sum of scores (unigram, Kudo 2018) or by merges, best score first (byte-pair encoding).
"""

import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from formery.errors import FormeryError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BYTE_PAIR = 1, 2
MOST_PIECES, LONGEST_PIECE = 2**22, 1000
# No normalized text has a space, so that a piece behind one is never found in a text.
HIDDEN = " "


@dataclass
class Pieces:
    """What a sentencepiece file says: pieces as (text, score, type), how text is normalized, the names of marks."""

    pieces: list[tuple[str, float, int]] = field(default_factory=list)
    algorithm: int = UNIGRAM
    byte_fallback: bool = False
    table: bytes = b""
    space_in_front: bool = True
    single_spaces: bool = True
    names: dict[str, str] = field(default_factory=dict)

    @property
    def unknown(self) -> int:
        """The id of the piece for what no piece covers."""
        return next(id for id, (_, _, kind) in enumerate(self.pieces) if kind == UNKNOWN)


def read_pieces(path: Path, data: bytes) -> Pieces:
    """What the sentencepiece file `path` says, given its bytes; raises FormeryError where they are no such file."""
    try:
        found = _model(data)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise FormeryError(f"{path} is no sentencepiece model, or a damaged one.") from error
    kinds = [kind for _, _, kind in found.pieces]
    if kinds.count(UNKNOWN) != 1 or len({piece for piece, _, _ in found.pieces}) != len(kinds):
        raise FormeryError(f"{path} is no usable sentencepiece model: it has a piece twice, or none for the unknown.")
    if found.algorithm not in (UNIGRAM, BYTE_PAIR):
        raise FormeryError(f"{path} is a sentencepiece model of words or characters; unigram and byte-pair are read.")
    return found


def plain(model: Pieces, more: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """A tokenizer whose ids are the places of the pieces; `more` special tokens take the next ids."""
    named = [(piece, score) for piece, score, _ in model.pieces] + [(name, 0.0) for name in more]
    hidden = {id for id, (_, _, kind) in enumerate(model.pieces) if kind == UNUSED}
    vocabulary = [(HIDDEN + piece if id in hidden else piece, score) for id, (piece, score) in enumerate(named)]
    inner = _tokenizer(model, vocabulary, model.unknown)
    marks = [piece for piece, _, kind in model.pieces if kind in (CONTROL, UNKNOWN)]
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in [*marks, *more]])
    return inner


def fairseq(model: Pieces) -> tokenizers.Tokenizer:
    """A tokenizer with the ids of XLM-R: `<s> <pad> </s> <unk>`, the pieces after the model's own marks, `<mask>`."""
    if any(kind == NORMAL for _, _, kind in model.pieces[:3]):
        raise FormeryError("the sentencepiece model does not begin with its three marks, as those of XLM-R do.")
    front = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(piece, score) for piece, score, _ in model.pieces[3:]]
    inner = _tokenizer(model, [*front, *pieces, ("<mask>", 0.0)], 3)
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name, _ in front])
    return inner


def marian(source: Pieces, ids: Mapping[str, int], path: Path) -> tokenizers.Tokenizer:
    """A tokenizer that cuts text as `source` does, with the ids of a vocabulary that both languages share.

    Pieces that only the target has are never found in a text, but decode. Where `source` has a piece without an id
    here, the text is cut into others, where Marian would see an unknown word. A language mark such as `>>fra<<` is
    one token. Raises FormeryError where the vocabulary has gaps or no `<unk>`. Source: Junczys-Dowmunt et al. 2018.
    """
    if sorted(ids.values()) != list(range(len(ids))) or "<unk>" not in ids:
        raise FormeryError(f"{path} is no vocabulary of Marian: its ids have gaps, or it has no <unk>.")
    if source.algorithm != UNIGRAM:
        raise FormeryError(f"{path}: only unigram models are read for Marian.")
    scores = {piece: score for piece, score, kind in source.pieces if kind == NORMAL}
    marks = [name for name in ids if name in ("<unk>", "</s>", "<pad>", "<s>")]
    languages = [name for name in ids if name.startswith(">>") and name.endswith("<<")]
    lowest = min(scores.values(), default=0.0)
    vocabulary = [("", 0.0)] * len(ids)
    for piece, id in ids.items():
        seen = piece in scores or piece in marks or piece in languages
        vocabulary[id] = (piece if seen else HIDDEN + piece, scores.get(piece, lowest))
    inner = _tokenizer(source, vocabulary, ids["<unk>"])
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in marks])
    inner.add_tokens([AddedToken(name, normalized=False) for name in languages])
    return inner


def _tokenizer(model: Pieces, vocabulary: list[tuple[str, float]], unknown: int) -> tokenizers.Tokenizer:
    """A tokenizer that treats text as the model says and gives each piece its place in `vocabulary` as its id."""
    chosen = [piece for piece, _, kind in model.pieces if kind == USER_DEFINED]
    if model.algorithm == UNIGRAM:
        inner = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.byte_fallback))
    else:
        inner = tokenizers.Tokenizer(
            models.BPE(
                {piece: id for id, (piece, _) in enumerate(vocabulary)},
                _merges(model),
                unk_token=vocabulary[unknown][0],
                fuse_unk=True,
                byte_fallback=model.byte_fallback,
                ignore_merges=bool(chosen),
            )
        )
    steps: list[Any] = [normalizers.Precompiled(model.table)] if model.table else []
    if model.single_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.space_in_front:
        steps.append(normalizers.Prepend(" "))
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    cuts: list[Any] = []
    if chosen:
        whole = "|".join(re.escape(piece) for piece in sorted(chosen, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(Regex(whole), "isolated"))
    if model.byte_fallback:
        # The names of the bytes are pieces too, but no text means a byte by them.
        cuts.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
    if cuts:
        inner.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace(HIDDEN, ""),
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if model.space_in_front or model.single_spaces else []),
        ]
    )
    return inner


def _merges(model: Pieces) -> list[tuple[str, str]]:
    """The merges that make the pieces, those of the best scores first: a piece is made of any two others."""
    ranks = {piece: (-score, id) for id, (piece, score, kind) in enumerate(model.pieces) if kind == NORMAL}
    found = []
    for piece, rank in ranks.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in ranks and piece[cut:] in ranks:
                found.append((rank, piece[:cut], piece[cut:]))
    return [(left, right) for _, left, right in sorted(found)]


# ------------------------------------------------------------------------------------------ the file format


def _model(data: bytes) -> Pieces:
    found = Pieces()
    marks: dict[int, int] = {41: 1, 42: 2, 43: -1}  # the ids of bos, eos and pad where the file does not tell them
    for number, value in _fields(data):
        if number == 1:
            if len(found.pieces) >= MOST_PIECES:
                raise ValueError("too many pieces")
            found.pieces.append(_piece(_bytes(value)))
        elif number == 2:
            for inner, setting in _fields(_bytes(value)):
                if inner == 3:
                    found.algorithm = _number(setting)
                elif inner == 35:
                    found.byte_fallback = bool(_number(setting))
                elif inner in marks:
                    marks[inner] = _number(setting)
        elif number == 3:
            for inner, setting in _fields(_bytes(value)):
                if inner == 2:
                    found.table = _bytes(setting)
                elif inner == 3:
                    found.space_in_front = bool(_number(setting))
                elif inner == 4:
                    found.single_spaces = bool(_number(setting))
    for kind, number in (("bos_token", 41), ("eos_token", 42), ("pad_token", 43)):
        # An id of -1 is written as the largest number of 64 bits: there is no such mark.
        if 0 <= marks[number] < len(found.pieces):
            found.names[kind] = found.pieces[marks[number]][0]
    if any(kind == UNKNOWN for _, _, kind in found.pieces):
        found.names["unk_token"] = found.pieces[found.unknown][0]
    return found


def _piece(data: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1:
            text = _bytes(value).decode("utf-8")
        elif number == 2:
            score = struct.unpack("<f", _bytes(value))[0]
        elif number == 3:
            kind = _number(value)
    if not 0 < len(text) <= LONGEST_PIECE or not abs(score) < 1e9 or not NORMAL <= kind <= BYTE:
        raise ValueError("no piece")
    return text, score, kind


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of one message, in order: a number for wire type 0, else the bytes."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if wire == 2:
            size, place = _varint(data, place)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError("no such wire type")
        if size > len(data) - place:
            raise ValueError("truncated")
        yield key >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number too long")


def _bytes(value: int | bytes) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number, where bytes belong")
    return value


def _number(value: int | bytes) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes, where a number belongs")
    return value
