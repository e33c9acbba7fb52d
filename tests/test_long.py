"""The work `long`: its answers are what its texts say, at the length and depth asked for."""

import random
import re
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from formery.data import long, write
from formery.data.batching import WindowBatches
from formery.data.long import TASKS, WORDS, Haystack, Long, Measure, Question
from formery.data.long_batches import LongBatches, Repetitions
from formery.data.tokenizer import train_bpe
from formery.data.works import work
from formery.errors import FormeryError
from formery.train.answering import answering, answers_and_text

PROSE = [
    f"the ship number {i} sailed to the north , past an island of birds and a town of stone . " for i in range(400)
]


@pytest.fixture(autouse=True)
def prose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose that every machine has."""
    monkeypatch.setattr(write.WikiText, "texts", lambda self, split: iter([f"{split} " + one for one in PROSE]))
    long._words.cache_clear()
    yield
    long._words.cache_clear()


def questions(number: int, **options: Any) -> list[Question]:
    return list(islice(Long(**options).questions("test"), number))


def answer(one: Question) -> str:
    """What the text says, read by its own words."""
    asked = one.prompt.split()[-3:] if one.task != "copy" else one.prompt.split()[-2:]
    if one.task == "recall":
        return re.findall(rf" note: {asked[1]} is (\w+)\.", one.prompt)[-1]
    if one.task == "copy":
        return re.findall(rf" copy: {asked[1]} ([\w ]+)\.", one.prompt)[-1]
    if one.task == "count":
        return str(len(re.findall(rf" mark: {asked[1]}\.", one.prompt)))
    name, told = asked[1], dict(re.findall(r" set: (\w+) is (\w+)\.", one.prompt))
    while name in told:
        name = told[name]
    return name


@settings(max_examples=30)
@given(st.integers(96, 700), st.integers(0, 1000), st.sampled_from(TASKS))
def test_the_answer_is_what_the_text_says(length: int, seed: int, task: str) -> None:
    one = next(Long(length, [task]).questions("test", seed))
    assert one.answer == f" {answer(one)}"
    for question, other in one.more:
        again = Question(task, one.prompt[: one.prompt.rindex(question.split(":")[0])] + question[1:], other, 0)
        assert other == f" {answer(again)}"


@settings(max_examples=30)
@given(st.integers(96, 900), st.sampled_from(TASKS))
def test_texts_have_the_length_asked_for(length: int, task: str) -> None:
    one = questions(1, length=length, tasks=[task])[0]
    found = Measure(None)(one.prompt + one.answer)
    assert length - 20 < found <= length  # a word that would not fit is left out
    assert 0 < one.distance < length


@pytest.mark.parametrize("task", TASKS)
def test_depth_says_where_the_answer_lies(task: str) -> None:
    near, far = (
        [one.distance / 800 for one in questions(12, length=800, tasks=[task], depth=depth)] for depth in (1.0, 0.0)
    )
    assert min(far) > 0.8
    assert max(near) < (0.2 if task in ("recall", "copy") else 0.9)
    assert sum(near) < sum(far)


def test_examples_are_the_same_each_time_and_other_in_each_split() -> None:
    first, again = (list(Long(200, number=8).candidates("test")) for _ in range(2))
    assert first == again
    assert first != list(Long(200, number=8).candidates("train"))
    assert [one.name.split(":")[1] for one in first] == [*TASKS, *TASKS]


def test_quality_counts_exact_answers_by_task() -> None:
    examples = list(Long(200, number=8).candidates("test"))
    outputs = [one.reference + " and more" for one in examples]
    assert Long().quality(outputs, examples) == {"exact": 1.0, **dict.fromkeys(TASKS, 1.0)}
    outputs[0] = " something"
    found = Long().quality(outputs, examples)
    assert (found["exact"], found["recall"], found["copy"]) == (7 / 8, 0.5, 1.0)


def test_the_work_is_known_by_name() -> None:
    assert isinstance(work("long"), Long)
    assert len(set(WORDS)) == len(WORDS) == 96


@pytest.mark.parametrize(
    ("options", "said"),
    [({"length": 20}, "at least 96"), ({"tasks": ["recal"]}, "recall"), ({"depth": 1.5}, "between 0 and 1")],
)
def test_bad_options_are_one_sentence(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FormeryError, match=said):
        Long(**options)


def test_rows_mark_their_answers_and_nothing_else() -> None:
    tokenizer = train_bpe(
        [*PROSE, " ".join(WORDS) * 20, "note: ask: is copy: again: mark: count: set: trace: 123456789"], 500
    )
    ids = torch.tensor([token for row in tokenizer.encode_batch(PROSE) for token in row])
    batches = LongBatches(tokenizer, ids, 300, 8, seed=3)
    batch, again = batches.batch(5), batches.batch(5)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["tokens"].shape == batch["answers"].shape == (8, 301)
    assert not batch["answers"][:4].any()
    assert torch.equal(batch["tokens"][:4], WindowBatches(ids, 300, 4, 3).batch(5)["tokens"])
    first = 5 * 4
    for row, due, one in zip(
        batch["tokens"][4:],
        batch["answers"][4:],
        Long(252, tokenizer=tokenizer).questions("train", 3, first),
        strict=False,
    ):
        text = tokenizer.decode(row[1:].tolist())
        assert text.startswith(one.prompt + one.answer + "."[: 300 - len(one.prompt)])
        told = tokenizer.decode(row[due].tolist())
        assert told.startswith(one.answer)
        assert set(told.split()) <= {word for _, other in [("", one.answer), *one.more] for word in other.split()}


class Told(nn.Module):
    """Gives the logits that it was made with."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits


def test_answers_count_apart_from_text() -> None:
    tokens, answers = torch.tensor([[1, 2, 3], [1, 4, 2]]), torch.tensor([[False] * 3, [False, False, True]])
    logits = torch.randn(2, 2, 6)
    costs = -logits.log_softmax(-1)
    wanted = (costs[0, 0, 2] + costs[0, 1, 3]) / 2 + costs[1, 1, 2]
    batch = {"tokens": tokens, "answers": answers}
    torch.testing.assert_close(answering(Told(logits), batch), wanted)
    scores = answers_and_text([batch])(Told(logits))
    assert scores["loss"] == pytest.approx(float((costs[0, 0, 2] + costs[0, 1, 3]) / 2))
    assert scores["answered"] == float(logits[1, 1].argmax() == 2)


def test_prose_goes_on_from_piece_to_piece() -> None:
    haystack = Haystack("test", Measure(None))
    pieces = haystack.pieces(random.Random(1), 120, 6, even=True)
    whole = " ".join(haystack.words)
    assert "".join(pieces).strip() in whole
    assert pieces[0] == ""
    assert all(10 < Measure(None)(one) <= 24 for one in pieces[1:])


def test_words_are_said_twice() -> None:
    tokenizer = train_bpe([" " + " ".join(WORDS)] * 50, 700)
    batches = Repetitions(tokenizer, 40, 6, seed=1, most=5)
    batch, again = batches.batch(2), batches.batch(2)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert batch["tokens"].shape == batch["answers"].shape == (6, 41)
    for row, due in zip(batch["tokens"].tolist(), batch["answers"].tolist(), strict=True):
        assert row[0] == tokenizer.bos and sum(due) > 10
        # What is due came before, behind the same token.
        assert all((row[i - 1], row[i]) in pairwise(row[:i]) for i, one in enumerate(due) if one)
