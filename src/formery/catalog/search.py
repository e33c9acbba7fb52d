"""Finding papers by words: BM25 (Robertson and Zaragoza 2009) over stems of what their cards say."""

from formery.catalog.entries import Entry, papers
from formery.evidence.paper import Paper


def search(query: str) -> list[Entry]:
    """The papers that share a word with `query`, best first; the one of that slug before all others."""
    import bm25s  # half a second, which only a search should cost
    import Stemmer

    entries = papers()
    stemmer = Stemmer.Stemmer("english")

    def words(texts: list[str]) -> list[list[str]]:
        found: list[list[str]] = bm25s.tokenize(
            texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False
        )
        return found

    wanted = words([query])[0]
    cards = words([text(entry.paper) for entry in entries])
    if not wanted or not entries:
        return []
    index = bm25s.BM25()
    index.index(cards, show_progress=False)
    scores = dict(zip((entry.paper.slug for entry in entries), index.get_scores(wanted), strict=True))
    scores[query.strip().lower()] = float("inf")
    found = [entry for entry in entries if scores[entry.paper.slug] > 0]
    return sorted(found, key=lambda entry: -scores[entry.paper.slug])


def text(paper: Paper) -> str:
    """What is searched of a card; the name and the title count twice."""
    name = f"{paper.slug.replace('-', ' ')} {paper.title}"
    return f"{name} {name} {paper.part} {paper.domain} {paper.does} {paper.claims}"
