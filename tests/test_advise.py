"""Advice: a replay counts the very calls of a real run, and what follows from counts and costs is arithmetic."""

import ast
import json
import random
import re
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import KINDS, model, noisy
from guides import guide
from rich.console import Console

import formery
from formery.__main__ import main
from formery.data.base import Example
from formery.data.tokenizer import train_bpe
from formery.errors import FormeryError
from formery.evidence import advise as advising
from formery.evidence.advise import advise, own_examples
from formery.evidence.prediction import (
    Advice,
    Confirmed,
    Factor,
    Option,
    batching,
    best_of_each,
    drafting,
    mean_error,
    option,
    recommended,
    rewriting,
)
from formery.evidence.profile_cost import (
    BATCHES,
    BatchCosts,
    Costs,
    Profile,
    Standing,
    batch_costs,
    between,
    bytes_read,
    call_costs,
    context_costs,
)
from formery.evidence.replay import (
    Known,
    Replay,
    drafter_of,
    learn,
    lossless,
    quality,
    replay,
    scores,
    settings_of,
    steady,
)
from formery.generate import Drafter, Row, Settings, Verdict, draft_and_verify
from formery.generate.drafters import CopyDrafter
from formery.generate.method import find
from formery.generate.prompts import encoded
from formery.generate.run import generate
from formery.models import Decoder, Encoder, Reader, load
from formery.models.compose import language_model
from formery.parts import Attention, Embedding, GatedMLP, Layer, PreNorm, RMSNorm, Rotary, everything
from formery.web.advice import advice as shown

TEXT = ["def area(radius):\n    return 3.14 * radius ** 2\n", "the cat sat on the mat\n"] * 3


def names(target: Any) -> list[str]:
    """A setting of each method that is tried on such a model: of several the second, which is no short draft."""
    return [settings_of(method)[:2][-1] for method in lossless(target)]


def drafter(name: str, target: Any, draft: Any) -> Drafter:
    """A fresh drafter of that setting."""
    method, options = find(name)
    make = drafter_of(method)
    assert make is not None
    return make(**options, **own(name, target, draft))


def own(name: str, target: Any, draft: Any) -> dict[str, Any]:
    """What the method drafts with: the model given, or a guide for the target."""
    method = find(name)[0]
    if not method.takes_draft:
        return {}
    return {"draft": guide(name, target) if method.guided else draft}


def same_as_run(target: Any, source: Sequence[int], name: str, draft: Any, asked: Settings, known: Known) -> Replay:
    """Replays a method on a known text and holds it against a real run, call by call."""
    done = replay(target, known, drafter(name, target, draft), asked)
    [ran] = generate(target, [list(source)], name, **vars(asked), **own(name, target, draft))
    assert ran.tokens == known.decided[: known.written]
    assert done.widths == [1 + len(event.drafted) for event in ran.trace], name
    assert (done.drafted, done.accepted) == (ran.drafted, ran.accepted), name
    return done


# Replays


@pytest.mark.parametrize("ends", [None, frozenset(range(0, 97, 9))])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replay_makes_the_calls_of_a_real_run(kind: str, ends: frozenset[int] | None) -> None:
    target = model(kind, max_length=40)
    draft, asked = noisy(target, 0.1), Settings(max_new_tokens=20, stop_tokens=ends)
    saved = 0
    for source in ([8, 9] * 4, list(range(60, 85))):
        known = learn(target, source, asked)
        for name in names(target):
            done = same_as_run(target, source, name, draft, asked, known)
            saved += known.steps - len(done.widths)
    assert saved > 0


def test_a_replay_makes_the_calls_of_a_real_run_of_a_trained_model() -> None:
    target, draft = load("code"), load("code-draft")
    asked = Settings(max_new_tokens=14)
    for example in own_examples("code")[:1]:
        source = encoded(target, example.prompt, 1)
        known = learn(target, source, asked)
        for name in names(target):
            assert len(same_as_run(target, source, name, draft, asked, known).widths) <= known.steps


def test_every_lossless_method_can_be_replayed() -> None:
    known = [*lossless(model("translator"))]
    assert {"aggressive-decoding", "speculative-sampling", "medusa"} <= {method.name for method in known}
    assert {method.name for method in known} >= {method.name for method in lossless(model("rotary"))}
    assert all(drafter_of(method) is not None for method in known)
    assert drafter_of(find("beam")[0]) is None


def test_the_target_is_asked_where_a_drafter_looks_at_it() -> None:
    target, asked = model("rotary"), Settings(max_new_tokens=12)
    known = learn(target, [8, 9] * 4, asked)
    for name in names(target):
        one = drafter(name, target, target)
        looks = name.startswith(("parallel-jacobi", "aded", "lexical-unit")) or getattr(one, "inside", False)
        assert replay(target, known, one, asked).asked == looks, name


class Curious(CopyDrafter):
    """Copies, and at every third verdict goes by what the target said behind its first wrong guess."""

    def begin(self, target: Any, rows: Sequence[Row], settings: Settings) -> None:
        super().begin(target, rows, settings)
        self.seen, self.heard = 0, [0]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Any]:
        [draft] = super().propose(rows, rooms)
        draft.tokens = [*draft.tokens, *self.heard][: rooms[0]]
        return [draft]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        super().observe(rows, verdicts)
        self.seen += 1
        if self.seen % 3 == 0:
            self.heard = list(verdicts[0].choices)


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_may_ask_now_and_then(kind: str) -> None:
    target, asked = model(kind), Settings(max_new_tokens=25, repetition_penalty=1.2)
    known = learn(target, [5, 6, 7], asked)
    ran = [events[0] for events in draft_and_verify(target, [[5, 6, 7]], asked, 0, Curious())]
    done = replay(target, known, Curious(), asked)
    assert done.widths == [1 + len(event.drafted) for event in ran]
    assert done.accepted == sum(event.accepted for event in ran)
    assert done.asked


def test_calls_may_be_made_too() -> None:
    target, asked, widths = model("rotary"), Settings(max_new_tokens=12), []
    known = learn(target, [5, 6], asked)
    copies = drafter("aggressive-decoding", target, None)
    done = replay(target, known, copies, asked, lambda width: widths.append(width) or 0.5)
    assert done.widths == widths
    assert done.called == [0.5] * len(widths)
    assert replay(target, known, drafter("aggressive-decoding", target, None), asked).called == []
    assert steady([1.0, 1.0, 1.0, 9.0]) == 1.5  # the last one counts as 3


def test_what_is_learnt_is_greedy_decoding() -> None:
    target = model("translator")
    [plain] = generate(target, [[5, 6, 7]], max_new_tokens=9)
    known = learn(target, [5, 6, 7], Settings(max_new_tokens=9))
    assert (known.decided, known.written, known.steps) == (plain.tokens, 9, 9)
    assert known.prefix == [1]
    ended = learn(target, [5, 6, 7], Settings(max_new_tokens=9, stop_tokens=frozenset(plain.tokens[4:])))
    first = next(i for i, token in enumerate(plain.tokens) if token in plain.tokens[4:])
    assert (ended.decided, ended.written) == (plain.tokens[: first + 1], first)


# Arithmetic


def text(steps: int, prefill: float = 0.0, call: float = 1.0, rest: float = 0.0, extra: float = 0.0) -> Known:
    return Known(0, [1], [1], list(range(steps)), steps, frozenset(), prefill, call, rest, extra)


def costs(at: Sequence[int], *rounds: Sequence[float]) -> Costs:
    return Costs(tuple(at), [list(one) for one in rounds])


def test_lines_between_measured_costs() -> None:
    values = [between((1, 2, 4), (1.0, 3.0, 4.0), wanted) for wanted in (1, 1.5, 2, 3, 4, 8)]
    assert values == [1.0, 2.0, 3.0, 3.5, 4.0, 6.0]
    assert between((1,), (5.0,), 9) == 5.0


def test_the_factor_of_drafting() -> None:
    table = costs((1, 3, 5), (2.0, 3.0, 6.0))
    # 10 calls of 1 against 2 calls of 3 and 1 of 4, that is 1.5 + 1.5 + 2.25 of a call of one token.
    bare = drafting([text(10)], [Replay([3, 3, 4])], table)
    assert bare == Factor(10 / 5.25, 10 / 5.25, 10 / 5.25)
    whole = drafting([text(10, 4.0, 1.0, 0.5, 1.0)], [Replay([3, 3, 4], begin=2.0, drafting=3.0)], table)
    assert whole.value == pytest.approx((4 + 10 + 5 + 1) / (4 + 1 + 2 + 3 + 1.5 + 5.25))
    called = drafting([text(10)], [Replay([3, 3, 4], called=[1.0, 2.0, 2.0])], table)
    assert called.value == pytest.approx(10 / 5)
    slow = drafting([text(10, call=3.0)], [Replay([3, 3, 4])], table)  # only the ratio of the table counts
    assert slow.value == pytest.approx(bare.value)


def test_the_bar_comes_from_rounds_and_from_prompts() -> None:
    steady = costs((1, 2), (1.0, 1.0), (1.0, 1.0))
    wavering = costs((1, 2), *((1.0, 1.0 + i / 10) for i in range(9)))
    alike, unlike = [Replay([2] * 5)] * 4, [Replay([2] * n) for n in (2, 4, 6, 8)]
    texts = [text(10)] * 4
    assert drafting(texts, alike, steady) == Factor(2, 2, 2)
    for found, value in ((drafting(texts, alike, wavering), 2 / 1.4), (drafting(texts, unlike, steady), 2)):
        assert found.value == pytest.approx(value)
        assert found.low < found.value < found.high


def test_the_factor_of_another_form() -> None:
    texts = [text(10, prefill=10.0, call=1.0, rest=0.5)]
    calls, prefills = costs((0, 1), (2.0, 1.0)), costs((0, 1), (1.0, 2.0))
    assert rewriting(texts, calls, prefills).value == pytest.approx((10 + 10 + 5) / (20 + 5 + 5))
    assert rewriting(texts, calls, prefills, turned=True).value == pytest.approx((20 + 5 + 5) / (10 + 10 + 5))


def test_the_factor_of_batches() -> None:
    flat = costs((1, 2, 4), (1.0, 1.0, 1.0))
    linear = costs((1, 4), (1.0, 4.0))
    assert batching([text(10)], BatchCosts(flat, linear, linear, [1, 2, 4]), 4).value == pytest.approx(4)
    assert batching([text(10)], BatchCosts(linear, linear, linear, [1, 4]), 8).value == pytest.approx(1)
    # One of two rows goes on alone for 10 of 20 steps: 10 · 2 + 10 · 1 steps' work in 20 steps.
    ragged = [text(20), text(10)]
    assert batching(ragged, BatchCosts(flat, flat, flat, [1, 2, 4]), 2).value == pytest.approx(30 / 20)
    assert batching(ragged, BatchCosts(linear, flat, flat, [1, 4]), 2).value == pytest.approx(1)
    read = batching([text(10, prefill=5.0, rest=1.0)], BatchCosts(flat, linear, linear, [1, 4]), 4).value
    assert read == pytest.approx(4 * (5 + 20) / (20 + 10 * (1 + 4)))


def made(kind: Any, name: str, value: float, low: float, **told: Any) -> Option:
    return option("m", None, kind, name, Factor(value, low, value + 0.1), **told)


def test_ranking() -> None:
    options = [
        made("method", "aggressive-decoding:length=2", 1.3, 1.2, method="aggressive-decoding:length=2"),
        made("method", "aggressive-decoding:length=4", 1.4, 1.1, method="aggressive-decoding:length=4"),
        made("weights", "int8", 1.2, 1.06),
        made("weights", "int4", 1.5, 1.0),
        made("kernels", "compiled kernels", 3.0, 2.0, in_use=True),
        *(made("batch", f"batches of {n}", value, 1.5, batch=n) for n, value in ((2, 1.6), (4, 2.3), (8, 2.5))),
    ]
    chosen = ["compiled kernels", "batches of 4", "int4", "aggressive-decoding:length=4", "int8"]
    assert [one.name for one in best_of_each(options)] == chosen
    assert [one.name for one in recommended(options)] == ["batches of 4", "aggressive-decoding:length=4", "int8"]
    assert not made("weights", "int8", 1.2, 1.05).helps


def test_ways_to_apply() -> None:
    drafted = made("method", "speculative-sampling:length=4", 2, 2, method="speculative-sampling:length=4")
    assert drafted.command == "formery generate --model m --method speculative-sampling:length=4"
    named = option("my m", "d", "method", "s", Factor(2, 2, 2), method="speculative-sampling:length=4")
    assert shlex.split(named.command)[-2:] == ["--draft", "d"]
    assert "'my m'" in named.command
    assert named.python == (
        "formery.generate(formery.load('my m'), prompts, 'speculative-sampling', draft=formery.load('d'), length=4)"
    )
    assert made("weights", "int8", 2, 2, load={"quantize": "int8"}).command.endswith("--quantize int8")
    assert made("weights", "b", 2, 2, load={"dtype": "bfloat16"}).command.endswith("--dtype bfloat16")
    assert made("kernels", "no", 2, 2, load={"compile": False}).command.endswith("--no-compile")
    batch = made("batch", "batches of 4", 2, 2, batch=4)
    assert (batch.command, batch.python) == ("", "formery.generate(formery.load('m'), prompts, batch=4)")


def profile(**changes: Any) -> Profile:
    told = {
        "calls": costs((1, 2), (1e-3, 2e-3)),
        "context": 10,
        "contexts": costs((10, 110), (1e-3, 2e-3)),
        "step_seconds": 1e-3,
        "prefill_seconds": 1e-2,
        "weight_bytes": 1000,
        "read_bytes": 1000,
        "streaming": 2e6,
        "nats": 1.0,
        "sure": 0.5,
        "on": "the prompts' own text",
        "state": (8, 0, None),
        "positions": 128,
    }
    return Profile(**{**told, **changes})


def advice_of(options: list[Option], **changes: Any) -> Advice:
    told: dict[str, Any] = {"notes": ["int4 is left out."], "cache_methods": [], "profile": profile()}
    return Advice("m", 2, 8, 16, 0, options=options, seconds=1.0, **{**told, **changes})


def printed(advice: Advice) -> str:
    console = Console(width=80, highlight=False)
    with console.capture() as capture:
        console.print(shown(advice))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    return " ".join(text.split())


def test_nothing_here_will_help() -> None:
    detail = {"calls_per_token": 0.5, "accepted": 0.4, "drafting_seconds": 0.0}
    useless = made("method", "parallel-jacobi-decoding:block=3", 1.2, 0.9, method="aggressive-decoding", detail=detail)
    found = advice_of([useless])
    assert found.recommended == found.to_json()["recommended"] == []
    assert "Nothing here will help" in printed(found)
    assert "parallel-jacobi-decoding" in printed(found)  # a name is not broken
    assert "To apply it" not in printed(found)
    helpful = made("method", "aggressive-decoding", 1.3, 1.1, method="aggressive-decoding", detail=detail)
    assert "Nothing here will help" not in printed(advice_of([useless, helpful]))
    assert "formery generate --model m --method aggressive-decoding" in printed(advice_of([useless, helpful]))


def test_state_and_cache_methods() -> None:
    # 9e-4 seconds and 1e-5 more for each token of context: a tenth at 10 tokens, a fifth at 22.5.
    assert profile().state_share(10) == pytest.approx(0.1)
    assert profile().context_of(0.2) == pytest.approx(22.5)
    assert profile(contexts=None).context_of(0.2) is None
    assert "20 % at about 22. No method that shrinks it is here yet." in printed(advice_of([]))
    assert "Methods that shrink it: tova (" in printed(advice_of([], cache_methods=["tova"]))
    assert "more than the 20 that" in printed(advice_of([], profile=profile(positions=20)))
    assert profile().bandwidth == pytest.approx(0.5)


def test_a_busy_machine_is_told_of() -> None:
    assert "was busy" not in printed(advice_of([], profile=profile(calls=costs((1, 2), (1.0, 9.0), (1.4, 1.0)))))
    assert "was busy" in printed(advice_of([], profile=profile(calls=costs((1, 2), (1.0, 1.0), (1.6, 1.0)))))


def test_predicted_against_measured() -> None:
    one = made("weights", "int8", 2.0, 1.5)
    confirmed = [Confirmed(one, Factor(1.6, 1.5, 1.7)), Confirmed(one, Factor(2.0, 1.9, 2.1))]
    assert confirmed[0].error == pytest.approx(0.25)
    assert mean_error(confirmed) == pytest.approx(0.125)


# Measuring


@pytest.mark.parametrize("kind", KINDS)
def test_costs_have_their_shapes_and_leave_the_state_alone(kind: str) -> None:
    target, asked = model(kind, max_length=40), Settings(max_new_tokens=12)
    known = [learn(target, source, asked, i) for i, source in enumerate(([5, 6, 7], [8], [9] * 6))]
    calls, context = call_costs(target, known[0], asked, 30, 0.0)
    assert context == (0 if target.reads_apart else 2) + 6
    assert calls.at[0] == 1 and all(a < b for a, b in pairwise(calls.at)) and calls.at[-1] <= 40 - context
    assert all(len(one) == len(calls.at) and min(one) > 0 for one in calls.seconds)
    standing = Standing(target, known[0], asked)
    standing.call(4)
    assert standing.target.state.lengths == [context]
    assert context_costs(target, known[0], asked, 39, 0.0).at == (16, 39)
    batches = batch_costs(target, known, asked, 0.0)
    assert batches.calls.at == BATCHES
    assert batches.state_bytes[-1] == 2 * batches.state_bytes[-2] > 8 * batches.state_bytes[0]


def test_drawn_costs_are_medians_of_rounds() -> None:
    table = costs((1, 2), (1.0, 5.0), (2.0, 6.0), (9.0, 7.0))
    assert table.drawn(None) == [2.0, 6.0]
    drawn = {tuple(table.drawn(random.Random(seed))) for seed in range(20)}
    assert len(drawn) > 1 and drawn <= {(a, b) for a in (1.0, 2.0, 9.0) for b in (5.0, 6.0, 7.0)}


def test_bytes_that_a_call_reads() -> None:
    tied = language_model(50, 16, 1, 2, 1, 32, 64)
    assert bytes_read(tied) == 4 * tied.parameter_count()
    apart = model("rotary")
    assert isinstance(apart, Decoder)
    assert bytes_read(apart) == 4 * (apart.parameter_count() - apart.embedding.weight.numel())
    writer = model("translator")
    # The encoder, the table and the maps of the source are read for a prompt, not for a token.
    assert bytes_read(writer) == 4 * (
        writer.decoder.parameter_count() - 97 * 32 - 2 * 2 * 32 * 32  # type: ignore[union-attr]
    )


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_quality_is_lost_by_another_model_alone(kind: str) -> None:
    target, asked = model(kind), Settings(max_new_tokens=10)
    known = [learn(target, source, asked) for source in ([5, 6, 7, 8], [9, 3])]
    references = [[4, 5, 6], [7]]
    base = scores(target, known, references)
    same = quality(base, scores(target.clone().eval(), known, references))
    assert (same.nats, same.same, same.written) == (0.0, 1.0, 20)
    assert same.tokens == 4
    assert same.on == ("the references" if target.reads_apart else "the prompts' own text")
    assert scores(target, known, []).on == ("the text written" if target.reads_apart else same.on)
    other = quality(base, scores(noisy(target, 1.0), known, references))
    assert other.nats != 0 and other.same < 1


def test_scores_are_cross_entropies() -> None:
    target = model("rotary")
    known = learn(target, [5, 6, 7], Settings(max_new_tokens=4))
    with torch.inference_mode():
        log = target(torch.tensor([[5, 6, 7]])).log_softmax(-1)[0]
    found = scores(target, [known], [])
    assert found.losses.tolist() == pytest.approx([-float(log[0, 6]), -float(log[1, 7])], rel=1e-4)
    assert found.choices.tolist() == known.decided


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = train_bpe(TEXT, 300)
    target = language_model(tokenizer.vocabulary_size, 16, 2, 2, 1, 32, 128)
    target.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("models") / "tiny"
    formery.save(target, folder)
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `formery advise` in this process, at 80 columns, with little time."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(advising, "advise", partial(advise, seconds=2.0))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["advise", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, out, err

    return run


def test_the_command_prints_and_writes(run: Callable[..., tuple[int, str, str]], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "def area(radius"}\n{"prompt": "the cat"}\n')
    files = ("--prompts", tmp_path / "p.jsonl", "--json", tmp_path / "out.json")
    code, out, err = run("--model", tiny, "--draft", tiny, "--max-new-tokens", 8, "--confirm", *files)
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"^What was measured$", out, re.MULTILINE)
    data = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert {"model", "prompts", "profile", "options", "notes", "recommended", "confirmed", "machine"} <= data.keys()
    assert (data["prompts"], data["tokens"]) == (2, 16)
    kinds = {"kernels", "weights", "batch", "method"}
    assert {one["kind"] for one in data["options"]} == kinds
    for one in data["options"]:
        assert one["factor"]["low"] <= one["factor"]["value"] <= one["factor"]["high"]
        assert one["helps"] == (one["factor"]["low"] > 1.05)
        assert (one["quality"] is not None) == (one["kind"] == "weights")
        ast.parse(one["python"])
        assert one["command"] == "" or shlex.split(one["command"])[:2] == ["formery", "generate"]
    names = [one["name"] for one in data["options"]]
    assert {"int8", "int4", "bfloat16", "batches of 32", "speculative-sampling:length=4"} <= set(names)
    perfect = next(one for one in data["options"] if one["name"] == "speculative-sampling:length=3")
    assert perfect["detail"]["accepted"] == 1
    assert perfect["detail"]["calls_per_token"] == pytest.approx(2 / 8)
    assert len(data["confirmed"]) == min(3, len(data["recommended"]))


def test_json_on_stdout_is_only_json(run: Callable[..., tuple[int, str, str]], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("the cat sat")
    code, out, err = run("--model", tiny, "--prompts", tmp_path / "p.txt", "--max-new-tokens", 4, "--json", "-")
    data = json.loads(out)
    assert code == 0
    assert data["prompts"] == 1
    assert not any(one["name"].startswith("speculative") for one in data["options"])
    assert any("speculative-sampling" in note and "needs a smaller model" in note for note in data["notes"])
    assert "To bear in mind" in err


def refused(run: Callable[..., tuple[int, str, str]], *arguments: object) -> str:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"formery: [^\n]+[.?)]\n", err), err
    return err


def test_mistakes_are_told_in_a_sentence(run: Callable[..., tuple[int, str, str]], tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "p.txt").write_text("the cat")
    assert "no file" in refused(run, "--model", tiny, "--prompts", tmp_path / "none.txt")
    assert "holds no prompt" in refused(run, "--model", tiny, "--prompts", tmp_path / "empty.txt")
    assert "give a file of prompts, --prompts" in refused(run, "--model", tiny)
    assert "no checkpoint" in refused(run, "--model", tmp_path / "nowhere")
    prompts = ("--model", tiny, "--prompts", tmp_path / "p.txt")
    assert "2 or more" in refused(run, *prompts, "--max-new-tokens", 1)
    assert "another vocabulary" in refused(run, *prompts, "--draft", "code-draft")
    assert "No such option" in refused(run, *prompts, "--wrong").replace("no such", "No such")
    assert "it is a folder" in refused(run, *prompts, "--json", tmp_path)


def test_an_encoder_writes_nothing(run: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    attention = Attention(16, 2, position=Rotary(), mask=everything)
    layer = Layer([PreNorm(RMSNorm(16), attention), PreNorm(RMSNorm(16), GatedMLP(16, 32))])
    formery.save(Reader(Encoder(Embedding(50, 16), [layer], RMSNorm(16), 64)), tmp_path / "reader")
    assert "is an encoder" in refused(run, "--model", tmp_path / "reader")


def test_examples_of_its_own() -> None:
    assert 2 <= len(own_examples("code")) <= 8
    assert own_examples("code-draft") == own_examples("code")
    with pytest.raises(FormeryError, match="no shipped model"):
        own_examples("elsewhere")
    with pytest.raises(FormeryError, match="no prompts"):
        advise("code", list[Example]())
