"""Search by words: BM25 (Robertson and Zaragoza 2009) over stems of what the cards say, by SQLite's full-text index.

The index is made when it is first asked for, in a hundredth of a second, and lives in memory.
"""

import re
import sqlite3
from functools import cache
from threading import Lock

from formery.catalog.card import Card, cards

# And what a match there weighs.
COLUMNS = {"name": 4.0, "title": 4.0, "sought": 4.0, "does": 3.0, "claims": 1.0, "around": 1.0}
STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about after all also am an and any are as at be because been before being but by can could did do does doing
        down during each few for from had has have having he her here how i if in into is it its just me more most my
        no nor not of off on once only or other our out over own s same she should so some such t than that the their
        them then there these they this those through to too under until up very was we were what when where which
        while who why will with without would you your
        """,
    )
)
# What practitioners write for what cards call otherwise.
ALIKE = {
    "llm": ("language", "model"),
    "llms": ("language", "model"),
    "vlm": ("multimodal", "image", "language"),
    "kv": ("key", "value", "cache"),
    "asr": ("speech", "recognition"),
    "tts": ("speech", "synthesis"),
    "mt": ("translation",),
    "ocr": ("text", "recognition", "document"),
    "rl": ("reinforcement", "learning"),
    "vit": ("vision", "image"),
    "ffn": ("feed", "forward"),
    "mlp": ("feed", "forward"),
    "moe": ("experts",),
    "peft": ("adapter",),
    "finetuning": ("fine", "tuning"),
    "eeg": ("brain", "signals"),
    "fmri": ("brain", "signals"),
    "mri": ("medical", "image"),
    "gpu": ("hardware", "accelerator"),
    "photo": ("image",),
    "photos": ("image",),
    "picture": ("image",),
    "pictures": ("image",),
    "faster": ("speed", "fast"),
    "shrink": ("smaller", "compress"),
}
LEAST = 1e-9  # a word that nearly all cards have tells nothing, yet it is there
_LOCK = Lock()


def terms(query: str) -> list[str]:
    """The words of a query that say something, with what else they are called."""
    words = [word for word in re.findall(r"[^\W_]+", query.lower()) if word not in STOPWORDS]
    return list(dict.fromkeys([*words, *(other for word in words for other in ALIKE.get(word, ()))]))


def by_words(query: str) -> dict[str, float]:
    """How well each card that shares a word's stem with the query fits it, by slug; above 0, best first."""
    wanted = " OR ".join(f'"{term}"' for term in terms(query))
    if not wanted:
        return {}
    weights = ", ".join(str(weight) for weight in (0.0, *COLUMNS.values()))
    with _LOCK:
        rows = _index().execute(
            f"SELECT slug, -bm25(cards, {weights}) AS fit FROM cards WHERE cards MATCH ? ORDER BY fit DESC, slug",
            (wanted,),
        )
        return {slug: max(fit, LEAST) for slug, fit in rows}


@cache
def _index() -> sqlite3.Connection:
    index = sqlite3.connect(":memory:", check_same_thread=False)
    columns = ", ".join(COLUMNS)
    index.execute(f"CREATE VIRTUAL TABLE cards USING fts5(slug UNINDEXED, {columns}, tokenize='porter unicode61')")
    places = ", ".join("?" * (1 + len(COLUMNS)))
    index.executemany(f"INSERT INTO cards VALUES ({places})", map(_row, cards().values()))
    return index


def _row(one: Card) -> tuple[str, ...]:
    around = [one.part, one.domain.replace("-", " "), one.needs, *one.related.values()]
    around += [f"{method.name} {method.summary}" for method in one.methods]
    name = f"{one.name} {one.slug.replace('-', ' ')}"
    return one.slug, name, one.title, one.sought, one.does, one.claims, " ".join(around)
