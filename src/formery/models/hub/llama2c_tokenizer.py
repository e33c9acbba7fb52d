"""The vocabulary files of llama2.c: pieces of text with scores, and the tokenizer that they make."""

import os
import re
import struct
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors

from formery.data.tokenizer import Tokenizer
from formery.errors import FormeryError

RECORD = struct.Struct("<fi")
LONGEST = 256  # bytes in a piece
SPECIALS = ("<unk>", "<s>", "</s>")
BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


def read_tokenizer(path: str | Path, vocabulary: int) -> Tokenizer:
    """The tokenizer in a vocabulary file of that many pieces, which encodes as llama2.c does.

    A space is put before the text; then, from single characters (or, for unknown ones, their bytes), the neighbours
    whose union has the best score are merged, the leftmost first, until no union is a piece. (Two pieces of one
    score, which no trained vocabulary has, are merged in the order of their ids.) Decoding takes the space away again.
    Raises FormeryError for a file that is truncated or damaged, or has another number of pieces.
    """
    scores = _scores(Path(path), vocabulary)
    ids = {piece: id for id, piece in enumerate(scores)}
    # Only text is merged: no prompt can put a special token or a byte together.
    joined = {piece: id for piece, id in ids.items() if id >= len(SPECIALS) and not BYTE.fullmatch(piece)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(joined, key=lambda one: -scores[one])
        for cut in range(1, len(piece))
        if piece[:cut] in joined and piece[cut:] in joined
    ]
    inner = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True))
    inner.add_special_tokens([tokenizers.AddedToken("<unk>", normalized=False, special=True)])
    inner.normalizer = normalizers.Prepend(" ")
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", ids["<s>"])])
    return Tokenizer(inner)


def _scores(path: Path, vocabulary: int) -> dict[str, float]:
    """The pieces of a vocabulary file in the order of their ids, with their scores."""
    if not os.path.isfile(path):
        raise FormeryError(f"there is no vocabulary {path}.")
    try:
        with path.open("rb") as file:
            data = file.read(4 + vocabulary * (RECORD.size + LONGEST) + 1)
    except (OSError, ValueError) as error:
        raise FormeryError(f"the vocabulary {path} cannot be read: {error}.") from error
    longest = int.from_bytes(data[:4], "little", signed=True)
    scores: dict[str, float] = {}
    at = 4
    while at < len(data) and len(scores) <= vocabulary:
        id, start = len(scores), at + RECORD.size
        score, length = RECORD.unpack(data[at:start]) if start <= len(data) else (0.0, 0)
        at = start + length
        if not 0 < length <= min(longest, LONGEST) or at > len(data) or not abs(score) < float("inf"):
            raise FormeryError(f"the vocabulary {path} is damaged or no llama2.c one: piece {id} is not whole.")
        try:
            piece = SPECIALS[id] if id < len(SPECIALS) else data[start:at].decode()
        except UnicodeDecodeError as error:
            raise FormeryError(f"the vocabulary {path}: piece {id} is not UTF-8, so it is no llama2.c one.") from error
        if piece in scores:
            raise FormeryError(f"the vocabulary {path} has the piece {piece!r} twice, the second time as {id}.")
        scores[piece] = score
    if len(scores) != vocabulary:
        found = "more" if len(scores) > vocabulary else str(len(scores))
        raise FormeryError(f"the vocabulary {path} has {found} pieces, where the model knows {vocabulary} tokens.")
    if vocabulary < len(SPECIALS):
        raise FormeryError(f"the vocabulary {path} has {vocabulary} pieces, too few for {', '.join(SPECIALS)}.")
    return scores
