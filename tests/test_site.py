"""The pages: what they say, that they keep to themselves, and that the viewer is bounded and can be left."""

import asyncio
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag, urljoin
from xml.etree import ElementTree

import httpx
import pytest
import uvicorn
from starlette.testclient import TestClient

import formery
from formery.catalog import cards
from formery.errors import FormeryError
from formery.web.site import app as app_room
from formery.web.site import serve, viewer
from formery.web.site.app import Site
from formery.web.site.charts import Range, Spot, ranges, scatter
from formery.web.site.export import export
from formery.web.site.viewer import Busy, Run, Viewer

HOST = "http://127.0.0.1"
EVIL = '<script>alert("x")</script> & \' "'


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(Site().app(serve.hosts("127.0.0.1")), base_url=HOST, raise_server_exceptions=False) as one:
        yield one


class Page(HTMLParser):
    """What a page links to, what ids it has, and whether its tags close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.inline: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        attributes = dict(given)
        self.links += [str(attributes[name]) for name in ("href", "src", "action") if attributes.get(name)]
        self.ids += [str(attributes["id"])] if attributes.get("id") else []
        self.inline += [name for name in attributes if name.startswith("on") or name == "style"]
        if tag not in ("meta", "link", "input", "br", "img", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        """A tag of a drawing that has nothing inside."""

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open[-1] in ("p", "li", "option") and self.open[-1] != tag:
            self.open.pop()
        assert self.open and self.open.pop() == tag, tag


# Pages


@pytest.mark.parametrize("path", ["/", "/papers/eagle.html", "/papers/tova.html", "/papers/text-ranking-survey.html",
                                  "/works/code.html", "/watch.html", "/nowhere"])  # fmt: skip
def test_pages_are_whole_and_keep_to_themselves(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == (404 if path == "/nowhere" else 200)
    page = Page(answer.text)
    assert len(page.ids) == len({*page.ids})
    assert page.inline == []  # the policy forbids them
    assert not [link for link in page.links if re.match(r"(https?:)?//", link)]
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_every_link_of_the_list_leads_somewhere(client: TestClient) -> None:
    page = Page(client.get("/").text)
    papers = {link for link in page.links if link.startswith("papers/")}
    assert papers == {f"papers/{slug}.html" for slug in cards()}
    for link in {*page.links} - papers - {"data:,"}:
        assert client.get(urldefrag(urljoin("/", link)).url).status_code == 200, link


def test_a_paper_has_card_evidence_code_and_neighbours(client: TestClient) -> None:
    text = client.get("/papers/speculative-sampling.html").text
    for expected in ("modified rejection", "formery verify speculative-sampling", "What was measured", "The code",
                     "<svg", 'href="specdec.html"', "watch.html?method=speculative-sampling"):  # fmt: skip
        assert expected in text, expected
    entry = client.get("/papers/differentiable-cache-augmentation.html").text
    assert "What was measured" not in entry and "formery verify" not in entry and "phd-transformer.html" in entry


def test_the_list_is_searched_and_filtered(client: TestClient) -> None:
    def found(**asked: str) -> list[str]:
        return re.findall(r'<li id="([^"]+)"', client.get("/", params=asked).text)

    everything = found()
    assert len(everything) == len(cards())
    assert found(q="TOVA")[0] == "tova"
    assert {cards()[slug].part for slug in found(part="cache")} == {"cache"}
    some = found(lossless="yes", training="no", q="decoding")
    assert some and all(cards()[slug].exact and cards()[slug].training == "none" for slug in some)
    assert found(q="zymurgy") == []
    assert 'id="nothing" class="note">' in client.get("/", params={"q": "zymurgy"}).text


def test_a_wrong_filter_is_told(client: TestClient) -> None:
    answer = client.get("/", params={"part": "atention"})
    assert answer.status_code == 400 and "did you mean attention" in answer.text


def test_what_a_reader_writes_is_never_markup(client: TestClient) -> None:
    for path in ("/", "/watch.html"):
        text = client.get(path, params={"q": EVIL, "method": EVIL, "part": ""}).text
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in client.get("/", params={"q": EVIL}).text
    answer = client.get(f"/papers/{EVIL.replace('/', '')}.html")
    assert answer.status_code == 404 and "<script>alert" not in answer.text


def test_the_feed_is_served(client: TestClient) -> None:
    answer = client.get("/feed.xml", params={"since": "2026-01-01"})
    assert answer.headers["content-type"].startswith("application/atom+xml")
    links = [one.get("href", "") for one in ElementTree.fromstring(answer.text).iter("{http://www.w3.org/2005/Atom}link")]
    assert f"{HOST}/papers/tova.html" in links
    assert client.get("/feed.xml", params={"since": "soon"}).status_code == 400


def test_a_page_elsewhere_cannot_reach_the_server_by_a_name_of_its_own(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    for host in ("localhost", "127.0.0.1:1234"):
        assert client.get("/", headers={"host": host}).status_code == 200


def test_pages_are_shown_without_torch() -> None:
    code = (
        "import sys\nfrom starlette.testclient import TestClient\nfrom formery.web.site.app import Site\n"
        "with TestClient(Site().app(['*'])) as client:\n"
        "    for path in ('/', '/?q=draft', '/papers/eagle.html', '/works/code.html', '/watch.html', '/feed.xml'):\n"
        "        assert client.get(path).status_code == 200, path\n"
        "print({'torch', 'matplotlib'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "set()"


# Charts


def test_charts_escape_what_they_name_and_stay_inside() -> None:
    for drawn in (
        ranges([Range(EVIL, 1.0, 0.5, 1.5)], EVIL, 1.0),
        scatter([Spot(EVIL, 1.0, 0.9, 1.1, 100.0, True, EVIL)], EVIL, EVIL, (0, 100)),
    ):
        assert "<script" not in drawn
        ElementTree.fromstring(drawn)
    spots = [Spot(f"method-{i}", 1 + i / 100, 0.9, 1.2, 100.0, i % 2 == 0, "#") for i in range(25)]
    tree = ElementTree.fromstring(scatter(spots, "x", "y", (0, 100)))
    _, _, width, height = map(float, tree.get("viewBox", "").split())
    for text in tree.iter("text"):
        assert 0 <= float(text.get("x", "")) <= width and 0 <= float(text.get("y", "")) <= height
    labels = [(float(a[1].get("x", "")), float(a[1].get("y", "")), len(a[1].text or "")) for a in tree.iter("a")]
    for i, (x, y, length) in enumerate(labels):
        for other_x, other_y, other in labels[:i]:
            assert abs(y - other_y) > 10 or x + 6 * length <= other_x or other_x + 6 * other <= x


def test_charts_of_nothing_are_nothing() -> None:
    assert ranges([], "x") == scatter([], "x", "y") == ""


# The viewer


def asked(**others: Any) -> dict[str, Any]:
    return {"model": "code", "method": "greedy", "prompt": "def add(a, b):\n", "tokens": 8, **others}


def watched(client: TestClient, **others: Any) -> list[dict[str, Any]]:
    answer = client.post("/watch/run", json=asked(**others))
    assert answer.status_code == 200
    return [json.loads(line) for line in answer.text.splitlines()]


@pytest.mark.parametrize("method", ["greedy", "aggressive-decoding", "eagle", "stree"])
def test_the_viewer_shows_what_the_library_writes(client: TestClient, method: str) -> None:
    prompt = "def mean(values):\n    total = sum(values)\n    count = len(values)\n"
    lines = watched(client, method=method, prompt=prompt, tokens=24)
    calls = [one for one in lines if "texts" in one]
    texts: list[str] = []
    for call in calls:
        texts[call["from"] :] = call["texts"]
        assert call["accepted"] <= sum(one["stands"] for one in call["guesses"]) and call["written"] >= 1
        assert all(-1 <= one["parent"] < place for place, one in enumerate(call["guesses"]))
    [plain] = formery.generate(formery.load("code"), [prompt], max_new_tokens=24)
    assert "".join(texts) == plain.text and calls[-1]["stop"] == plain.stop
    assert calls[-1]["totals"]["tokens"] == len(plain.tokens) and calls[-1]["totals"]["calls"] == len(calls)
    assert [one["stop"] for one in calls[:-1]] == [None] * (len(calls) - 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": " "}, "no prompt"),
        ({"prompt": "x" * 5000}, "5,000 characters"),
        ({"tokens": 0}, "from 1 to 256"),
        ({"tokens": 257}, "from 1 to 256"),
        ({"tokens": "8"}, "tokens should be of kind int"),
        ({"tokens": True}, "tokens should be of kind int"),
        ({"temperature": -1}, "temperature of -1"),
        ({"temperature": "hot"}, "temperature should be a number"),
        ({"model": "../../etc"}, "no model"),
        ({"method": "specdec"}, "no method 'specdec' can be watched on code"),
        ({"method": "nonsense"}, "no method"),
        ({"colour": 1}, "has the fields"),
    ],
)
def test_a_run_beyond_its_bounds_is_refused(client: TestClient, given: dict[str, Any], said: str) -> None:
    answer = client.post("/watch/run", json=asked(**given))
    assert answer.status_code == 400 and said in answer.json()["error"]


def test_a_request_that_is_no_run_is_refused(client: TestClient) -> None:
    assert client.post("/watch/run", content=b"{").status_code == 400
    assert client.post("/watch/run", content=b"[]").status_code == 400
    assert client.post("/watch/run", content=b"x" * 70_000).json()["error"].startswith("a request of more than")
    assert client.get("/watch/run").status_code == 405
    elsewhere = client.post("/watch/run", json=asked(), headers={"sec-fetch-site": "cross-site"})
    assert elsewhere.status_code == 403


def test_what_a_run_stumbles_on_is_told(client: TestClient) -> None:
    long = watched(client, prompt="x = 1\n" * 600, tokens=200)
    assert "error" in long[-1] and "tokens" in long[-1]["error"]


def test_a_run_that_takes_too_long_ends() -> None:
    lines = list(viewer.follow(Run(**asked(tokens=200)), seconds=0.0))
    assert lines[-1]["stop"] == "time" and len(lines) == 2


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Runs that would take long; counts how many began and ended."""
    counts = {"begun": 0, "ended": 0}

    def follow(run: Run, seconds: float) -> Iterator[dict[str, Any]]:
        counts["begun"] += 1
        try:
            for number in range(2000):
                time.sleep(0.005)
                yield {"number": number}
        finally:
            counts["ended"] += 1

    monkeypatch.setattr(viewer, "follow", follow)
    return counts


def test_a_run_ends_when_nobody_looks_any_more(slow: dict[str, int]) -> None:
    async def look() -> None:
        watcher = Viewer(runs=1)
        watcher.admit()
        events = watcher.events(Run(**asked()))
        assert [(await anext(events))["number"] for _ in range(3)] == [0, 1, 2]
        await events.aclose()
        assert (slow, watcher.under_way, watcher.free.locked()) == ({"begun": 1, "ended": 1}, 0, False)

    threads = threading.active_count()
    asyncio.run(look())
    assert threading.active_count() <= threads + 1


def test_a_run_ends_when_a_browser_closes_its_connection(slow: dict[str, int]) -> None:
    site, taken = Site(runs=1), serve.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(site.app(["*"]), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    address = f"http://127.0.0.1:{taken.getsockname()[1]}/watch/run"
    try:
        with httpx.stream("POST", address, json=asked()) as answer:
            lines = answer.iter_lines()  # the connection closes when nobody holds them
            assert json.loads(next(lines)) == {"number": 0}
            assert site.viewer.under_way == 1
        deadline = time.monotonic() + 10
        while site.viewer.under_way and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (site.viewer.under_way, slow) == (0, {"begun": 1, "ended": 1})
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


def test_runs_wait_for_a_place_and_are_refused_when_too_many_wait(slow: dict[str, int]) -> None:
    async def look() -> None:
        watcher = Viewer(runs=1)
        for _ in range(1 + viewer.WAITING):
            watcher.admit()
        with pytest.raises(Busy):
            watcher.admit()
        first, second = watcher.events(Run(**asked())), watcher.events(Run(**asked()))
        assert await anext(first) == {"number": 0}
        assert await anext(second) == {"waiting": True}
        assert slow["begun"] == 1
        await first.aclose()
        assert await anext(second) == {"number": 0}
        await second.aclose()
        assert slow == {"begun": 2, "ended": 2}

    asyncio.run(look())


def test_too_many_runs_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "WAITING", 0)
    site = Site(runs=1)
    with TestClient(site.app(["*"]), base_url=HOST) as client:
        site.viewer.under_way = 1
        answer = client.post("/watch/run", json=asked())
        assert answer.status_code == 503 and answer.headers["retry-after"] and "places" in answer.json()["error"]
    with pytest.raises(FormeryError, match="at least 1"):
        Viewer(runs=0)


def test_a_failure_is_told_without_its_insides(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret path /root")

    monkeypatch.setattr(app_room, "search", broken)
    with TestClient(Site().app(["*"]), base_url=HOST, raise_server_exceptions=False) as client:
        answer = client.get("/", params={"q": "x"})
    assert answer.status_code == 500 and "secret" not in answer.text


# The export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site") / "pages"
    assert export(folder) > len(cards())
    return folder


def test_an_export_is_the_same_pages_with_links_that_work_from_a_disk(exported: Path, client: TestClient) -> None:
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {f"papers/{slug}.html" for slug in cards()} < files and "watch.html" not in files
    for name in ["index.html", "works/code.html", "papers/eagle.html", "papers/tova.html", "papers/big-bench.html"]:
        page = Page((exported / name).read_text())
        for link in page.links:
            place = urldefrag(urljoin(f"http://x/{name}", link))
            assert link == "data:," or link == "./" or place.url.removeprefix("http://x/") in files, (name, link)
    served, written = client.get("/papers/tova.html").text, (exported / "papers/tova.html").read_text()
    assert re.findall(r"<dd>.*?</dd>", served) == re.findall(r"<dd>.*?</dd>", written)


def test_an_export_replaces_only_an_export(exported: Path, tmp_path: Path) -> None:
    export(exported)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FormeryError, match="holds no pages"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# Serving


def test_a_port_that_is_taken_and_a_host_that_is_not_here_are_told() -> None:
    with serve.bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(FormeryError, match="choose another --port"):
            serve.bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(FormeryError, match="cannot serve on no-such-host.invalid"):
        serve.bind("no-such-host.invalid", 0)
    for port in (-1, 65536, 99999):
        with pytest.raises(FormeryError, match="from 1 to 65535"):
            serve.bind("127.0.0.1", port)


@pytest.mark.parametrize(("host", "is_local"), [("127.0.0.1", True), ("::1", True), ("localhost", True),
                                                ("0.0.0.0", False), ("example.org", False)])  # fmt: skip
def test_only_loopback_is_local(host: str, is_local: bool) -> None:
    assert serve.local(host) is is_local
    assert (serve.hosts(host) == ["*"]) is not is_local
