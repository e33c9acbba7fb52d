"""The catalogue: every paper's card is whole, its status follows its record, and words find it."""

import json

import pytest

from formery.catalog import entry, papers, search
from formery.errors import FormeryError
from formery.evidence import record
from formery.evidence.digest import digest
from formery.evidence.machine import machine, versions
from formery.evidence.measured import Budget
from formery.evidence.paper import PAPERS, Paper
from formery.evidence.verdict import Criterion
from formery.generate import METHODS

SLUGS = ["aggressive-decoding", "parallel-jacobi-decoding", "speculative-sampling"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "records_folder", lambda: tmp_path)
    return tmp_path


def write(folder, slug, code):
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


def test_all_papers_are_listed_with_what_a_list_shows():
    listed = papers()
    assert {one.paper.slug for one in listed} == PAPERS.keys() >= set(SLUGS)
    assert [(one.paper.part, one.paper.slug) for one in listed] == sorted(
        (p.part, p.slug) for p in PAPERS.values()
    )
    first = json.loads(json.dumps(listed[0].to_json()))
    assert list(first) == ["slug", "title", "part", "status", "verdict"]
    assert all(one.status == "runs" and one.verdict is None for one in listed)


def test_every_method_of_a_paper_leads_to_its_card():
    slugs = {method.paper for method in METHODS.values() if method.paper}
    assert slugs and slugs <= PAPERS.keys()
    for slug in SLUGS:
        assert [method.name for method in entry(slug).methods] == [slug]


def test_the_status_follows_the_record(folder):
    slug = "speculative-sampling"
    code = digest(PAPERS[slug].module) if slug in PAPERS else digest(entry(slug).paper.module)
    path = write(folder, slug, code)
    assert (entry(slug).status, entry(slug).verdict) == ("checked", "does not hold")
    write(folder, slug, "0" * 64)
    assert (entry(slug).status, entry(slug).verdict) == ("stale", "does not hold")
    assert entry(slug).to_json()["verdict"] == "does not hold"
    path.unlink()
    assert (entry(slug).status, entry(slug).verdict) == ("runs", None)


def test_an_unknown_paper_is_told_with_the_nearest():
    with pytest.raises(FormeryError, match="did you mean speculative-sampling"):
        entry("speculative-samplin")


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("speculative sampling", "speculative-sampling"),
        ("Jacobi", "parallel-jacobi-decoding"),
        ("iterating equations", "parallel-jacobi-decoding"),
        ("modified rejection of drafts", "speculative-sampling"),
        ("correct grammar", "aggressive-decoding"),
        *((slug, slug) for slug in SLUGS),
    ],
)
def test_words_find_papers(query, first):
    found = search(query)
    assert found[0].paper.slug == first
    assert len({one.paper.slug for one in found}) == len(found)


def test_a_slug_finds_its_own_paper_first(monkeypatch):
    texts = {"tova": "x y z", "more-tova": "tova tova tova tova"}
    cards = {
        s: Paper(s, "A title", 2024, "cache", "language", t, "It claims.", module=__name__)
        for s, t in texts.items()
    }
    monkeypatch.setattr("formery.catalog.entries.PAPERS", cards)
    assert [one.paper.slug for one in search("tova tova")] == ["more-tova", "tova"]
    assert [one.paper.slug for one in search("TOVA ")] == ["tova", "more-tova"]


def test_words_that_nobody_uses_find_nothing():
    assert search("zymurgy") == search("") == search("the of") == []
