"""What is new, for people to follow: as Markdown, and as an Atom feed (RFC 4287)."""

import uuid
from collections.abc import Sequence
from datetime import date
from xml.etree import ElementTree

from formery.catalog.news import Event

ATOM = "http://www.w3.org/2005/Atom"
OURS = uuid.uuid5(uuid.NAMESPACE_URL, "formery")  # names of things here are made from it


def markdown(events: Sequence[Event], since: date) -> str:
    """The events as a page of Markdown: checked claims first, then what came in, by part."""
    checked = [event for event in events if event.kind == "checked"]
    new = [event for event in events if event.kind == "new"]
    lines = [f"# Formery since {since.isoformat()}", ""]
    if not events:
        lines += ["Nothing new.", ""]
    if checked:
        lines += ["## Checked", ""]
        for event in checked:
            one = event.entry.card
            lines += [f"- **{one.name}** (`{one.slug}`, {event.date}): **{event.entry.verdict}**. {one.claims}"]
        lines.append("")
    if new:
        lines += ["## New in the catalogue", ""]
        for part in dict.fromkeys(event.entry.card.part for event in new):
            cards = [event.entry.card for event in new if event.entry.card.part == part]
            lines += [f"### {part}", "", *(f"- **{one.name}** (`{one.slug}`): {one.does}" for one in cards), ""]
    return "\n".join(lines)


def atom(events: Sequence[Event], since: date, place: str = "") -> str:
    """The events as an Atom feed; place: the address that pages lie under, where they have one."""
    ElementTree.register_namespace("", ATOM)
    feed = ElementTree.Element(f"{{{ATOM}}}feed")
    updated = events[0].date if events else since.isoformat()
    _add(feed, "title", "Formery: new papers and checked claims")
    _add(feed, "id", OURS.urn)
    _add(feed, "updated", f"{updated}T00:00:00Z")
    _add(_add(feed, "author"), "name", "Formery")
    if place:
        _add(feed, "link", rel="self", href=f"{place}feed.xml")
    for event in events:
        one, verdict = event.entry.card, event.entry.verdict
        item = _add(feed, "entry")
        what = f"checked: {verdict}" if event.kind == "checked" else "new in the catalogue"
        _add(item, "title", f"{one.name}: {what}")
        _add(item, "id", uuid.uuid5(OURS, f"{one.slug} {event.kind} {event.date}").urn)
        _add(item, "updated", f"{event.date}T00:00:00Z")
        if place:
            _add(item, "link", href=f"{place}papers/{one.slug}.html")
        _add(item, "category", term=one.part)
        said = f"It claims: {one.claims}" if event.kind == "checked" else one.claims
        # An entry without a link must have content.
        _add(item, "summary" if place else "content", f"{one.title}. {one.does} {said}", type="text")
    ElementTree.indent(feed)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(feed, encoding="unicode") + "\n"


def _add(parent: ElementTree.Element, name: str, text: str | None = None, **attributes: str) -> ElementTree.Element:
    element = ElementTree.SubElement(parent, f"{{{ATOM}}}{name}", attributes)
    element.text = text
    return element
