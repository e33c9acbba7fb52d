"""The pages as files that open from a disk or any host; all but the viewer."""

from datetime import UTC, date, datetime
from pathlib import Path

from formery.catalog import papers
from formery.catalog.news import news
from formery.errors import FormeryError
from formery.files import atomic_folder
from formery.web.feed import atom
from formery.web.site import measured
from formery.web.site.pages import STATIC, Asked, Pages, static

MARK = "formery-pages.txt"  # only a folder that an export made is replaced


def export(folder: Path) -> int:
    """Writes all pages, whole or not at all; gives their number. FormeryError for a folder with anything else."""
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARK).is_file())):
        raise FormeryError(f"{folder} is there and holds no pages; name a new or an empty folder.")
    entries, pages = papers(), Pages(served=False)
    made = {"index.html": pages.home(entries, entries, Asked())}
    made |= {f"papers/{one.card.slug}.html": pages.paper(one, entries) for one in entries}
    made |= {f"works/{name}.html": pages.work(name, some, entries) for name, some in measured.works(entries).items()}
    number = len(made)
    made |= {name: static(name) for name in STATIC if name != "watch.js"}
    first = min((one.card.added for one in entries if one.card.added), default=datetime.now(UTC).date().isoformat())
    since = date.fromisoformat(first)
    made |= {"feed.xml": atom(news(since, entries), since), MARK: "Made by formery web --export.\n"}
    with atomic_folder(folder) as temporary:
        for name, text in made.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return number
