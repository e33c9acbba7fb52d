"""Trees of drafts on recurrent and hybrid models: each branch is as if it were read alone, and any path can be kept."""

from typing import Any

import pytest
import torch
from generation import KINDS, from_scratch, model
from guides import guide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_mamba2 import CLOSE, MODELS, REACH, VOCABULARY, recurrent, speaker
from torch import Tensor

from formery.errors import FormeryError
from formery.generate import Settings, generate
from formery.generate.copy_tree import Continuations
from formery.generate.draft import Draft, as_trees
from formery.models import Decoder
from formery.parts import State

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]


def read(model: Decoder, state: State, lasts: list[int], drafts: list[Draft]) -> Tensor:
    """Logits after each row's last token and each guess; rows are padded behind."""
    positions, visible = as_trees(drafts, state.lengths, state.slots.used, torch.device("cpu"))
    width = positions.shape[1]
    rows = [[last, *draft.tokens] for last, draft in zip(lasts, drafts, strict=True)]
    return model.step(torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), state, positions, visible)


@pytest.mark.parametrize("name", sorted(MODELS))
@settings(max_examples=12, suppress_health_check=SLOW)
@given(data=st.data(), batch=st.integers(1, 3))
@torch.no_grad()
def test_every_branch_is_as_if_read_alone(name: str, data: st.DataObject, batch: int) -> None:
    """Tree after tree, a path of each kept, rows of unequal size, some of them chains; then taken back and read on."""
    model = MODELS[name]()
    texts = torch.randint(VOCABULARY, (batch, data.draw(st.integers(1, 9)))).tolist()
    state = model.start(batch, 6)
    if len(texts[0]) > 1:
        model.step(torch.tensor(texts)[:, :-1], state)
    for _ in range(data.draw(st.integers(1, 4))):
        drafts = []
        for _ in texts:
            size = data.draw(st.integers(0, 8))
            parents = [data.draw(st.integers(max(-1, node - 4), node - 1)) for node in range(size)]
            drafts.append(Draft(torch.randint(VOCABULARY, (size,)).tolist(), parents=parents))
        logits, paths = read(model, state, [text[-1] for text in texts], drafts), []
        for row, (text, draft) in enumerate(zip(texts, drafts, strict=True)):
            for place in range(-1, len(draft.tokens)):
                line = [] if place < 0 else [draft.tokens[one] for one in draft.line(place)]
                alone = model(torch.tensor([[*text, *line]]))[0, -1]
                torch.testing.assert_close(logits[row, place + 1], alone, **CLOSE)
            end = data.draw(st.integers(-1, len(draft.tokens) - 1))
            path = [] if end < 0 else draft.line(end)
            paths.append([0, *(place + 1 for place in path)])
            text += [draft.tokens[place] for place in path] + [data.draw(st.integers(0, VOCABULARY - 1))]
        state.settle(paths)
        assert state.lengths == [len(text) - 1 for text in texts]
        if data.draw(st.booleans()):
            rows = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
            state.select(rows)
            texts = [[*texts[row]] for row in rows]
    back = [data.draw(st.integers(max(0, len(text) - 1 - 1), len(text) - 1)) for text in texts]
    state.rollback(back)
    texts = [[*text[:length], 7] for text, length in zip(texts, back, strict=True)]
    logits = model.step(torch.full((batch, 1), 7), state)
    for row, text in enumerate(texts):
        torch.testing.assert_close(logits[row, 0], model(torch.tensor([text]))[0, -1], **CLOSE)


@torch.no_grad()
def test_a_tree_is_kept_as_the_inputs_of_its_nodes() -> None:
    """No node has a state of its own: what is held grows by one input for each node, and only for the latest pass."""
    model = MODELS["two layers"]()
    state = model.start(1, 40)
    model.step(torch.tensor([[1, 2, 3]]), state)
    held = recurrent(model, state)
    model.step(torch.tensor([[4]]), state)
    before, widths = state.nbytes, [(own.inputs.shape[2], own.inputs.shape[1], own.reach + 10) for own in held]
    draft = Draft(list(range(9)), parents=[-1, -1, -1, 0, 1, 2, 3, 4, 5])
    read(model, state, [5], [draft])
    assert state.nbytes == before + sum(8 * width * (new - old) for width, old, new in widths)
    assert all(own.forked for own in held)
    state.settle([[0, 2, 5]])
    assert state.lengths == [7] and not any(own.forked for own in held)
    model.step(torch.tensor([[1]]), state)
    assert state.nbytes == before


@torch.no_grad()
def test_what_is_no_tree_is_refused() -> None:
    model = MODELS["hybrid"]()
    draft = Draft([1, 2, 3, 4], parents=[-1, -1, 0, 1])

    def refused(at: tuple[int, int], seen: bool) -> None:
        state = model.start(1, 20)
        model.step(torch.tensor([[1, 2, 3]]), state)
        positions, visible = as_trees([draft], state.lengths, state.slots.used, torch.device("cpu"))
        visible[0, *at] = seen
        with pytest.raises(FormeryError, match="and into a state also trees"):
            model.step(torch.tensor([[5, *draft.tokens]]), state, positions, visible)

    refused((2, 1), False)  # a token of the text is hidden
    refused((3, 5), True)  # two branches are seen
    refused((3, 4), False)  # the parent is hidden
    refused((4, 3), False)  # the text's last token is hidden
    refused((1, 4), False)  # a token does not see itself


@torch.no_grad()
def test_a_tree_waits_for_its_path() -> None:
    model = MODELS["two layers"]()
    state = model.start(2, 20)
    model.step(torch.tensor([[1, 2, 3], [4, 5, 6]]), state)
    draft = Draft([1, 2, 3], parents=[-1, -1, 1])
    read(model, state, [5, 6], [draft, draft])
    for ask in (lambda: state.rollback([5, 5]), lambda: state.rollback(state.lengths)):
        with pytest.raises(FormeryError, match="say by `settle` which path of it stays"):
            ask()
    with pytest.raises(FormeryError, match="cannot drop single tokens"):
        state.keep(torch.ones(2, 7, dtype=torch.bool))
    state.rollback([3, 2])  # all of it, and more, can be taken back
    logits = model.step(torch.full((2, 1), 9), state)
    for row, text in enumerate(([1, 2, 3, 9], [4, 5, 9])):
        torch.testing.assert_close(logits[row, 0], model(torch.tensor([text]))[0, -1], **CLOSE)
    read(model, state, [5, 6], [draft, draft])
    with pytest.raises(FormeryError, match="say by `settle` which path of it stays"):
        model.step(torch.full((2, 1), 9), state)


GUIDED: list[str] = [
    "medusa:length=4:width=2:nodes=6",
    "eagle:length=3:width=3:beam=3:nodes=12",
]


COPIES = ["stree:width=1", "stree", "stree:width=4:length=6", "stree:adapt=true"]
RECURRENT = ["mamba2", "hybrid"]


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in [*RECURRENT, *KINDS] for name in COPIES]
    + [(kind, name) for kind in RECURRENT for name in GUIDED],
)
def test_greedy_is_the_same_by_trees(kind: str, name: str) -> None:
    target = speaker(kind) if kind in RECURRENT else model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    own: dict[str, Any] = {"draft": guide(name, target)} if name in GUIDED else {}
    for asked in (
        Settings(max_new_tokens=16, stop_tokens=frozenset([9, 31])),
        Settings(max_new_tokens=9, repetition_penalty=1.3),
    ):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, **{**vars(asked), **own})
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("temperature", [0.0, 0.3])
def test_some_branches_stand_and_drafts_do_not_depend_on_neighbours(kind: str, temperature: float) -> None:
    target = speaker(kind)
    prompts = [[row + 2, 7, 7, row + 2, 7, 8, 7][: 2 + row % 6] for row in range(10)]
    asked: dict[str, Any] = {"max_new_tokens": 60, "temperature": temperature, "seed": 3}
    whole = generate(target, prompts, "stree:width=4", **asked)
    assert 0 < sum(one.accepted for one in whole) < sum(one.drafted for one in whole)
    events = [event for one in whole for event in one.trace]
    assert any(event.parents is not None for event in events)
    assert any(event.path != list(range(len(event.path))) for event in events)
    for batch in (1, 4):
        parts = generate(target, prompts, "stree:width=4", batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


def test_a_tree_holds_the_latest_different_continuations() -> None:
    text = [1, 2, 3, 9, 1, 2, 4, 9, 8, 2, 3, 7, 1, 2]
    places = Continuations(1, 2, text, apart=False)
    # Behind "1 2": 4 9 8, then 3 9 1; behind "2": 3 7 1, which shares its first token.
    draft = places.tree(3, 3)
    lines = [[draft.tokens[one] for one in draft.line(place)] for place in range(len(draft.tokens))]
    assert lines == [[4], [4, 9], [4, 9, 8], [3], [3, 9], [3, 9, 1], [3, 7], [3, 7, 1]]
    chain = places.tree(3, 1)
    assert chain.tokens == [4, 9, 8] and chain.parents is None
    assert places.tree(0, 3).tokens == [] and Continuations(1, 2, [5, 6], apart=False).tree(3, 3).tokens == []


@pytest.mark.parametrize(
    "wrong", [{"length": 0}, {"width": 0}, {"shortest": 0}, {"longest": 1, "shortest": 2}], ids=str
)
def test_bad_options_are_told(wrong: dict[str, int]) -> None:
    with pytest.raises(FormeryError, match="a tree of copies needs"):
        generate(speaker("hybrid"), [[1]], "stree", max_new_tokens=2, **wrong)


def test_reach_is_short_here() -> None:
    """So that what trees leave in the log is folded in the tests above."""
    assert REACH == 3
