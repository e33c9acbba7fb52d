"""Finding papers: by words, by meaning, and by both, their ranks fused.

score(paper) = Σ over rankings 1 / (DAMPING + rank): reciprocal rank fusion (Cormack, Clarke and Büttcher 2009).
"""

from collections import defaultdict
from collections.abc import Sequence

from formery.catalog import meaning as meanings
from formery.catalog.card import cards
from formery.catalog.entries import Entry, Wanted, papers
from formery.catalog.words import by_words

DAMPING = 10
DEEP = 60  # so many of the nearest by meaning take part: the last of all papers are no answer


def ranked(query: str, words: bool = True, meaning: bool = False) -> list[str]:
    """The slugs of what a query finds, best first; the paper of that very slug or name before all others."""
    rankings: list[Sequence[str]] = [by_words(query)] if words else []
    if meaning:
        rankings.append(meanings.by_meaning(query)[:DEEP])
    scores: dict[str, float] = defaultdict(float)
    for ranking in rankings:
        for rank, slug in enumerate(ranking, 1):
            scores[slug] += 1 / (DAMPING + rank)
    asked = " ".join(query.lower().split())
    for slug, card in cards().items():
        if asked in (slug, card.name.lower()):
            scores[slug] = float("inf")
    return sorted(scores, key=lambda slug: (-scores[slug], slug))


def search(
    query: str = "",
    wanted: Wanted | None = None,
    meaning: bool | None = None,
    among: Sequence[Entry] | None = None,
) -> list[Entry]:
    """The papers that a query finds, best first; all of them, in order, without one.

    meaning: look for the meaning too; by default where that is installed. among: all entries, where they were just
    read. Raises FormeryError for a filter's unknown value, and where meaning is asked for and not installed.
    """
    wanted = (wanted or Wanted()).check()
    entries = {entry.card.slug: entry for entry in (papers() if among is None else among)}
    if query.strip():
        found = ranked(query, meaning=meanings.installed() if meaning is None else meaning)
        entries = {slug: entries[slug] for slug in found}
    return [entry for entry in entries.values() if wanted(entry)]
