"""Every paper's card and where it stands, and the search over them."""

from formery.catalog.entries import Entry, Status, entry, papers
from formery.catalog.search import search

__all__ = ["Entry", "Status", "entry", "papers", "search"]
