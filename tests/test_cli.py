"""The command line: exact JSON, text as it comes, and one clear sentence for whatever goes wrong."""

import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Ran

import formery
from formery.data.tokenizer import train_bpe
from formery.models import Model
from formery.models.compose import language_model, translator

SOURCE = str(Path(formery.__file__).parents[1])
COMMANDS = ("compare", "generate", "papers", "show", "verify", "digest", "web", "train", "plan", "data")
TEXT = ["def area(radius):\n    return 3.14 * radius ** 2\n", "the cat sat on the mat\n"] * 3


@pytest.fixture
def refused(run: Callable[..., Ran]) -> Callable[..., str]:
    """Runs a command line that must fail with one sentence, and gives that sentence."""

    def refused(*arguments: object) -> str:
        ran = run(*arguments)
        assert ran.code == 2
        assert ran.out == ""
        assert re.fullmatch(r"formery: [^\n]+[.?)]\n", ran.err), ran.err
        return ran.err

    return refused


def made(folder: Path, **changes: Any) -> Path:
    """A tiny model of random weights, saved."""
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXT, 300)
    size = {"width": 16, "layers": 2, "heads": 2, "key_value_heads": 1, "hidden": 32, "max_length": 128}
    vocabulary = changes.pop("vocabulary", tokenizer.vocabulary_size)
    model: Model = language_model(vocabulary, **{**size, **changes})
    model.tokenizer = tokenizer
    formery.save(model, folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("models") / "draft", layers=1)


@pytest.fixture(scope="module")
def translating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXT, 300)
    assert tokenizer.bos is not None
    model = translator(tokenizer.vocabulary_size, 16, 1, 1, 2, 32, 64, tokenizer.bos)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("models") / "translator"
    formery.save(model, folder)
    return folder


def process(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """The program in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": SOURCE, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [sys.executable, "-m", "formery", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


# Starting


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from formery.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as stop: print(stop.code, {'torch', 'matplotlib', 'rich'} & {*sys.modules})"
    )
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 set()"
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


def test_no_arguments_and_version(run: Callable[..., Ran]) -> None:
    assert run().out.startswith("Usage: formery")
    assert run("--version") == Ran(0, f"{formery.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_that_fits(run: Callable[..., Ran], command: str) -> None:
    ran = run(command, "--help")
    assert ran.code == 0
    assert max(map(len, ran.out.splitlines())) <= 80


# Generating


def test_generate_prints_the_text_of_the_library(run: Callable[..., Ran], model: Path) -> None:
    expected = formery.generate(formery.load(model), ["def area("], max_new_tokens=12)[0]
    ran = run("generate", "--model", model, "--max-new-tokens", 12, "def area(")
    assert ran.code == 0
    assert ran.out == expected.text + "\n"
    assert re.match(r"\d+ tokens in \d+ calls; .*tokens/s; ", ran.err)


def test_generate_writes_the_promised_json(run: Callable[..., Ran], model: Path, draft: Path, tmp_path: Path) -> None:
    prompts = ["def area(radius", "the cat"]
    options = ("--method", "speculative-sampling:length=3", "--draft", draft, "--max-new-tokens", 9)
    ran = run("generate", "--model", model, *options, "--json", tmp_path / "out.json", *prompts)
    assert ran.code == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [list(one) for one in found] == [["prompt", "text", "tokens", "calls", "drafted", "accepted", "stop"]] * 2
    plain = formery.generate(formery.load(model), prompts, max_new_tokens=9)
    assert [one["tokens"] for one in found] == [one.tokens for one in plain]
    assert [one["prompt"] for one in found] == prompts
    assert all(one["drafted"] > 0 and one["calls"] <= 9 for one in found)
    for number, one in enumerate(found, 1):
        assert f"--- prompt {number} of 2: {one['prompt']}\n{one['text']}\n" in ran.out


def test_generate_json_on_stdout_is_nothing_but_json(run: Callable[..., Ran], model: Path) -> None:
    ran = run("generate", "--model", model, "--max-new-tokens", 3, "--json", "-", "a", "b")
    assert [one["prompt"] for one in json.loads(ran.out)] == ["a", "b"]


def test_generate_draws_by_its_seed(run: Callable[..., Ran], model: Path) -> None:
    def drawn(*options: object) -> str:
        return run("generate", "--model", model, "--max-new-tokens", 20, "the", *options).out

    assert drawn("--temperature", 1) == drawn("--method", "sampling") != drawn("--temperature", 1, "--seed", 1)
    assert drawn("--temperature", 1, "--top-k", 1) == drawn() == drawn("--temperature", 0)


def test_generate_reads_prompts_from_files(
    run: Callable[..., Ran], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompts(*arguments: object) -> list[str]:
        ran = run("generate", "--model", model, "--max-new-tokens", 2, "--json", "-", *arguments)
        return [one["prompt"] for one in json.loads(ran.out)]

    (tmp_path / "a.txt").write_text("two\nlines\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n\n{"prompt": "two", "reference": "x"}\n')
    (tmp_path / "a.py").write_text(FUNCTION)
    assert prompts("--input", tmp_path / "a.txt") == ["two\nlines"]
    assert prompts("--input", tmp_path / "a.jsonl") == ["one", "two"]
    assert prompts("first", "--input", tmp_path / "a.jsonl") == ["first", "one", "two"]
    assert prompts("--input", tmp_path / "a.py") == [FUNCTION.removesuffix("\n")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("żółw\r\n".encode())))
    assert prompts("--input", "-") == ["żółw"]


def test_generate_draws_its_dependency_graph(run: Callable[..., Ran], model: Path, tmp_path: Path) -> None:
    options = (
        "--method",
        "parallel-jacobi-decoding",
        "--max-new-tokens",
        8,
        "--picture",
        tmp_path / "graph.svg",
    )
    assert run("generate", "--model", model, *options, "the cat").code == 0
    assert "<svg" in (tmp_path / "graph.svg").read_text(encoding="utf-8")


def test_a_translator_reads_and_writes_a_line_at_a_time(
    run: Callable[..., Ran], translating: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("the cat\n\n  the mat \n")
    ran = run(
        "generate",
        "--model",
        translating,
        "--max-new-tokens",
        3,
        "--json",
        "-",
        "--input",
        tmp_path / "a.txt",
    )
    assert [one["prompt"] for one in json.loads(ran.out)] == ["the cat", "the mat"]
    assert "--- prompt" not in run("generate", "--model", translating, "--max-new-tokens", 3, "a", "b").out


# Comparing

FUNCTION = (
    "def area(radius):\n" + "".join(f"    value_{i} = radius * {i}\n" for i in range(6)) + "    a = 1\n    return a\n"
)
ROW = [
    "method",
    "lossless",
    "identical",
    "quality",
    "tokens_per_second",
    "calls_per_token",
    "speedup",
    "state_bytes",
]


@pytest.fixture(scope="module")
def compared(model: Path, draft: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, Path]:
    """All methods on two examples of the standard library, in a process of its own."""
    folder = tmp_path_factory.mktemp("compared")
    files = ("--json", folder / "out.json", "--html", folder / "out.html")
    options = ("--model", model, "--draft", draft, "--limit", 2, "--max-new-tokens", 6, *files)
    done = process("compare", "code", *options)
    out, err = done.communicate(timeout=900)
    return Ran(done.returncode, out, err), folder


def test_compare_runs_every_method(compared: tuple[Ran, Path]) -> None:
    from formery.generate import METHODS
    from formery.methods import discover

    discover()
    ran, folder = compared
    assert ran.code == 0, ran.err
    data = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert list(data)[:4] == ["work", "model", "machine", "rows"]
    assert data["work"] == "code"
    assert all(list(row)[: len(ROW)] == ROW for row in data["rows"])
    names = [row["method"] for row in data["rows"]]
    assert names[0] == "greedy"
    # A guide is for one model, and none was trained for this one.
    able = {name for name, one in METHODS.items() if not (one.guided and one.needs_draft)}
    assert {name.split(":")[0] for name in names} == able
    assert "parallel-jacobi-decoding:form=plain" in names
    for row in data["rows"]:
        if row["lossless"] and row["method"] != "sampling":
            assert row["identical"] == 1
        assert list(row["quality"]) == ["next_line_exact"]


def test_compare_prints_a_plain_table_in_80_columns(compared: tuple[Ran, Path]) -> None:
    ran, folder = compared
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "\x1b" not in ran.out + ran.err
    assert re.search(r"^speculative-sampling +100 % ", ran.out, re.MULTILINE)
    assert sorted(path.name for path in folder.iterdir()) == ["out.html", "out.json"]
    page = (folder / "out.html").read_text(encoding="utf-8")
    assert "speculative-sampling" in page
    assert "formery compare code --model" in page


def test_compare_on_functions_of_ones_own(run: Callable[..., Ran], model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(FUNCTION * 2)
    options = ("--model", model, "--methods", "aggressive-decoding", "--max-new-tokens", 4, "--json", "-")
    ran = run("compare", *options, "--input", tmp_path / "own.py")
    data = json.loads(ran.out)
    assert data["settings"]["examples"] == 2
    assert [row["method"] for row in data["rows"]] == ["greedy", "aggressive-decoding"]
    assert "aggressive-decoding" in ran.err  # the table makes way for the JSON


def test_compare_says_which_methods_it_leaves_out(run: Callable[..., Ran], model: Path) -> None:
    ran = run("compare", "--model", model, "--limit", 1, "--max-new-tokens", 2)
    assert ran.code == 0
    assert re.search(r"without .*medusa, .*speculative-sampling.*: no draft ships", ran.err)
    assert "speculative-sampling" not in ran.out


# Papers


def test_papers_json_is_as_promised(run: Callable[..., Ran]) -> None:
    listed = json.loads(run("papers", "--json").out)
    assert {"speculative-sampling", "aggressive-decoding", "parallel-jacobi-decoding"} <= {
        one["slug"] for one in listed
    }
    assert all({"slug", "title", "part", "status", "verdict"} <= one.keys() for one in listed)
    found = json.loads(run("papers", "modified", "rejection", "--json").out)
    assert found[0]["slug"] == "speculative-sampling"
    assert json.loads(run("papers", "zzzz", "--json").out) == []


def test_papers_and_cards_read_at_80_columns(run: Callable[..., Ran]) -> None:
    listed, shown = run("papers"), run("show", "speculative-sampling")
    for ran in (listed, shown):
        assert ran.code == 0
        assert max(map(len, ran.out.splitlines())) <= 80
    assert "aggressive-decoding" in listed.out
    for expected in ("Accelerating Large Language Model Decoding", "formery verify speculative-sampling"):
        assert expected in shown.out
    assert "formery compare code --methods speculative-sampling" in shown.out


def test_show_json_has_card_and_evidence(run: Callable[..., Ran]) -> None:
    data = json.loads(run("show", "aggressive-decoding", "--json").out)
    assert data["claims"] and data["status"]
    assert [one["name"] for one in data["methods"]] == ["aggressive-decoding"]
    assert "formery verify aggressive-decoding" in data["commands"]
    assert (data["record"] is None) == (data["verdict"] is None)


def test_verify_prints_what_the_check_saw(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    from formery.evidence import verify
    from formery.evidence.record import Record
    from formery.evidence.verdict import Criterion

    criteria = [
        Criterion("fewer", "fewer calls than tokens", "<", 1.0, 0.5, 0.4, 0.6, essential=True),
        Criterion("faster", "faster than greedy", ">", 1.0, 0.7, 0.7, 0.7),
        Criterion("large", "faster at 70 B", ">", 2.0, untestable="needs a model of that size"),
    ]
    record = Record(
        "some-paper", "holds in part", "It is fast.", criteria, [], "greedy", ["A note."], {}, {},
        {"cores": 2}, {"python": "3.11"}, "2030-01-02T03:04:05", 61.0, "0" * 64,
    )  # fmt: skip
    monkeypatch.setattr(verify, "verify", lambda slug, progress: record)
    ran = run("verify", "some-paper")
    assert ran.code == 0
    for expected in ("verdict: holds in part", "0.5 (0.4–0.6)", "needs a model of that", "✓", "✗", "A note."):
        assert expected in ran.out
    assert json.loads(run("verify", "some-paper", "--json").out)["verdict"] == "holds in part"


# Training and data


def test_train_lists_and_passes_on(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from formery.evidence import card

    asked: list[object] = []
    monkeypatch.setattr(card, "train_and_ship", lambda *arguments: asked.extend(arguments))
    assert re.search(r"^code-draft +\S", run("train", "--list").out, re.MULTILINE)
    ran = run("train", "code", "--max-steps", 3, "--out", tmp_path, "--resume")
    assert ran.code == 0
    assert asked == ["code", tmp_path, 3, True]
    assert "--resume goes on" in ran.err


def test_data_lists_what_is_here(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORMERY_DATA", str(tmp_path))
    monkeypatch.setenv("FORMERY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "lm_tinyshakespeare").mkdir()
    (tmp_path / "lm_tinyshakespeare" / "input.txt").write_text("x")
    ran = run("data", "list")
    assert re.search(r"^multi30k +no ", ran.out, re.MULTILINE)
    assert re.search(r"^tiny-shakespeare yes ", ran.out, re.MULTILINE)
    assert "licence" in ran.out


# What goes wrong


def test_wrong_command_lines(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert "no such command 'compair'" in refused("compair")
    assert "no such option: --foo" in refused("compare", "--foo")
    assert "invalid value for '--limit'" in refused("compare", "--limit", "x")
    assert "missing argument" in refused("show")
    assert "missing command" in refused("data")
    assert "at least 1" in refused("compare", "--model", model, "--limit", 0)
    assert "max_new_tokens must be at least 1" in refused("generate", "--model", model, "--max-new-tokens", 0, "a")
    assert "temperature must be" in refused("generate", "--model", model, "--temperature", -1, "a")
    assert "names no method" in refused("compare", "--model", model, "--methods", ",")
    assert "name a recipe" in refused("train")
    assert "draws one text" in refused("generate", "--model", model, "--picture", tmp_path / "a.png", "a", "b")
    assert "should end in .png" in refused("generate", "--model", model, "--picture", tmp_path / "a.gif", "a")
    assert "is a folder" in refused("generate", "--model", model, "--json", tmp_path, "a")


def test_names_that_are_not_known(refused: Callable[..., str], model: Path) -> None:
    assert "did you mean greedy" in refused("generate", "--model", model, "--method", "gredy", "a")
    assert "aggressive-decoding" in refused("compare", "--model", model, "--methods", "agressive-decoding")
    assert "did you mean length" in refused(
        "generate", "--model", model, "--method", "aggressive-decoding:lenght=2", "a"
    )
    assert "did you mean speculative-sampling?" in refused("show", "speculativ-sampling")
    assert "did you mean speculative-sampling?" in refused("verify", "speculativ-sampling")
    assert "did you mean translate" in refused("train", "translat")
    assert "did you mean code?" in refused("compare", "cod")
    assert "did you mean multi30k?" in refused("data", "get", "multi30")
    assert "no paper here" in refused("papers", "zzzz")


def test_prompts_that_are_no_good(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    def ask(*arguments: object) -> str:
        return refused("generate", "--model", model, "--json", tmp_path / "out.json", *arguments)

    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "no.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "no.jsonl").write_text("{")
    assert "there is no prompt" in ask()
    assert "prompt 1 is empty" in ask("")
    assert "prompt 2 is empty" in ask("a", " \n")
    assert "more than this model takes (128)" in ask("cat " * 300)
    assert "holds no prompt" in ask("--input", tmp_path / "empty.txt")
    assert "byte 0 is not UTF-8" in ask("--input", tmp_path / "no.txt")
    assert "line 2 of" in ask("--input", tmp_path / "bad.jsonl")
    assert "is not JSON" in ask("--input", tmp_path / "no.jsonl")
    assert "there is no file" in ask("--input", tmp_path / "absent.txt")
    assert "cannot be read" in ask("--input", tmp_path)
    assert "surrogate" in ask("a\udcff")
    assert not (tmp_path / "out.json").exists()


def test_checkpoints_that_are_no_good(refused: Callable[..., str], tmp_path: Path) -> None:
    def ask(path: object) -> str:
        return refused("generate", "--model", path, "a")

    assert "there is no checkpoint at" in ask(tmp_path / "absent")
    (tmp_path / "model.bin").write_bytes(b"\x80\x04")
    assert "is a pickle" in ask(tmp_path / "model.bin")

    weights = made(tmp_path / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in ask(tmp_path / "truncated")

    made(tmp_path / "shape")
    made(tmp_path / "wide", width=32)
    os.replace(tmp_path / "wide" / "model.safetensors", tmp_path / "shape" / "model.safetensors")
    assert "has shape" in ask(tmp_path / "shape")

    description = made(tmp_path / "part") / "formery.json"
    description.write_text(description.read_text().replace('"Rotary"', '"Rotory"'))
    assert "Rotory" in ask(tmp_path / "part")

    made(tmp_path / "pickled")
    os.replace(tmp_path / "pickled" / "model.safetensors", tmp_path / "pickled" / "model.bin")
    assert "pickle" in ask(tmp_path / "pickled")


def test_drafts_that_are_no_good(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    other = made(tmp_path / "other", vocabulary=310)
    ask = ("generate", "--model", model, "--method", "speculative-sampling")
    assert "vocabulary" in refused(*ask, "--draft", other, "a")
    assert "smaller model to draft with" in refused(*ask, "a")
    assert "there is no checkpoint" in refused(*ask, "--draft", tmp_path / "absent", "a")


def test_full_disk_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def small_files_only() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    done = process(
        "generate", "--model", model, "--max-new-tokens", 2, "--json", tmp_path / "out.json", "a",
        preexec_fn=small_files_only,
    )  # fmt: skip
    _, err = done.communicate(timeout=600)
    assert done.returncode == 2
    assert "cannot write" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    endless = made(tmp_path / "endless", max_length=100_000)
    out = tmp_path / "out"
    out.mkdir()
    options = ("--max-new-tokens", 90_000, "--json", out / "a.json")
    running = process("generate", "--model", endless, *options, "the cat sat")
    assert running.stdout is not None
    assert running.stdout.read(1)  # it writes
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 130
    assert err == "formery: stopped by Ctrl-C; no file was left half-written.\n"
    assert list(out.iterdir()) == []


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    endless = made(tmp_path / "endless", max_length=100_000)
    running = process("generate", "--model", endless, "--max-new-tokens", 90_000, "the cat sat")
    assert running.stdout is not None
    assert running.stderr is not None
    running.stdout.close()
    assert running.wait(timeout=600) == 1
    assert running.stderr.read() == ""
    running.stderr.close()


def test_what_cannot_be_meant_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "no model ships for the work write" in refused("compare", "write")
    assert "greedy takes no draft" in refused("generate", "--draft", "code-draft", "x = 1")
    nowhere = tmp_path / "mistyped"
    assert "nothing to resume" in refused("train", "code", "--resume", "--out", nowhere)
    assert not nowhere.exists()


def test_verify_wants_one_paper_or_all(run: Callable[..., Ran]) -> None:
    for given in ((), ("medusa", "--all")):
        ran = run("verify", *given)
        assert ran.code == 2 and "name one paper, or --all of them" in ran.err
