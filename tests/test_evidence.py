"""Digests, records, verdicts, comparisons, checks: they measure what they say, and go stale in time."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formery.data.base import Example, Work
from formery.data.tokenizer import train_bpe
from formery.errors import FormeryError
from formery.evidence import checks, digest, record, verify
from formery.evidence.acceptance import acceptance, judged
from formery.evidence.compare import compare
from formery.evidence.machine import machine, versions
from formery.evidence.measured import Budget, Measured, Row, Units, spread
from formery.evidence.paper import PAPERS, Paper, paper, publish
from formery.evidence.race import Entrant, Laps, fitted, identical, race, seconds_in_calls, speedups
from formery.evidence.verdict import Criterion, judge
from formery.generate import METHODS, Event, Generation, Method, drafting, generate, register
from formery.generate.drafters import ModelDrafter
from formery.generate.verify import draft_and_verify
from formery.methods import discover
from formery.models.compose import language_model, translator

discover()
SOURCE = Path(digest.__file__).parents[2]
TEXT = "for word in words:\n    count[word] += 1\n    print(word, count[word])\nreturn count\n"


@pytest.fixture(scope="module")
def models():
    """A target and a draft with one tokenizer, random but not flat."""
    tokenizer = train_bpe([TEXT], 300)
    torch.manual_seed(0)
    made = []
    for width in (32, 16):
        model = language_model(300, width, 2, 2, 1, 2 * width, max_length=64)
        model.tokenizer = tokenizer
        made.append(model.eval())
    return made


class Lines(Work):
    """Prompts of several lengths, some too long for the model."""

    name = "lines"
    kind = "decoder"
    description = "go on with lines"
    higher_is_better = {"length": True}

    def texts(self, split):
        return iter([TEXT])

    def candidates(self, split):
        for number in range(9):
            yield Example((TEXT * 5)[: 20 + 45 * number], "words", f"{split}:{number}")

    def quality(self, outputs, examples):
        return {"length": sum(map(len, outputs)) / len(outputs)}


class Careless:
    """A rule that keeps whatever was drafted: what a broken sampler would do."""

    def __call__(self, target, draft, token, uniform):
        return None


# --- the digest ------------------------------------------------------------------------------------------


def package(folder, **files):
    """A package on disk in the place of the real one."""
    for name, text in files.items():
        path = folder / "formery" / (name.replace("__", "/").replace("/init/", "/__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        os.utime(path, ns=(time.time_ns(), time.time_ns()))


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(digest, "ROOT", tmp_path / "formery")
    package(
        tmp_path,
        methods__one="""
            '''A paper.'''
            from formery.parts.norm import Norm
            from formery.evidence.checks import survey
            def run(x):
                '''Runs.'''
                from formery.parts import card, late
                return Norm(x) + 1
        """,
        parts__norm="def Norm(x): return x  # as it is\n",
        parts__late="LATE = 1\n",
        parts__card="PAPER = Paper(slug='one', does='It does.', check=run, works=('code',))\n",
        parts__other="OTHER = 1\n",
        evidence__checks="def survey(): ...\n",
    )
    return tmp_path


def test_digest_covers_what_is_imported(small):
    assert sorted(digest.modules("formery.methods.one")) == [
        "formery.methods.one",
        "formery.parts.card",
        "formery.parts.late",
        "formery.parts.norm",
    ]


@pytest.mark.parametrize(
    ("file", "text", "same"),
    [
        ("methods__one", "from formery.parts.norm import Norm\ndef run(x):\n    return Norm(x) + 2\n", False),
        ("parts__norm", "def Norm(x):\n    '''New words.'''\n\n    # and a comment\n    return (x)\n", True),
        ("parts__norm", "def Norm(x): return -x\n", False),
        ("parts__norm", "def Norm(x: int): return x\n", False),
        ("parts__card", "PAPER = Paper(slug='one', does='It does that.', check=run, works=('code',))\n", True),
        ("parts__card", "PAPER = Paper(slug='one', does='It does.', check=walk, works=('code',))\n", False),
        ("parts__card", "PAPER = Paper(slug='one', does='It does.', check=run, works=())\n", False),
        ("parts__late", "LATE = 2\n", False),
        ("parts__late", "LATE = (\n    1\n)\n'''About it.'''\n", True),
        ("parts__other", "OTHER = 2\n", True),
        ("evidence__checks", "def survey(): return 1\n", True),
    ],
)
def test_digest_changes_with_the_code_and_nothing_else(small, file, text, same):
    before = digest.digest("formery.methods.one")
    package(small, **{file: text})
    assert (digest.digest("formery.methods.one") == before) == same


def test_digest_knows_a_name_from_a_file(small):
    """Moving code to another module is a change, even where the text stays."""
    before = digest.digest("formery.methods.one")
    (small / "formery/parts/late.py").rename(small / "formery/parts/later.py")
    path = small / "formery/methods/one.py"
    path.write_text(path.read_text().replace("import late", "import later"))
    assert digest.digest("formery.methods.one") != before


def test_digest_without_source():
    with pytest.raises(FormeryError, match="formery.no_such"):
        digest.digest("formery.no_such")


def test_digest_of_a_paper_reaches_the_core_and_is_fast():
    slug = "speculative-sampling"
    found = digest.modules(PAPERS[slug].module)
    assert {"formery.generate.verify", "formery.parts.attention", "formery.models.decoder"} <= found.keys()
    assert not [name for name in found if name.startswith(digest.APART)]
    assert "formery.train" not in found
    digest.digest(PAPERS[slug].module)
    began = time.perf_counter()
    digest.digest(PAPERS[slug].module)
    assert time.perf_counter() - began < 0.3


def test_meaning_tells_any_two_constants_apart():
    import ast

    texts = [
        "1",
        "1.0",
        "True",
        "'1'",
        "b'1'",
        "None",
        "...",
        "[]",
        "[1]",
        "()",
        "{}",
        "{**a}",
        "{None: a}",
        "f'{a}'",
    ]
    assert len({digest.meaning(ast.parse(f"x = {text}")) for text in texts}) == len(texts)


# --- verdicts --------------------------------------------------------------------------------------------


def criterion(holds, essential=False, name="c"):
    if holds is None:
        return Criterion(name, "s", ">", 1.0, essential=essential, untestable="no hardware")
    value = 2.0 if holds else 0.5
    return Criterion(name, "s", ">", 1.0, value, value, value, essential)


@pytest.mark.parametrize(
    ("criteria", "expected"),
    [
        ([], "not testable here"),
        ([criterion(None)], "not testable here"),
        ([criterion(None, True), criterion(None)], "not testable here"),
        ([criterion(True)], "holds"),
        ([criterion(True), criterion(None)], "holds"),
        ([criterion(True, True), criterion(None, True)], "holds in part"),
        ([criterion(True), criterion(False)], "holds in part"),
        ([criterion(True), criterion(False, True)], "does not hold"),
        ([criterion(False), criterion(False)], "does not hold"),
        ([criterion(False), criterion(None)], "does not hold"),
    ],
)
def test_verdict(criteria, expected):
    assert judge(criteria) == expected
    assert judge(criteria[::-1]) == expected


@given(
    low=st.floats(-5, 5),
    up=st.tuples(st.floats(0, 3), st.floats(0, 3)),
    threshold=st.floats(-5, 5),
    relation=st.sampled_from(["<", "<=", "==", ">=", ">"]),
)
def test_a_criterion_holds_where_all_that_was_seen_does(low, up, threshold, relation):
    values = [low, low + up[0], low + up[0] + up[1]]
    one = Criterion("c", "s", relation, threshold, values[1], values[0], values[2])
    import operator

    test = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}[
        relation
    ]
    assert one.holds == all(test(value, threshold) for value in values)


def test_a_criterion_is_measured_or_says_why_not():
    for bad in ({}, {"measured": 1.0}, {"measured": 3.0, "low": 1.0, "high": 2.0}):
        with pytest.raises(ValueError, match="'c'"):
            Criterion("c", "s", ">", 1.0, **bad)
    with pytest.raises(ValueError, match="'c'"):
        Criterion("c", "s", ">", 1.0, 1.0, 1.0, 1.0, untestable="no hardware")


# --- papers, machine, records ----------------------------------------------------------------------------

CARD = {
    "slug": "a-paper",
    "title": "A paper",
    "year": 2020,
    "part": "decoding",
    "domain": "language",
    "does": "It does.",
    "claims": "It claims.",
}


@pytest.mark.parametrize(
    "wrong",
    [
        {"slug": "A Paper"},
        {"slug": "a--b"},
        {"slug": ""},
        {"title": " "},
        {"claims": ""},
        {"part": ""},
        {"year": 20},
    ],
)
def test_a_card_says_what_is_wrong_with_it(wrong):
    with pytest.raises(FormeryError):
        Paper(**{**CARD, **wrong})


def test_papers_are_known_by_slug(monkeypatch):
    monkeypatch.setattr("formery.evidence.paper.PAPERS", {})
    one = publish(Paper(**CARD))
    assert one.module == __name__
    assert paper("a-paper") is one
    publish(Paper(**CARD))
    with pytest.raises(FormeryError, match="two papers"):
        publish(Paper(**CARD, module="elsewhere"))
    with pytest.raises(FormeryError, match="did you mean a-paper"):
        paper("a-papr")


def test_machine_tells_no_name_and_no_path():
    text = json.dumps([machine(), versions()])
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text and "/" not in text.replace(machine()["processor"], "")
    assert machine()["cores"] >= 1 and machine()["threads"] == torch.get_num_threads()
    assert versions()["torch"] == torch.__version__


def sample(**changed):
    fields = {
        "slug": "a-paper",
        "verdict": "holds",
        "claims": "It claims.",
        "criteria": [criterion(True), criterion(None)],
        "rows": [Row("code", "k=2, „schräg“", 1, {"speedup": spread([1.1, 1.3, 1.2])})],
        "baseline": "greedy",
        "notes": [],
        "budget": Budget().plain(),
        "models": {},
        "machine": machine(),
        "versions": versions(),
        "date": "2026-01-02T03:04:05+00:00",
        "seconds": 1.5,
        "digest": "d" * 64,
    }
    return record.Record(**{**fields, **changed})


def test_record_round_trip(tmp_path):
    path = record.write(sample(), tmp_path)
    assert path == tmp_path / "a-paper.json"
    assert record.read("a-paper", tmp_path) == sample()
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert [one["holds"] for one in json.loads(text)["criteria"]] == [True, None]
    assert list(tmp_path.iterdir()) == [path]
    assert record.read("another", tmp_path) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data.pop("digest"), "digest"),
        (lambda data: data.update(seconds="long"), "seconds"),
        (lambda data: data.update(seconds="1.5"), "seconds"),
        (lambda data: data.update(verdict="surely"), "verdict"),
        (lambda data: data.update(verdict="holds in part"), "its criteria 'holds'"),
        (lambda data: data.update(slug="other"), "other"),
        (lambda data: data.update(format=2), "format 2"),
        (lambda data: data["criteria"][0].pop("low"), "criteria"),
        (
            lambda data: data["rows"][0]["numbers"]["speedup"].update(median=None),
            "rows.0.numbers.speedup.median",
        ),
    ],
)
def test_a_changed_record_is_refused(tmp_path, change, says):
    path = record.write(sample(), tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(FormeryError, match=re.escape(says)):
        record.read("a-paper", tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_file_that_is_no_record_is_refused(tmp_path, text):
    (tmp_path / "a-paper.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormeryError, match="is no record"):
        record.read("a-paper", tmp_path)


def test_a_record_with_a_number_that_is_none_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        record.write(sample(seconds=float("nan")), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["code", "code/medusa"])
def test_stale_when_code_or_models_change(small, tmp_path, monkeypatch, name):
    card = Paper(**CARD, module="formery.methods.one")
    monkeypatch.setattr(record, "SHIPPED", tmp_path / "shipped")
    shipped = tmp_path / "shipped" / name
    shipped.mkdir(parents=True)
    (shipped / "formery.json").write_text("{}")
    (shipped / "model.safetensors").write_text("weights")
    one = sample(digest=digest.digest(card.module), models=record.model_digests([name]))
    assert one.models[name] != "absent" == record.model_digests(["../shipped"])["../shipped"]
    assert not record.stale(one, card.module)
    package(small, parts__norm="def Norm(x): return x  # another comment\n")
    assert not record.stale(one, card.module)
    (shipped / "model.safetensors").write_text("other weights")
    assert record.stale(one, card.module)
    (shipped / "model.safetensors").write_text("weights")
    assert not record.stale(one, card.module)
    package(small, parts__norm="def Norm(x): return 2 * x\n")
    assert record.stale(one, card.module)


def test_records_are_at_the_root_of_a_checkout(tmp_path, monkeypatch):
    inside = tmp_path / "src" / "formery"
    monkeypatch.setattr(record, "PACKAGE", inside)
    assert record.records_folder() == inside / "evidence" / "records"
    (tmp_path / "pyproject.toml").touch()
    assert record.records_folder() == tmp_path / "evidence"


# --- comparing -------------------------------------------------------------------------------------------


def test_compare_measures_identity_quality_and_calls(models, monkeypatch):
    model, draft = models

    def careless(draft, length=4):
        def decode(model, prompts, settings, first):
            wrong = [[*prompt[:-1], prompt[-1] ^ 1] for prompt in prompts]
            return draft_and_verify(model, wrong, settings, first, ModelDrafter(draft, length))

        return decode

    monkeypatch.setitem(METHODS, "careless", Method("careless", "decodes another prompt", True, careless))
    told = []
    methods = ["speculative-sampling", "greedy", "careless", "aggressive-decoding:length=3", "sampling"]
    result = compare(
        model, Lines(), methods, draft=draft, limit=6, batch=4, max_new_tokens=12, rounds=2,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    rows = {row.method: row for row in result.rows}
    assert list(rows) == [
        "greedy",
        "speculative-sampling",
        "careless",
        "aggressive-decoding:length=3",
        "sampling",
    ]
    for name in ("greedy", "speculative-sampling", "aggressive-decoding:length=3"):
        assert rows[name].identical == 1.0 and rows[name].lossless
        assert rows[name].quality == rows["greedy"].quality
    assert rows["careless"].identical < 1 and rows["careless"].lossless  # promised, and measured
    assert rows["greedy"].calls_per_token == 1 and rows["greedy"].accepted_per_call == 0
    assert rows["greedy"].speedup == 1 and rows["greedy"].spread == (1, 1)
    for row in result.rows:
        outputs = [output.generations[row.method] for output in result.outputs]
        tokens = sum(len(one.tokens) + (one.stop == "end") for one in outputs)
        assert row.calls_per_token == sum(one.calls for one in outputs) / tokens
        assert row.spread[0] <= row.speedup <= row.spread[1]
        assert row.tokens_per_second > 0 and row.state_bytes > 0
        mean = sum(len(one.text) for one in outputs) / len(outputs)
        assert row.quality == {"length": mean}
    assert (
        result.shortened == sum(len(model.tokenizer.encode(o.prompt)) > 64 - 12 for o in result.outputs) > 0
    )
    data = json.loads(json.dumps(result.to_json()))
    assert list(data)[:4] == ["work", "model", "machine", "rows"]
    first = "method lossless identical quality tokens_per_second calls_per_token speedup state_bytes"
    assert all(list(row)[:8] == first.split() for row in data["rows"])
    assert (data["work"], data["model"]) == ("lines", "Decoder of 0.028 M parameters")
    assert told[-1][:2] == (10, 10) and all(a[0] <= b[0] for a, b in pairwise(told))


def test_compare_takes_prompts_without_references(models):
    prompts = [Example("for word", "", "1"), Example("return", "", "2"), Example("in", "", "3")]
    result = compare(models[0], prompts, [], limit=2, max_new_tokens=4, rounds=1)
    assert [output.prompt for output in result.outputs] == ["for word", "return"]
    assert result.rows[0].quality == {} and result.work == "given prompts" and result.shortened == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"methods": ["gredy"]}, "greedy"),
        ({"methods": ["aggressive-decoding:lenght=3"]}, "length"),
        ({"methods": ["speculative-sampling"]}, "needs a smaller model"),
        ({"work": "tranlate"}, "translate"),
        ({"work": []}, "at least one"),
        ({"rounds": 0}, "rounds"),
        ({"limit": 0}, "examples"),
        ({"batch": 0}, "batch"),
    ],
)
def test_compare_says_what_is_wrong(models, arguments, says):
    with pytest.raises(FormeryError, match=says):
        compare(**{"model": models[0], "work": Lines(), "methods": [], **arguments})


def test_compare_refuses_a_model_of_another_kind_and_a_foreign_draft(models):
    torch.manual_seed(0)
    other = translator(300, 16, 1, 1, heads=2, hidden=16, max_length=64, start_token=1).eval()
    other.tokenizer = models[0].tokenizer
    with pytest.raises(FormeryError, match="is a decoder; this is a encoder-decoder|encoder-decoder"):
        compare(other, Lines(), [])
    foreign = language_model(300, 16, 1, 2, 1, 16, max_length=64).eval()
    foreign.tokenizer = train_bpe(["quite another text"], 300)
    with pytest.raises(FormeryError, match="vocabulary"):
        compare(models[0], Lines(), ["speculative-sampling"], draft=foreign, limit=2, rounds=1)


def test_prompts_keep_their_end_and_encoders_read_all(models):
    model = models[0]
    examples = list(Lines().candidates("test"))
    prompts, shortened = fitted(model, [], examples, 12)
    for prompt, example in zip(prompts, examples, strict=True):
        tokens = model.tokenizer.encode(example.prompt)
        if len(tokens) <= 52:
            assert prompt == example.prompt
        else:
            assert prompt == tokens[-52:]
    assert shortened == sum(isinstance(prompt, list) for prompt in prompts)
    assert all(generate(model, [prompt], max_new_tokens=12) for prompt in prompts)
    short = language_model(300, 16, 1, 2, 1, 16, max_length=20)
    assert max(len(p) for p in fitted(model, [short], examples, 12)[0] if isinstance(p, list)) == 8
    assert fitted(model, [], examples[-1:], 100)[0] == [model.tokenizer.encode(examples[-1].prompt)[-1:]]
    reader = translator(300, 16, 1, 1, heads=2, hidden=16, max_length=20, start_token=1)
    reader.tokenizer = model.tokenizer
    assert fitted(reader, [], examples, 12) == ([example.prompt for example in examples], 0)


def test_a_race_rotates_the_order_and_warms_up_once(models, monkeypatch):
    seen = []

    def fake(model, prompts, method, **options):
        seen.append((method, len(prompts)))
        return [Generation(prompt, tokens=[1]) for prompt in prompts]

    monkeypatch.setattr("formery.evidence.race.generate", fake)
    laps = race(models[0], ["a", "b", "c"], [Entrant("x"), Entrant("y")], 3, 2, {})
    assert seen[:2] == [("x", 2), ("y", 2)]
    assert [method for method, _ in seen[2:]] == ["x", "y", "y", "x", "x", "y"]
    assert [count for _, count in seen[2:]] == [3] * 6
    assert all(len(one.seconds) == 3 and len(one.outputs) == 3 for one in laps)


def test_speedups_compare_rates_within_a_round():
    long = Generation("", tokens=[1] * 10)
    short = Generation("", tokens=[1] * 4, stop="end")
    assert speedups(Laps([short], [1.0, 4.0]), Laps([long], [4.0, 8.0])) == [2.0, 1.0]


def test_identity_is_of_tokens_and_of_the_end():
    one, other = Generation("", tokens=[1, 2]), Generation("", tokens=[1, 3])
    assert identical([one, one], [one, other]) == 0.5
    assert identical([one], [replace(one, stop="end")]) == 0


def test_seconds_of_a_batch_count_once():
    def made(calls):
        return Generation("", calls=calls, trace=[Event(0, draft_seconds=1.0, verify_seconds=2.0)] * calls)

    assert seconds_in_calls([made(2), made(5), made(3)], 2) == (8.0, 16.0)


# --- acceptance against theory ---------------------------------------------------------------------------


def test_judged_drafts_are_those_up_to_the_first_that_fell():
    trace = [
        Event(0, drafted=[1, 2, 3], path=list(range(1)), emitted=[1, 9]),
        Event(0, drafted=[4, 5], path=list(range(2)), emitted=[4, 5, 6]),
        Event(0, drafted=[7, 0, 8], path=list(range(1)), emitted=[7], stop="end"),
    ]
    written = [1, 9, 4, 5, 6, 7, 0]
    assert judged(trace, written) == [
        (0, True), (1, False), (2, True), (3, True), (5, True), (6, True),
    ]  # fmt: skip


def sampled(model, draft, method="speculative-sampling"):
    prompts = [TEXT[i : i + 12] for i in range(60)]
    options = {"temperature": 1.0, "max_new_tokens": 16, "length": 3}
    laps = Laps(generate(model, prompts, method, draft=draft, seed=1, **options), [1.0])
    return acceptance(model, draft, prompts, laps, 1.0)


def errors(sums, name, expected, variance):
    result = checks.Result("code", 1, checks.Setting("m", 1.0), 0, sums)
    return checks.pooled([result], name, expected, variance)[0]


def test_sampling_is_as_theory_has_it_and_a_careless_rule_is_found_out(models, monkeypatch):
    model = models[0]

    def keep_all(draft, length=4):
        def decode(model, prompts, settings, first):
            return draft_and_verify(model, prompts, settings, first, ModelDrafter(draft, length), Careless())

        return decode

    monkeypatch.setitem(METHODS, "careless", Method("careless", "keeps every draft", True, keep_all))
    with torch.no_grad():
        sharp = [one.clone() for one in models]
        for one, by in zip(sharp, (12.0, 3.0), strict=True):
            one.norm.weight *= by
            one.tokenizer = model.tokenizer
    right, wrong = sampled(*sharp), sampled(*sharp, method="careless")
    assert right["judged"] > 300 and 0 < right["accepted"] < right["judged"]
    assert errors(right, "accepted", "expected", "expected_variance") < 4
    assert errors(right, "surprise", None, "surprise_variance") < 4
    assert errors(wrong, "accepted", "expected", "expected_variance") > 4
    assert errors(wrong, "surprise", None, "surprise_variance") > 4


# --- the checks of the three papers ----------------------------------------------------------------------


@pytest.fixture
def house(models, monkeypatch):
    """Random models in the place of the shipped ones."""
    torch.manual_seed(1)
    made = {"code": models[0], "code-draft": models[1]}
    for name, width in (("translate", 32), ("translate-draft", 16)):
        made[name] = translator(300, width, 1, 1, heads=2, hidden=width, max_length=64, start_token=1).eval()
        made[name].tokenizer = models[0].tokenizer
    monkeypatch.setattr(checks, "model_named", made.__getitem__)
    lines = [Example(TEXT[i : i + 15], "", str(i)) for i in range(4)]
    monkeypatch.setattr(checks, "examples", lambda work, limit, seed: lines[:limit])
    return made


@pytest.mark.parametrize("slug", ["speculative-sampling", "aggressive-decoding", "parallel-jacobi-decoding"])
def test_a_check_measures_all_settings_and_gives_a_record(house, slug, tmp_path):
    told = []
    budget = Budget(examples=2, max_new_tokens=6, rounds=1, seeds=(0,))
    made = verify.verify(slug, budget, lambda *now: told.append(now), tmp_path)
    assert record.read(slug, tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == [f"{slug}.json"]
    assert not record.stale(made, PAPERS[slug].module)
    assert {(row.work, row.batch) for row in made.rows} == {
        (w, b) for w in ("code", "translate") for b in (1, 8)
    }
    assert told[-1][0] == told[-1][1] == len(made.rows)
    by_name = {one.name: one for one in made.criteria}
    assert by_name["identical"].holds and by_name["identical"].essential
    assert any(one.untestable for one in made.criteria)
    for row in made.rows:
        numbers = {name: one.median for name, one in row.numbers.items()}
        assert {
            "speedup",
            "calls_per_token",
            "accepted_per_call",
            "share_of_drafts_accepted",
        } <= numbers.keys()
        shares = [numbers[f"{name}_share"] for name in ("drafting", "verifying", "other")]
        assert sum(shares) == pytest.approx(1, abs=1e-4) and min(shares) >= 0


# --- interruptions ---------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.verdict import Criterion
from formery.evidence.verify import verify

def check(budget):
    def unit(number):
        with open(sys.argv[2], "a") as file:
            print(number, file=file)
        if number == int(sys.argv[3]):
            time.sleep(60)
        return {"value": number / 10}
    values = [budget.units.measure(f"unit {n}", lambda n=n: unit(n))["value"] for n in range(5)]
    return Measured([Criterion("c", "s", ">=", 0.0, 0.2, min(values), max(values))], [], "nothing")

publish(Paper(slug="slow", title="t", year=2000, part="p", domain="d", does="d", claims="c", check=check))
verify("slow", Budget(seeds=(int(sys.argv[4]),)), folder=Path(sys.argv[1]))
"""


def test_a_check_that_is_killed_goes_on_where_it_was(tmp_path):
    script, log, folder = tmp_path / "slow.py", tmp_path / "log", tmp_path / "records"
    script.write_text(SLOW)

    def start(stop, seed=0):
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        arguments = [str(script), str(folder), str(log), str(stop), str(seed)]
        return subprocess.Popen([sys.executable, *arguments], env=environment, stderr=subprocess.PIPE)

    first = start(3)
    while not (log.exists() and log.read_text().split()[-1:] == ["3"]):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    part = folder / ".slow.part.jsonl"
    assert part.exists() and not (folder / "slow.json").exists()
    with part.open("a") as file:
        file.write('{"unit": "unit 3", "val')  # a line that the kill cut off
    second = start(9)
    assert second.communicate()[1] == b""
    assert log.read_text().split() == ["0", "1", "2", "3", "3", "4"]
    assert not part.exists()
    written = json.loads((folder / "slow.json").read_text())
    assert written["criteria"][0]["high"] == 0.4 and written["verdict"] == "holds"


def test_measured_units_of_other_code_or_budget_are_not_used(tmp_path):
    path = tmp_path / ".x.part.jsonl"
    header = {"digest": "a", "budget": {"seeds": [0]}}
    units = verify.SavedUnits(path, header)
    assert units.measure("u", lambda: {"value": 0.1, "list": [1, 2]}) == {"value": 0.1, "list": [1, 2]}

    def never():
        raise AssertionError("measured again")

    assert verify.SavedUnits(path, header).measure("u", never) == {"value": 0.1, "list": [1, 2]}
    other = verify.SavedUnits(path, {**header, "digest": "b"})
    assert other.measure("u", lambda: {"value": 3}) == {"value": 3}
    assert verify.SavedUnits(path, header).measure("u", lambda: {"value": 4}) == {"value": 4}


def test_verify_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("formery.evidence.paper.PAPERS", {})
    publish(Paper(**CARD))
    with pytest.raises(FormeryError, match="no check yet"):
        verify.verify("a-paper", folder=tmp_path)
    with pytest.raises(FormeryError, match="a-paper"):
        verify.verify("a-papr", folder=tmp_path)


@pytest.mark.parametrize("error", [FormeryError("the data are not here."), KeyboardInterrupt()])
def test_a_check_that_stops_keeps_what_was_measured_and_writes_no_record(monkeypatch, tmp_path, error):
    monkeypatch.setattr("formery.evidence.paper.PAPERS", {})

    def check(budget):
        budget.units.measure("good", lambda: {"value": 1})
        raise error

    publish(Paper(**CARD, check=check))
    with pytest.raises(type(error)):
        verify.verify("a-paper", folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".a-paper.part.jsonl"]
    assert "good" in (tmp_path / ".a-paper.part.jsonl").read_text()


def test_progress_counts_units():
    told = []
    units = Units(lambda *now: told.append(now))
    units.expect(2)
    for name in "ab":
        units.measure(name, dict)
    assert told == [(0, 2, "a"), (1, 2, "b")]
    assert Measured([], [], "nothing").models == ()
    assert register(METHODS["greedy"]) is METHODS["greedy"] and callable(drafting(ModelDrafter))
