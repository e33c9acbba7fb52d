"""The catalogue: every paper has one whole card, its status follows its record, and it is found."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formery.catalog import Wanted, cards, entry, meaning, papers, search
from formery.catalog import card as cards_of
from formery.catalog import source as sources
from formery.catalog.card import Card, card
from formery.catalog.entries import STATUSES, Entry
from formery.catalog.news import day, news
from formery.catalog.ranking import SPREAD, neighbours, ranked, spread
from formery.catalog.words import by_words
from formery.errors import FormeryError
from formery.evidence import record
from formery.evidence.digest import digest
from formery.evidence.kept import Kept
from formery.evidence.machine import machine, versions
from formery.evidence.measured import Budget
from formery.evidence.paper import PAPERS
from formery.evidence.verdict import Criterion
from formery.generate import METHODS
from formery.methods import discover
from formery.web.feed import ATOM, atom, markdown

LISTED = (Path(__file__).parent / "papers.txt").read_text().split()
SLUG = "speculative-sampling"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records."""
    monkeypatch.setattr(record, "records_folder", lambda: tmp_path)
    return tmp_path


def write(folder: Path, code: str, slug: str = SLUG) -> Path:
    one = record.Record(
        slug=slug,
        verdict="does not hold",
        claims="c",
        criteria=[Criterion("c", "s", ">", 1.0, 0.5, 0.4, 0.6)],
        rows=[],
        baseline="b",
        notes=[],
        budget=Budget().plain(),
        models={},
        machine=machine(),
        versions=versions(),
        date="2026-01-02T03:04:05+00:00",
        seconds=1.0,
        digest=code,
    )
    return record.write(one, folder)


# Cards


def test_no_paper_is_missing() -> None:
    assert set(LISTED) <= cards().keys() and len(LISTED) == 356


def test_cards_of_papers_with_code_are_those_of_their_files() -> None:
    discover()
    inside = {slug: one for slug, one in cards().items() if one.module}
    assert inside.keys() == PAPERS.keys()
    for slug, paper in PAPERS.items():
        words = ("title", "year", "part", "domain", "does", "claims", "needs", "training")
        for name in (*words, "added", "module", "works"):
            assert getattr(inside[slug], name) == getattr(paper, name), (slug, name)
        assert dict(inside[slug].related) == dict(paper.related)
        methods = {one.name: one for one in METHODS.values() if one.paper == slug}
        assert {one.name for one in inside[slug].methods} == methods.keys()
        for one in inside[slug].methods:
            own = methods[one.name]
            for name in ("summary", "lossless", "guide", "kinds"):
                assert getattr(one, name) == getattr(own, name), (slug, one.name, name)
        own_name = [one.lossless for one in methods.values() if one.name == slug]
        assert inside[slug].exact == any(own_name or [one.lossless for one in methods.values()])


def test_every_card_says_what_it_should() -> None:
    for one in cards().values():
        assert 8 <= len(one.does.split()) <= 75 and 3 <= len(one.claims.split()) <= 60, one.slug
        assert one.does[0].isupper() and one.does.endswith(".") and one.claims.endswith("."), one.slug
        assert "own knowledge" not in f"{one.does} {one.claims} {one.needs}".lower(), one.slug
        assert date.fromisoformat(one.added), one.slug
        assert one.kind not in ("survey", "resource") or len(one.covers) >= 2, one.slug
        assert one.kind in ("survey", "resource") or one.related, one.slug


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Card]]]:
    """Makes a catalogue of its own out of lines."""
    monkeypatch.setattr(cards_of, "FOLDER", tmp_path)
    monkeypatch.setattr(cards_of, "written", list)

    def make(*lines: object, part: str = "cache") -> dict[str, Card]:
        text = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
        (tmp_path / f"{part}.jsonl").write_text(text)
        cards.cache_clear()
        return cards()

    yield make
    cards.cache_clear()


def line(slug: str, **others: object) -> dict[str, object]:
    given: dict[str, object] = dict.fromkeys(("name", "title", "domain", "does", "claims"), "Words.")
    return {"slug": slug, **given, **others}


def test_a_line_becomes_a_card_of_its_part(own: Callable[..., dict[str, Card]]) -> None:
    made = own(line("b", related={"a": "the same"}), line("a", year=2020, covers=["b"]))
    assert list(made) == ["a", "b"]
    assert made["a"].part == "cache" and made["a"].covers == ("b",) and made["b"].related == {"a": "the same"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line("a"), line("a")], "two cards of a"),
        ([line("a", related={"b": "x"})], "points to 'b'"),
        ([line("a", related={"a": "x"})], "points to 'a'"),
        ([line("a", covers=["zzz"])], "points to 'zzz'"),
        (["{"], "cache.jsonl, line 1 is no JSON"),
        ([line("a", colour="blue")], "cache.jsonl, line 1: .*colour"),
        ([line("a"), line("b", does=" ")], "line 2: the card of b has no does"),
        ([line("a", kind="blog")], "'blog'"),
        ([line("a", training="much")], "'much'"),
    ],
)
def test_a_wrong_card_is_refused(own: Callable[..., dict[str, Card]], lines: list[object], said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        own(*lines)


def test_a_card_that_would_have_to_be_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.py").write_text("publish(Paper(slug='a', title=made()))\n")
    monkeypatch.setattr(sources, "METHODS", tmp_path)
    with pytest.raises(FormeryError, match="one.py, line 1: .*written out"):
        sources.written()


# Status


def test_the_status_follows_code_and_record(folder: Path) -> None:
    assert (entry(SLUG).status, entry(SLUG).verdict, entry(SLUG).record) == ("runs", None, None)
    path = write(folder, digest(card(SLUG).module))
    found = entry(SLUG)
    assert (found.status, found.verdict, found.date) == ("checked", "does not hold", "2026-01-02")
    assert found.record == record.read(SLUG, folder)
    write(folder, "0" * 64)
    assert (entry(SLUG).status, entry(SLUG).verdict) == ("stale", "does not hold")
    path.unlink()
    assert entry(SLUG).status == "runs"
    assert {entry(one).status for one in cards() if not card(one).module} <= {"entry only"}


def test_a_list_and_its_plain_data(folder: Path) -> None:
    listed = papers()
    assert [one.card for one in listed] == [*cards().values()]
    parts = [one.card.part for one in listed]
    assert parts == sorted(parts, key=[*cards_of.PARTS].index)
    first = json.loads(json.dumps(listed[0].to_json()))
    assert {"slug", "title", "part", "status", "verdict"} <= first.keys()


def test_an_unknown_paper_is_told_with_the_nearest() -> None:
    with pytest.raises(FormeryError, match="did you mean speculative-sampling"):
        entry("speculative-samplin")


EVERYTHING = papers()
FILTERS = st.builds(
    Wanted,
    part=st.none() | st.sampled_from([*cards_of.PARTS]),
    domain=st.none() | st.sampled_from(sorted({one.domain for one in cards().values()})),
    status=st.none() | st.sampled_from(STATUSES),
    lossless=st.none() | st.booleans(),
    trained=st.none() | st.booleans(),
)


@given(FILTERS)
def test_filters_keep_what_fits_and_nothing_else(wanted: Wanted) -> None:
    def fits(one: Entry) -> bool:
        if wanted.trained is not None and (one.card.training in ("added", "whole")) != wanted.trained:
            return False
        if wanted.trained is False and one.card.training != "none":
            return False
        return (
            wanted.part in (None, one.card.part)
            and wanted.domain in (None, one.card.domain)
            and wanted.status in (None, one.status)
            and wanted.lossless in (None, one.card.exact)
        )

    assert search("", wanted, among=EVERYTHING) == [one for one in EVERYTHING if fits(one)]


def test_an_unknown_filter_is_told() -> None:
    with pytest.raises(FormeryError, match="no part named 'atention'; did you mean attention"):
        search("", Wanted(part="atention"))
    with pytest.raises(FormeryError, match="status named 'done'"):
        search("x", Wanted(status="done"))


# Search


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("iterating equations", "parallel-jacobi-decoding"),
        ("modified rejection of drafts", SLUG),
        ("correcting grammar", "aggressive-decoding"),
        *((slug, slug) for slug in LISTED[::40]),
        *((cards()[slug].name.upper(), slug) for slug in LISTED[3::80]),
    ],
)
def test_words_find_papers(query: str, first: str) -> None:
    found = ranked(query)
    assert found[0] == first
    assert len({*found}) == len(found)


def test_words_are_found_in_all_their_forms() -> None:
    assert by_words("drafted") == by_words("drafts") == by_words("DRAFTING") != {}
    assert [*by_words("drafted").values()] == sorted(by_words("drafted").values(), reverse=True)


@given(st.text(max_size=60))
def test_any_text_is_a_query(text: str) -> None:
    assert {*ranked(text)} <= cards().keys()


@pytest.mark.parametrize("text", ['"', "a* OR b", "NEAR(x y)", "name:x", "-draft", "'; DROP TABLE cards; --"])
def test_a_query_is_words_and_no_language(text: str) -> None:
    assert {*ranked(text)} <= cards().keys()
    assert by_words("draft")


def test_words_that_nobody_uses_find_nothing() -> None:
    assert search("zymurgy", meaning=False) == search("the of", meaning=False) == []


def test_meaning_finds_what_shares_no_word() -> None:
    pytest.importorskip(meaning.PACKAGE)
    query = "vocalist removes background chatter from mic"
    assert ranked(query, words=False, meaning=True)[0] in ("frcrn", "deftan-ii")
    assert next(iter(by_words(query))) not in ("frcrn", "deftan-ii")
    one = cards()["aggressive-decoding"]
    assert next(iter(meaning.by_meaning(one.text))) == one.slug
    assert min(meaning.by_meaning(query).values()) > 0


def test_scores_are_those_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    near = {"a": {"b": 1.0}, "b": {"a": 0.5, "c": 0.5}, "c": {"b": 1.0}, "d": {}}
    monkeypatch.setattr("formery.catalog.ranking.neighbours", lambda: near)
    order = sorted(near)
    mean = numpy.array([[near[one].get(other, 0.0) for other in order] for one in order])
    fits = numpy.array([0.3, 0.0, 1.0, 0.0])
    wanted = fits + SPREAD * (mean @ fits + mean @ mean @ fits / 2)
    found = spread(dict(zip(order, fits.tolist(), strict=True)))
    assert found == pytest.approx({slug: score for slug, score in zip(order, wanted, strict=True) if score > 0})


def test_neighbours_are_mutual_and_their_weights_sum_to_one() -> None:
    for slug, some in neighbours().items():
        assert sum(some.values()) == pytest.approx(1) and slug not in some
        assert all(slug in neighbours()[other] for other in some)


def test_both_ways_of_searching_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formery.catalog.ranking.neighbours", lambda: {slug: {} for slug in "abcd"})
    monkeypatch.setattr("formery.catalog.ranking.by_words", lambda query: {"a": 4.0, "b": 2.0, "c": 1.0})
    monkeypatch.setattr("formery.catalog.ranking.meanings.by_meaning", lambda query: {"c": 3.0, "b": 2.4, "d": 1.5})
    assert ranked("?", meaning=True) == ["b", "c", "a", "d"]
    assert ranked("?") == ["a", "b", "c"]
    assert ranked("?", words=False, meaning=True) == ["c", "b", "d"]


def test_meaning_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meaning, "PACKAGE", "no_such_package_at_all")
    meaning._encoder.cache_clear()
    meaning._cards.cache_clear()
    with pytest.raises(FormeryError, match=r"formery\[search\]"):
        search("x", meaning=True)
    assert search("draft", meaning=None)


def test_a_list_and_a_search_by_words_need_no_torch() -> None:
    code = (
        "import sys\nfrom formery.catalog import search\nassert search('') and search('draft', meaning=False)\n"
        "print({'torch', 'numpy', 'pydantic.main', 'matplotlib'} & {*sys.modules})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # what is kept is there
    done = subprocess.run([sys.executable, "-c", code], text=True, check=True, capture_output=True)
    assert done.stdout.strip() == "set()"


# What is kept between runs


def test_what_is_kept_is_worked_out_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path / "cache"))
    file, calls = tmp_path / "a.txt", list[str]()

    def work_out(path: Path) -> list[str]:
        calls.append(path.read_text())
        return [path.read_text()]

    def get(version: str = "1") -> list[str]:
        kept = Kept("x", version)
        value: list[str] = kept.of(file, work_out)
        kept.save()
        return value

    file.write_text("one")
    assert get() == get() == ["one"] and calls == ["one"]
    file.write_text("three")
    assert get() == ["three"] and calls == ["one", "three"]
    assert get("2") == ["three"] and len(calls) == 3
    Kept("x", "2").path.write_text("{ broken")
    assert get("2") == ["three"] and len(calls) == 4


# News


def entries() -> list[Entry]:
    def made(slug: str, added: str, date: str = "") -> Entry:
        one = dataclasses.replace(cards()[SLUG], slug=slug, name=f"<{slug}> & co", added=added)
        return Entry(one, "checked" if date else "entry only", "holds" if date else None, date)

    return [made("a", "2026-01-05"), made("b", "2026-01-02", "2026-01-09"), made("c", "2026-01-07", "2026-01-07")]


def test_news_are_what_happened_since_a_day() -> None:
    found = [(event.kind, event.entry.card.slug, event.date) for event in news(date(2026, 1, 1), entries())]
    assert found == [
        ("checked", "b", "2026-01-09"),
        ("checked", "c", "2026-01-07"),
        ("new", "a", "2026-01-05"),
        ("new", "b", "2026-01-02"),
    ]
    assert [event.entry.card.slug for event in news(date(2026, 1, 8), entries())] == ["b"]
    assert news(date(2027, 1, 1), entries()) == []


def test_the_feed_is_atom_with_names_that_stay() -> None:
    since = date(2026, 1, 1)
    text = atom(news(since, entries()), since, "https://example.org/")
    feed = ElementTree.fromstring(text.encode())
    assert feed.tag == f"{{{ATOM}}}feed"
    for needed in ("title", "id", "updated", "author"):
        assert feed.find(f"{{{ATOM}}}{needed}") is not None
    items = feed.findall(f"{{{ATOM}}}entry")
    names = [item.findtext(f"{{{ATOM}}}id") for item in items]
    assert len({*names}) == len(items) == 4
    assert items[0].findtext(f"{{{ATOM}}}title") == "<b> & co: checked: holds"
    links = [item.find(f"{{{ATOM}}}link") for item in items]
    assert next(one.get("href") for one in links if one is not None) == "https://example.org/papers/b.html"
    assert text == atom(news(since, entries()), since, "https://example.org/")


def test_the_digest_tells_verdicts_and_newcomers() -> None:
    since = date(2026, 1, 1)
    text = markdown(news(since, entries()), since)
    assert text.startswith("# Formery since 2026-01-01\n")
    assert "**holds**" in text and text.index("## Checked") < text.index("## New in the catalogue")
    assert "Nothing new." in markdown([], since)


def test_a_day_is_a_day() -> None:
    today = date(2026, 3, 1)
    assert day("2026-02-03", today) == date(2026, 2, 3)
    assert day(None, today) == date(2026, 1, 30)
    for wrong in ("yesterday", "2026-02-30", "", "03/02/2026"):
        with pytest.raises(FormeryError, match="is no day"):
            day(wrong, today)
