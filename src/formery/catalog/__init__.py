"""Every paper's card and where it stands, and the search over them."""

from formery.catalog.card import Card, cards
from formery.catalog.entries import Entry, Status, Wanted, entry, papers
from formery.catalog.ranking import search

__all__ = ["Card", "Entry", "Status", "Wanted", "cards", "entry", "papers", "search"]
