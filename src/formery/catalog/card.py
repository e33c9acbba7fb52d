"""Every paper's card: those of papers with code lie in their files, all others in `cards/`, one a line.

A line is a JSON object with the fields of `Card`; the file is named after the part of the transformer.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from formery.catalog.source import MethodCard, written
from formery.errors import FormeryError, unknown

FOLDER = Path(__file__).parent / "cards"
KINDS = ("system", "analysis", "survey", "resource")
TRAINING = {
    "none": "takes a trained model as it is",
    "added": "trains small parts on top of a trained model, or tunes it a little",
    "whole": "trains a model with it",
    "": "trains nothing",
}
PARTS = {
    "frontend": "what comes in: images, sound, molecules and tables as vectors",
    "tokens": "which tokens are looked at",
    "position": "how order is told",
    "attention": "who looks at whom",
    "feedforward": "what each token does alone",
    "block": "how layers are put together",
    "depth": "which layers run",
    "cache": "what decoding keeps",
    "head": "what comes out: boxes, masks, poses",
    "decoding": "how a model becomes text",
    "objective": "what training asks for",
    "training": "how training goes",
    "adapter": "small parts on a trained model",
    "compression": "fewer weights, fewer bits",
    "runtime": "how it is computed",
    "lens": "what goes on inside",
    "theory": "what can be known of it",
    "none": "surveys, data and whole systems",
}


@dataclass(frozen=True)
class Card:
    """A paper in our own words.

    slug: its name here; name: what it is called. year: of its first appearance, where it is known for sure. kind: one
    of `KINDS`. part: of a transformer, that it changes. domain: what it was shown on. does, claims: a sentence or two.
    needs: what it takes to use it. sought: what those look for whom it would help, in their words. training: a key of
    `TRAINING`. exact: its output, by the method of its own name, is
    that of the plain method.
    related: by slug, what a paper shares with this one. covers: for surveys and resources, papers of their topic.
    added: the day it came in. module, works, methods: its code, what its check runs on, what it registers.
    """

    slug: str
    name: str
    title: str
    part: str
    domain: str
    does: str
    claims: str
    year: int | None = None
    kind: str = "system"
    needs: str = ""
    sought: str = ""
    training: str = ""
    exact: bool = False
    related: Mapping[str, str] = field(default_factory=dict)
    covers: tuple[str, ...] = ()
    added: str = ""
    module: str = ""
    works: tuple[str, ...] = ()
    methods: tuple[MethodCard, ...] = ()

    @property
    def text(self) -> str:
        """All that a reader of the card sees, for search by meaning."""
        return f"{self.title}. {self.does} {self.claims}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)


@cache
def cards() -> dict[str, Card]:
    """All cards by slug, in the order of parts and slugs; FormeryError where one is wrong or there twice."""
    found: dict[str, Card] = {}
    for card in sorted((*_in_code(), *_in_folder()), key=lambda one: (list(PARTS).index(one.part), one.slug)):
        if card.slug in found:
            raise FormeryError(f"there are two cards of {card.slug}: one belongs in its code, or in {FOLDER.name}/.")
        found[card.slug] = card
    for card in found.values():
        for slug in (*card.related, *card.covers):
            if slug not in found or slug == card.slug:
                raise FormeryError(f"the card of {card.slug} points to {slug!r}, which is no other paper here.")
    return found


def card(slug: str) -> Card:
    """The card of that slug; FormeryError, with the nearest slugs, where there is none."""
    known = cards()
    slug = slug if slug in known else slug.lower()
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=1, cutoff=0.7)
        if not near:
            raise FormeryError(f"there is no paper named {slug!r}; `formery papers {slug}` searches for it.")
        raise unknown("paper", slug, near)
    return known[slug]


def _in_code() -> Iterator[Card]:
    for one in written():
        promises = {method.name: method.lossless for method in one.methods}
        exact = promises.get(one.card["slug"], any(promises.values()))
        given = {"name": one.card["slug"], **{k: v for k, v in one.card.items() if v != ""}}
        yield _card({**given, "module": one.module, "methods": one.methods, "exact": exact}, one.module)


def _in_folder() -> Iterator[Card]:
    for path in sorted(FOLDER.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            where = f"{path.name}, line {number}"
            try:
                given = json.loads(line)
            except ValueError as error:
                raise FormeryError(f"{where} is no JSON object: {error}.") from error
            yield _card({**given, "part": path.stem}, where)


def _card(given: dict[str, Any], where: str) -> Card:
    """A card from its fields, each of the right kind."""
    try:
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
        one = Card(**fields)
    except TypeError as error:
        raise FormeryError(f"{where}: {error}.") from error
    said = ("slug", "name", "title", "domain", "does", "claims")
    if empty := [name for name in said if not str(getattr(one, name)).strip()]:
        raise FormeryError(f"{where}: the card of {one.slug} has no {empty[0]}.")
    if one.kind not in KINDS or one.part not in PARTS or one.training not in TRAINING:
        raise FormeryError(f"{where}: {one.kind!r}, {one.part!r} or {one.training!r} is none that is known.")
    return one
