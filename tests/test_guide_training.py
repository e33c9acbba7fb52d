"""Guides learn from what the frozen target writes, and the target stays as it was, to the bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import model
from guides import guide, guided

from formery.errors import FormeryError
from formery.generate import generate
from formery.generate.method import METHODS
from formery.methods.decoding.draft import medusa, own_text, training
from formery.methods.decoding.draft.own_text import OwnBatches, OwnText, contexts, digest_of
from formery.train.plan import Plan

SOURCES = [[row + 2, 3 * row % 90 + 1, 7, row + 5][: 2 + row % 3] for row in range(12)]


def written(kind: str, folder: Path) -> OwnText:
    return own_text.own_text(model(kind), SOURCES, 10, folder)


@pytest.mark.parametrize("kind", ["rotary", "translator"])
@torch.inference_mode()
def test_the_text_is_the_target_s_own_with_its_vectors(kind: str, tmp_path: Path) -> None:
    target, text = model(kind), written(kind, tmp_path)
    outputs = generate(target, SOURCES, max_new_tokens=10)
    for row, (source, output) in enumerate(zip(SOURCES, outputs, strict=True)):
        length, start = text.lengths[row], int(text.starts[row])
        tokens = text.tokens[row, :length].tolist()
        assert tokens[start:] == output.tokens
        if kind == "rotary":
            assert tokens[:start] == source
            hidden = target.hidden(torch.tensor([tokens]))  # type: ignore[union-attr]
        else:
            assert start == 1 and text.sources[row] == source
            memory = target.encoder(torch.tensor([source]))  # type: ignore[union-attr]
            hidden = target.decoder.hidden(torch.tensor([tokens]), memory=memory)  # type: ignore[union-attr]
        torch.testing.assert_close(text.hidden[row, :length].float(), hidden[0], rtol=2e-3, atol=2e-3)


def test_what_was_written_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_text, "CHUNK", 4)
    first = written("rotary", tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3
    files[1].unlink()  # as if it had been stopped there
    wrote = []
    real = own_text._written
    monkeypatch.setattr(own_text, "_written", lambda *given: wrote.append(given) or real(*given))
    again = written("rotary", tmp_path)
    assert len(wrote) == 1 and torch.equal(first.tokens, again.tokens) and torch.equal(first.hidden, again.hidden)


def test_batches_are_of_their_number_alone_and_tell_what_was_written(tmp_path: Path) -> None:
    text = written("rotary", tmp_path)
    batches = OwnBatches(text, 5, seed=3)
    for step in (0, 7, 3):
        one, other = batches.batch(step), OwnBatches(text, 5, seed=3).batch(step)
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert sum(int(batches.batch(step)["written"].sum(1).min()) for step in range(2)) == 20
    with pytest.raises(FormeryError, match="batches of 13 cannot be made of 12 texts"):
        OwnBatches(text, 13)
    assert all(len(one) == 4 for one in contexts(torch.arange(30), 4, 9))
    with pytest.raises(FormeryError, match="too few for a piece of 40"):
        contexts(torch.arange(30), 40, 1)


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_a_guide_learns_and_the_target_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = model(kind, seed=3)
    before = digest_of(target)
    monkeypatch.setattr(training, "load", lambda name: target)
    monkeypatch.setattr(training, "HELD_OUT", 4)
    monkeypatch.setattr(training, "texts_of", lambda name, own: own_text.own_text(own, SOURCES, 10, tmp_path / "own"))
    plan = Plan(steps=12, learning_rate=1e-2, warmup=2, evaluate_every=12, checkpoint_every=6, label="code/medusa")

    def run(out: str, most: int | None = None, resume: bool = False) -> Any:
        return training.train_guide(
            "code", medusa.make, medusa.objective, plan, tmp_path / out, most, resume, batch_size=4
        )

    whole = run("whole")
    assert digest_of(target) == before and not any(one.requires_grad for one in target.parameters())
    torch.manual_seed(plan.seed)
    first = medusa.make(target)
    assert digest_of(whole.model) != digest_of(first)
    with torch.no_grad():
        batch = OwnBatches(own_text.own_text(target, SOURCES, 10, tmp_path / "own"), 12).batch(0)
        losses = [float(medusa.objective(target, one, batch)) for one in (whole.model, first)]
    assert losses[0] < losses[1]
    run("parts", most=7)
    parts = run("parts", resume=True)
    assert digest_of(parts.model) == digest_of(whole.model) and digest_of(target) == before


def test_guides_of_all_papers_have_an_objective_that_reaches_all_their_weights(tmp_path: Path) -> None:
    for name in guided():
        method = METHODS[name]
        module, target = sys.modules[method.module], model("translator")
        if not hasattr(module, "objective"):
            continue
        made = guide(name, target).train().requires_grad_(True)
        batch = OwnBatches(own_text.own_text(target, SOURCES, 10, tmp_path), 12).batch(0)
        module.objective(training.frozen(target), made, batch).backward()
        lacking = [key for key, one in made.named_parameters() if one.grad is None or not bool((one.grad != 0).any())]
        assert not lacking, (name, lacking)
        assert all(one.grad is None for one in target.parameters())
