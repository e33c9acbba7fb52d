"""Finding papers: by words, by meaning, or both, and by what lies near to what was found.

    fit(card)   = Σ over ways of searching: its score / the best score
    score(card) = fit + SPREAD · (near fit + near near fit / 2)
    near x      = the mean of x over the card's neighbours: those that it names, or that name it

Papers that solve a problem in one way name each other, so that a card whose words miss the query is found by the
company it keeps.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache

from formery.catalog import meaning as meanings
from formery.catalog.card import cards
from formery.catalog.entries import Entry, Wanted, papers
from formery.catalog.words import by_words

SPREAD = 1.2
COVERED = 0.5  # what a survey's naming weighs beside a paper's
LEAST = 0.1  # of the best score: what has less is no answer


def ranked(query: str, words: bool = True, meaning: bool = False) -> list[str]:
    """The slugs of what a query finds, best first; the paper of that very slug or name before all others."""
    fits: dict[str, float] = defaultdict(float)
    for found in ([by_words(query)] if words else []) + ([meanings.by_meaning(query)] if meaning else []):
        for slug, score in found.items():
            fits[slug] += score / max(found.values())
    scores = spread(fits)
    scores = {slug: score for slug, score in scores.items() if score >= LEAST * max(scores.values())}
    asked = " ".join(query.lower().split())
    for slug, card in cards().items():
        if asked in (slug, card.name.lower()):
            scores[slug] = float("inf")
    return sorted(scores, key=lambda slug: (-scores[slug], slug))


def spread(fits: Mapping[str, float]) -> dict[str, float]:
    """Scores, of which each card has a part from its neighbours and theirs."""
    near = neighbours()

    def mean(values: Mapping[str, float]) -> dict[str, float]:
        return {slug: sum(w * values.get(other, 0.0) for other, w in some.items()) for slug, some in near.items()}

    once = mean(fits)
    twice = mean(once)
    scores = {slug: fits.get(slug, 0.0) + SPREAD * (once[slug] + twice[slug] / 2) for slug in near}
    return {slug: score for slug, score in scores.items() if score > 0}


@cache
def neighbours() -> dict[str, dict[str, float]]:
    """For each card those that it names or that name it, with weights that sum to 1."""
    weights: dict[str, dict[str, float]] = {slug: {} for slug in cards()}
    for slug, card in cards().items():
        for other in (*card.related, *card.covers):
            weight = 1.0 if other in card.related else COVERED
            for one, two in ((slug, other), (other, slug)):
                weights[one][two] = max(weight, weights[one].get(two, 0.0))
    return {slug: {other: w / sum(some.values()) for other, w in some.items()} for slug, some in weights.items()}


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
