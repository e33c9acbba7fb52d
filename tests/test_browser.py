"""The pages in a real browser: search, filter, read, watch; by keyboard, on a phone, in the dark, without a server."""

import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from formery.catalog import cards
from formery.web.site import serve
from formery.web.site.app import Site
from formery.web.site.export import export

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no Chromium here", allow_module_level=True)

QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A server of the pages."""
    taken = serve.bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(Site().app(serve.hosts("127.0.0.1")), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    yield f"http://127.0.0.1:{taken.getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield one
        one.close()


class Watched:
    """A page whose every complaint and every request is noted."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.page: Page = browser.new_context(**options).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.set_default_timeout(20_000)
        self.page.on("console", lambda one: self.complaints.append(one.text))
        self.page.on("pageerror", lambda one: self.complaints.append(str(one)))
        self.page.on("request", lambda one: self.requests.append(one.url))

    def clean(self, address: str) -> None:
        """Nothing was complained of, and nothing asked for elsewhere."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith((address, "data:", "file://"))] == []
        self.page.context.close()


def accessible(page: Page) -> None:
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_search_filter_and_read(browser: Browser, address: str) -> None:
    seen = Watched(browser)
    page = seen.page
    page.goto(address)
    expect(page.locator("#count")).to_have_text(f"{len(cards())} papers")
    accessible(page)
    page.get_by_label("What do you need?").fill("smaller key-value cache by sharing it across layers")
    page.keyboard.press("Enter")
    expect(page.locator("#papers li").first).to_have_attribute("data-part", "cache")
    page.locator("select[name=part]").select_option("cache")
    expect(page).to_have_url(re.compile("part=cache"))
    assert {one.get_attribute("data-part") for one in page.locator("#papers li").all()} == {"cache"}
    assert "status=" not in page.url and "domain=" not in page.url
    page.get_by_role("link", name="MLKV", exact=True).click()
    expect(page.locator("h1")).to_contain_text("MLKV")
    accessible(page)
    page.locator(".near a").first.click()
    expect(page.locator("h1")).not_to_contain_text("MLKV")
    seen.clean(address)


def test_a_checked_paper_and_a_work(browser: Browser, address: str) -> None:
    seen = Watched(browser)
    page = seen.page
    page.goto(f"{address}papers/aggressive-decoding.html")
    expect(page.locator("#evidence")).to_be_visible()
    expect(page.locator("svg.chart").first).to_be_visible()
    page.get_by_text("All figures").click()
    accessible(page)
    page.get_by_role("link", name="Code, measured").click()
    expect(page.locator("svg.chart")).to_have_count(2)
    accessible(page)
    page.locator("svg.chart a text").first.click()
    expect(page).to_have_url(re.compile(r"/papers/[\w-]+\.html"))
    seen.clean(address)


def test_tokens_are_watched_to_the_end(browser: Browser, address: str) -> None:
    seen = Watched(browser)
    page = seen.page
    page.goto(f"{address}watch.html?method=aggressive-decoding")
    accessible(page)
    page.get_by_label("New tokens").fill("24")
    page.get_by_label("Pause").fill("0")
    page.get_by_label("Prompt").fill("def mean(values):\n    total = sum(values)\n    return total / len(values)\n\n")
    page.get_by_role("button", name="Watch").click()
    expect(page.locator("#said")).to_have_text("All the tokens that were asked for.")
    expect(page.locator("[data-count=tokens]")).to_have_text("24")
    calls = int(page.locator("[data-count=calls]").inner_text())
    assert page.locator("#log li").count() == calls <= 24
    assert page.locator("#written .accepted").count() == int(page.locator("[data-count=accepted]").inner_text())
    accessible(page)
    page.get_by_label("Prompt").fill("<img src=x onerror=alert(1)>" * 3)
    page.get_by_role("button", name="Watch").click()
    expect(page.locator("#given")).to_contain_text("<img src=x")
    expect(page.locator("#said")).to_have_text(re.compile("asked for|ended"))
    assert page.locator("#screen img").count() == 0
    seen.clean(address)


def test_a_run_is_stopped_and_stepped_by_hand(browser: Browser, address: str) -> None:
    seen = Watched(browser)
    page = seen.page
    page.goto(f"{address}watch.html?method=greedy")
    page.get_by_label("Pause").fill("1000")
    page.get_by_role("button", name="Watch").click()
    expect(page.locator("#log li").first).to_be_visible()
    page.get_by_role("button", name="One call").click()
    expect(page.locator("#log li").nth(1)).to_be_visible(timeout=900)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#said")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Watch")).to_be_enabled()
    page.locator("select[name=model]").select_option("translate")
    expect(page.get_by_label("Prompt")).to_have_value(re.compile("football"))
    page.get_by_label("New tokens").evaluate("field => { field.max = 9999; field.value = 9999; }")
    page.get_by_role("button", name="Watch").click()
    expect(page.locator("#said")).to_contain_text("from 1 to 256")
    page.context.close()  # the refusal is a complaint of the browser's


def test_by_keyboard_alone(browser: Browser, address: str) -> None:
    seen = Watched(browser)
    page = seen.page
    page.goto(address)
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('#papers a')"):
            break
    page.keyboard.press("Enter")
    expect(page).to_have_url(re.compile(r"/papers/"))
    seen.clean(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["", "papers/eagle.html", "works/code.html", "watch.html"])
def test_on_a_phone_and_in_the_dark(browser: Browser, address: str, path: str, scheme: Any) -> None:
    seen = Watched(browser, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    seen.page.goto(f"{address}{path}")
    wide = seen.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 360, "the page is wider than the phone"
    accessible(seen.page)
    seen.clean(address)


def test_an_export_opens_from_the_disk_and_searches_itself(browser: Browser, tmp_path: Path) -> None:
    export(tmp_path / "pages")
    seen = Watched(browser)
    page = seen.page
    page.goto((tmp_path / "pages" / "index.html").as_uri())
    expect(page.locator("#count")).to_have_text(f"{len(cards())} papers")
    page.get_by_label("What do you need?").fill("watch people in a crowd be counted")
    expect(page.locator("#papers li").first).to_have_id("m-sfanet-m-segnet")
    page.get_by_label("What do you need?").fill("")
    page.locator("select[name=training]").select_option("no")
    assert {one.get_attribute("data-training") for one in page.locator("#papers li").all()} == {"no"}
    page.locator("#papers a").first.click()
    expect(page.locator("h1")).to_be_visible()
    page.get_by_role("link", name="Formery").click()
    expect(page.locator("#count")).to_be_visible()
    seen.clean("file://")
