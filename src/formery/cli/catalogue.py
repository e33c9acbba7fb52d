"""Commands on papers: papers, show, verify, digest, web."""

from pathlib import Path
from typing import Annotated

import typer

from formery.cli.app import app
from formery.cli.options import AsJson
from formery.errors import FormeryError
from formery.web.output import check_targets, note, write_json


@app.command()
def papers(
    query: Annotated[list[str] | None, typer.Argument(metavar="QUERY", help="What you need, in your words.")] = None,
    part: Annotated[str | None, typer.Option(metavar="PART", help="Of a transformer: attention, cache, ...")] = None,
    domain: Annotated[str | None, typer.Option(metavar="DOMAIN", help="Shown on: language, speech, ...")] = None,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help="'entry only', runs, checked or stale.")
    ] = None,
    lossless: Annotated[
        bool | None, typer.Option("--lossless/--lossy", help="With the plain method's very output, or not.")
    ] = None,
    training: Annotated[
        bool | None, typer.Option("--needs-training/--no-training", help="Something is trained for it, or not.")
    ] = None,
    meaning: Annotated[
        bool | None,
        typer.Option("--meaning/--words", help="By meaning too, or by words alone. [default: by words]"),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most so many. [default: 10 of a query]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers, or what a query finds.

    With a query the best match comes first. Search by meaning needs the extra formery[search] and a few seconds.
    """
    from formery import catalog

    words = " ".join(query or []).strip()
    wanted = catalog.Wanted(part, domain, status, lossless=lossless, trained=training)
    entries = catalog.search(words, wanted, meaning=bool(meaning))
    most = limit if limit is not None else 10 if words else len(entries)
    if as_json:
        write_json([entry.to_json() for entry in entries[:most]], "-")
        return
    from formery.web.cards import paper_list
    from formery.web.table import console

    if not entries:
        about = f"has to do with {words!r}" if words else "is like that"
        raise FormeryError(f"no paper here {about}; `formery papers` lists them all.")
    console().print(paper_list(entries[:most]))
    if most < len(entries):
        note(f"{most} of {len(entries)}; --limit shows more.")


@app.command()
def show(slug: str, as_json: AsJson = False) -> None:
    """Show a paper, its evidence, how to run it."""
    from formery.catalog import entry
    from formery.web.cards import card, card_json

    found = entry(slug)
    if as_json:
        write_json(card_json(found), "-")
        return
    from formery.web.table import console

    console().print(card(found))


@app.command()
def verify(
    slug: Annotated[str | None, typer.Argument(metavar="SLUG", help="Whose check; or --all.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All papers whose record is missing or stale, one after the other.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="With --all: those with a current record too.")] = False,
    jobs: Annotated[int, typer.Option(metavar="N", help="With --all: at once; they disturb each other's times.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="With --all: on that Ray cluster (auto: the one here); formery[ray]."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a paper's check and write its record.

    The record goes to evidence/SLUG.json; a check that was stopped goes on where it was.
    """
    if everything == (slug is not None):
        raise FormeryError("name one paper, or --all of them.")
    if slug is None:
        _verify_all(again, jobs, ray)
        return
    from formery.catalog import entry
    from formery.evidence.paper import PAPERS
    from formery.evidence.verify import verify as run
    from formery.methods import discover
    from formery.web.progress import Steps

    discover()
    try:
        with Steps(f"verifying {slug}") as progress:
            record = run(slug, progress=progress)
    except FormeryError:
        if slug in PAPERS:
            raise
        raise FormeryError(f"{entry(slug).card.slug} has a card, but no code and no check yet.") from None
    if as_json:
        write_json(record.to_json(), "-")
        return
    from formery.web.cards import evidence
    from formery.web.table import console

    console().print(evidence(record))


def _verify_all(again: bool, jobs: int, ray: str | None) -> None:
    """Runs what has no current record, and lists what came of it."""
    from formery.catalog import papers as listed
    from formery.web.cards import outcomes
    from formery.web.progress import Steps
    from formery.web.table import console

    slugs = [one.card.slug for one in listed() if one.card.module and (again or one.status != "checked")]
    if not slugs:
        note("every record is of the code that is here; --again runs them all.")
        return
    if ray is None:
        from formery.evidence.sweep import sweep

        running = sweep(slugs, jobs)
    else:
        from formery.evidence.cluster import sweep_on_ray
        from formery.methods import discover

        discover()
        running = sweep_on_ray(ray, slugs)
    found = []
    note(f"{len(slugs)} checks, each some minutes: {', '.join(slugs)}.")
    with Steps("verifying") as progress:
        progress(0, len(slugs), slugs[0])
        for one in running:
            found.append(one)
            progress(len(found), len(slugs), f"{one.slug}: {one.record.verdict if one.record else 'no record'}")
    console().print(outcomes(found))
    if failed := [one.slug for one in found if one.record is None]:
        raise FormeryError(f"no record was made of {', '.join(failed)}; the same command tries them again.")


@app.command()
def digest(
    since: Annotated[str | None, typer.Option(metavar="DATE", help="YYYY-MM-DD. [default: 30 days ago]")] = None,
    markdown: Annotated[str, typer.Option(metavar="FILE", help="Where the Markdown goes; - is stdout.")] = "-",
    feed: Annotated[str | None, typer.Option(metavar="FILE", help="Write an Atom feed there too.")] = None,
    address: Annotated[str, typer.Option(metavar="URL", help="Where the pages are, for the feed's links.")] = "",
) -> None:
    """Tell what is new or newly checked.

    As Markdown, and as a feed that people can follow.
    """
    check_targets(markdown, feed)
    from formery.catalog.news import day, news
    from formery.web.feed import atom
    from formery.web.feed import markdown as as_markdown
    from formery.web.output import write_text

    start = day(since)
    events = news(start)
    write_text(as_markdown(events, start), markdown)
    if feed is not None:
        write_text(atom(events, start, address and f"{address.rstrip('/')}/"), feed)


@app.command()
def web(
    host: Annotated[str, typer.Option(metavar="HOST", help="Who may connect: by default this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(metavar="PORT", help="0 takes a free one.")] = 8765,
    export: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the pages, the viewer aside, and serve nothing.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Decodings at once in the viewer.")] = 2,
) -> None:
    """Serve the catalogue as pages: search, papers, evidence, and tokens watched as they are decoded.

    Ctrl-C ends it. Needs the extra formery[web].
    """
    from formery.web.site import need

    need()
    if export is not None:
        from formery.web.site.export import export as write

        number = write(Path(export))
        note(f"{number} pages: {export}/index.html")
        return
    from formery.web.site.serve import serve

    serve(host, port, runs)
