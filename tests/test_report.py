"""The table and the report: what they show is what was measured, in 80 columns and in one file."""

import io
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from formery.data.tokenizer import Tokenizer, train_bpe
from formery.evidence.compare import Comparison, MethodRow, Output
from formery.generate import Event, Generation
from formery.methods import discover
from formery.web.plots import COLOURS, quality_against_speed, tokens_per_call
from formery.web.report import headline, render, write_report
from formery.web.table import comparison_table
from formery.web.tokens import first_difference, pieces, token_texts
from formery.web.words import rate, share, size

discover()
TOKENIZER = train_bpe(["def area(radius): return 3.14 * radius ** 2\n"] * 3, 300)
EVIL = "<script>alert('x')</script><img src=http://example.org/x.png>"
VOID = {"meta", "link", "input", "br", "img"}


def method_row(method: str = "greedy", **changes: Any) -> MethodRow:
    data: dict[str, Any] = {
        "method": method,
        "lossless": method != "beam",
        "identical": 1.0,
        "quality": {"next_line_exact": 0.25, "chrf": 31.0, "signature": "v1"},
        "tokens_per_second": 1234.5,
        "calls_per_token": 1.0,
        "speedup": 1.0,
        "spread": (1.0, 1.0),
        "accepted_per_call": 0.0,
        "state_bytes": 3_145_728,
        "state_per_layer_token": 2048.0,
        "guarded": 0,
        "drafting": 0.0,
        "verifying": 0.9,
    }
    return MethodRow(**{**data, **changes})


def generation(prompt: str, calls: Sequence[tuple[list[int], int, list[int]]]) -> Generation:
    """A generation out of (drafted, accepted, emitted) of each call."""
    one = Generation(prompt)
    for number, (drafted, accepted, emitted) in enumerate(calls, 1):
        stop = "length" if number == len(calls) else None
        text = TOKENIZER.decode(emitted)
        one.add(Event(0, drafted=drafted, path=list(range(accepted)), emitted=emitted, text=text, stop=stop))
    return one


def comparison(rows: Sequence[MethodRow], prompt: str = "def f():", written: str = "return 1") -> Comparison:
    tokens = TOKENIZER.encode(written)
    plain = generation(prompt, [([], 0, [token]) for token in tokens])
    drafted = generation(prompt, [([*tokens, 7, 8], len(tokens) - 1, tokens)])
    other = generation(prompt, [([], 0, [token]) for token in [*tokens[:1], 65, 66]])
    outputs = {"greedy": plain, "beam": other}
    generations = {row.method: outputs.get(row.method, drafted) for row in rows}
    return Comparison(
        work="code",
        model="code",
        machine={"processor": "Processor", "cores": 2, "threads": 1, "memory_gib": 8.0, "system": "Linux 6"},
        rows=list(rows),
        outputs=[Output(f"{prompt} {i}", prompt, written, generations) for i in range(5)],
        settings={"max_new_tokens": 8, "seed": 0, "examples": 5, "batch": 1, "rounds": 3},
        shortened=1,
    )


ROWS = [
    method_row(),
    method_row("beam", identical=0.2, speedup=0.5, spread=(0.4, 0.6)),
    method_row("speculative-sampling", speedup=1.5, spread=(1.4, 1.6), accepted_per_call=2.0, guarded=3),
    method_row("parallel-jacobi-decoding:form=hybrid:block=12", speedup=0.98, spread=(0.91, 1.02)),
]


class Page(HTMLParser):
    """Collects what a page would load, its elements, and whether each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        named = dict(attributes)
        self.addresses += [
            named[key] or "" for key in ("src", "href", "xlink:href", "srcset") if key in named
        ]
        self.addresses += re.findall(r"url\(([^)]*)\)", named.get("style") or "")
        self.ids += [value for key, value in attributes if key == "id" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> str:
    return render(comparison(ROWS), TOKENIZER, "formery compare code")


def test_report_is_one_file_that_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert {address for address in parsed.addresses if not address.startswith(("#", "'#"))} == {"data:,"}
    assert not re.search(r"@import|https?://", page)
    assert len(parsed.ids) == len(set(parsed.ids))


@pytest.mark.parametrize("where", ["prompt", "written"])
def test_report_shows_markup_in_texts_as_text(where: str) -> None:
    page = render(comparison(ROWS, **{where: EVIL}), TOKENIZER, f"formery compare {EVIL}")
    tags = Page(page).tags
    assert "script" not in tags
    assert "img" not in tags
    shown = re.sub(r"<[^>]+>", "", page)  # what was written may be cut into pieces
    assert "&lt;script&gt;alert(&#39;x&#39;)" in shown


def test_report_has_every_row_example_and_setting(page: str) -> None:
    text = re.sub(r"<[^>]+>", " ", page)
    for expected in ("speculative-sampling", "form=hybrid block=12", "1.50", "1.40–1.60", "20 %", "3.0 MiB"):
        assert expected in text
    for expected in (
        "formery compare code",
        "Processor, 2 cores, 1 thread",
        "v1",
        "In 3 places",
        "1 prompts lost",
    ):
        assert expected in page
    assert page.count('<details class="example" open>') == 3
    assert page.count('<details class="example">') == 2
    assert page.count("≠ greedy") == 5  # beam, in each example


def test_report_is_written_whole(tmp_path: Any) -> None:
    write_report(comparison(ROWS), tmp_path / "report.html", TOKENIZER)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").endswith("</html>")


def test_report_without_quality_reference_draft_or_tokenizer() -> None:
    rows = [method_row(quality={}), method_row("beam", quality={}, identical=0.0)]
    bare = comparison(rows)
    page = render(
        Comparison(**{**bare.__dict__, "outputs": [Output("a", "p", "", bare.outputs[0].generations)]})
    )
    assert "Accepted tokens per call" not in page
    assert "outputs identical to greedy" in page
    assert "what a person wrote" not in page


@pytest.mark.parametrize("draw", [quality_against_speed, tokens_per_call])
def test_plots_are_elements_in_the_colours_of_the_page(draw: Any) -> None:
    svg = draw(comparison(ROWS))
    ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert svg.startswith("<svg")
    assert "speculative-sampling" in svg
    assert "var(--accepted)" in svg
    assert not any(stand_in in svg for stand_in in COLOURS)
    assert not re.search(r"#(?!\w*-)[0-9a-f]{6}\b(?!-)", svg)  # no colour that a dark page would not change
    for text in re.findall(r"<text[^>]*>", svg):
        assert "var(--ink)" in text


def test_accepted_plot_tells_the_means() -> None:
    rows = [method_row(), method_row("speculative-sampling")]
    tokens = len(TOKENIZER.encode("return 1"))
    assert f"{tokens - 1:.2f} of {tokens + 2}" in tokens_per_call(comparison(rows))


@pytest.mark.parametrize(
    ("best", "expected"),
    [
        (
            {"speedup": 1.5, "spread": (1.4, 1.6)},
            "speculative-sampling wrote greedy’s very text, 1.50 times as fast.",
        ),
        ({"speedup": 1.0, "spread": (0.9, 1.1)}, "about as fast: 0.90 to 1.10 times"),
        ({"speedup": 0.7, "spread": (0.6, 0.8)}, "No method was faster"),
        ({"speedup": 2.0, "spread": (1.9, 2.1), "identical": 0.9}, "No other method wrote"),
    ],
)
def test_headline_says_what_was_found(best: dict[str, Any], expected: str) -> None:
    rows = [
        method_row(),
        method_row("sampling", speedup=9.0, spread=(9.0, 9.0)),
        method_row("speculative-sampling", **best),
    ]
    assert expected in headline(rows)


@pytest.mark.parametrize("width", [80, 200])
def test_table_reads_at_80_columns(width: int) -> None:
    large = {
        "tokens_per_second": 98_765.4,
        "state_bytes": 1_073_000_000,
        "spread": (10.04, 12.04),
        "speedup": 11.2,
    }
    rows = [method_row(), *[method_row(row.method, **large) for row in ROWS[1:]]]
    console = Console(width=width, force_terminal=False, record=True, file=io.StringIO())
    console.print(comparison_table(comparison(rows)))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    for row in rows:
        name, _, options = row.method.partition(":")
        assert any(line.startswith(f"{name} ") for line in lines)
        assert not options or any(line.strip() == options.replace(":", " ") for line in lines)
    line = next(line for line in lines if line.startswith("parallel-jacobi"))
    assert line.split() == [
        "parallel-jacobi-decoding", "100", "%", "98,765", "11.2", "(10.0–12.0)", "1.00", "1.0", "GiB", "0.25",
    ]  # fmt: skip


def test_table_marks_a_broken_promise_and_nothing_else() -> None:
    def marked(row: MethodRow) -> bool:
        console = Console(
            width=80, force_terminal=True, color_system="standard", record=True, file=io.StringIO()
        )
        console.print(comparison_table(comparison([method_row(), row])))
        return "\x1b[1;31m" in console.export_text(styles=True)

    assert marked(method_row("speculative-sampling", identical=0.99))
    assert not marked(method_row("speculative-sampling"))
    assert not marked(method_row("sampling", identical=0.1))
    assert not marked(method_row("beam", identical=0.1))


def test_share_is_never_rounded_to_all_or_nothing() -> None:
    assert [share(x) for x in (0, 0.00001, 0.5, 2 / 3, 0.99999, 1)] == [
        "0 %",
        "0.1 %",
        "50 %",
        "66.7 %",
        "99.9 %",
        "100 %",
    ]


def test_numbers_have_three_digits() -> None:
    assert [rate(x) for x in (0.1234, 12.34, 99.96, 1234.5)] == ["0.12", "12.3", "100", "1,234"]
    assert [size(x) for x in (0, 1023, 1024, 20_000, 3_145_728)] == [
        "0 B",
        "1.0 KiB",
        "1.0 KiB",
        "20 KiB",
        "3.0 MiB",
    ]


@given(st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_token_texts_join_to_the_text(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert "".join(token_texts(tokens, TOKENIZER)) == TOKENIZER.decode(tokens)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_output_and_count_what_was_accepted(data: st.DataObject) -> None:
    token = st.integers(3, TOKENIZER.vocabulary_size - 1)
    calls = []
    for _ in range(data.draw(st.integers(1, 6))):
        drafted = data.draw(st.lists(token, max_size=4))
        accepted = data.draw(st.integers(0, len(drafted)))
        calls.append((drafted, accepted, [*drafted[:accepted], data.draw(token)]))
    one = generation("p", calls)
    difference = data.draw(st.none() | st.integers(0, len(one.tokens) - 1))
    found = pieces(one, TOKENIZER, difference)
    assert "".join(piece.text for piece in found if piece.kind != "rejected") == TOKENIZER.decode(one.tokens)
    assert sum(piece.differs for piece in found) <= (difference is not None)
    rejecting = sum(1 for drafted, accepted, _ in calls if accepted < len(drafted))
    assert sum(piece.kind == "rejected" for piece in found) == rejecting
    for piece in found:
        assert (piece.kind != "rejected") or "\n" not in piece.text


def test_pieces_say_where_each_token_came_from() -> None:
    a, b, c, d, e = (TOKENIZER.encode(letter)[0] for letter in "abcde")
    one = generation("p", [([a, b, c], 2, [a, b, d]), ([], 0, [e])])
    assert [(piece.text, piece.kind, piece.differs) for piece in pieces(one, TOKENIZER, difference=1)] == [
        ("a", "accepted", False), ("b", "accepted", True), ("c", "rejected", False), ("d", "target", False),
        ("e", "target", False),
    ]  # fmt: skip


def test_a_draft_beyond_the_end_was_not_rejected() -> None:
    one = generation("p", [([70, 71, 72], 2, [70, 71])])
    assert [piece.kind for piece in pieces(one, TOKENIZER)] == ["accepted"]


def test_first_difference() -> None:
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 3], [1, 2]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([1], [1, 2]) == 1


def test_tokens_without_a_tokenizer_are_numbers() -> None:
    one = generation("p", [([7], 0, [8])])
    assert [(piece.text, piece.kind) for piece in pieces(one, None)] == [("7 ", "rejected"), ("8 ", "target")]
    assert isinstance(TOKENIZER, Tokenizer)
