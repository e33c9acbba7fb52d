"""A guide inside of the target's own state: passes in sections are the same, and so is the text, drafts are right."""

from collections import Counter
from typing import Any

import pytest
import torch
from generation import KINDS, decoder, from_scratch, model
from guides import guide
from test_sampling import p_value

from formery.errors import FormeryError
from formery.generate import Settings
from formery.generate.run import generate
from formery.generate.target import Target
from formery.generate.within import Listening, Sections, writer
from formery.methods.decoding.draft.hidden_transfer import HiddenTransfer, objective
from formery.methods.decoding.draft.own_text import OwnBatches, own_text
from formery.parts import Rotary

SHAPES = ["", ":length=2", ":length=4:width=2:nodes=6", ":length=3:width=3:nodes=9", ":adapt=true"]
NAMES = ["hidden-transfer" + shape for shape in SHAPES]
STEADY = [one for one in NAMES if "adapt" not in one]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_same_by_every_shape(kind: str, name: str) -> None:
    target = model(kind, max_length=30)
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    for asked in (Settings(max_new_tokens=24), Settings(max_new_tokens=9, repetition_penalty=1.3)):
        wanted = [from_scratch(target, prompt, asked) for prompt in prompts]
        for batch in (1, 5):
            found = generate(target, prompts, name, batch=batch, draft=guide(name, target), **vars(asked))
            assert [(one.tokens, one.stop) for one in found] == wanted


@pytest.mark.parametrize("name", STEADY)  # how much others draft, the clock says
def test_some_guesses_stand_and_some_do_not(name: str) -> None:
    target = model("rotary")
    found = generate(target, [[row + 2, 5] for row in range(12)], name, draft=guide(name, target), max_new_tokens=40)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)


@pytest.mark.parametrize("name", [STEADY[1], STEADY[2]])
def test_it_samples_from_the_target(name: str) -> None:
    target = model("rotary", vocabulary=6)
    asked = Settings(max_new_tokens=3, temperature=1.2, seed=11)
    own: dict[str, Any] = {**vars(asked), "draft": guide(name, target)}
    found = generate(target, [[3, 3]] * 6000, name, **own)
    # Nothing is drafted in the first step: the two tokens after the first one are looked at.
    first = Counter(one.tokens[0] for one in found).most_common(1)[0][0]
    counts = Counter((one.tokens[1], one.tokens[2]) for one in found if one.tokens[0] == first)
    assert p_value(counts, [3, 3, first], asked) > 0.01
    assert sum(one.accepted for one in found) > 0


@pytest.mark.parametrize("kind", ["rotary", "translator"])
@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_do_not_depend_on_neighbours(kind: str, name: str, temperature: float) -> None:
    target = model(kind)
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 20, "stop_tokens": [9, 31]}
    asked["draft"] = guide(name, target)
    whole = generate(target, prompts, name, **asked)
    for batch in (1, 2, 5):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [[event.drafted for event in one.trace] for one in parts] == [
            [event.drafted for event in one.trace] for one in whole
        ]


@torch.inference_mode()
def test_guesses_are_those_of_vectors_put_in_between_two_layers() -> None:
    """From scratch, without a state: lower layers on the text, maps, upper layers on the text and what was made up."""
    target = decoder(Rotary(), layers=3, key_value_heads=2).eval()
    own = HiddenTransfer(32, target.vocabulary, layer=2, depths=3).eval()
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8]]
    found = generate(target, prompts, "hidden-transfer:length=3", draft=own, max_new_tokens=18)
    lower, upper = decoder(Rotary(), layers=2, key_value_heads=2), decoder(Rotary(), layers=1, key_value_heads=2)
    lower.layers, lower.norm, upper.layers, upper.norm = target.layers[:2], None, target.layers[2:], target.norm
    lower.embedding, upper.output = target.embedding, target.output
    for one in found:
        text = [*one.prompt, *one.trace[0].emitted]
        assert one.trace[0].drafted == []
        for event in one.trace[1:]:
            stream = lower.eval().hidden(torch.tensor([text[:-1]]))
            together = torch.cat((stream, own(stream[:, -1])), 1)
            upper.embedding = Given(together)
            logits = upper.eval()(torch.zeros(together.shape[:2], dtype=torch.long))
            assert event.drafted == logits[0, len(text) - 1 :].argmax(-1).tolist()[: len(event.drafted)]
            text += event.emitted


class Given(torch.nn.Module):
    """An embedding that says what it was given."""

    def __init__(self, vectors: torch.Tensor):
        super().__init__()
        self.vectors = vectors

    def forward(self, *ignored: Any) -> torch.Tensor:
        return self.vectors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_pass_in_sections_is_the_same_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    target = model(kind).to(dtype)
    prompts, asked = [[5, 6, 7, 8], [9, 10]], Settings(max_new_tokens=20)
    plain, heard = Target(target, prompts, asked), Target(target, prompts, asked)
    listening = Listening(heard, 1)
    for rows in ([[1], [2]], [[3, 4, 5], [6, 7]], [[8, 9], [2, 3]]):
        listening.next_pass()
        assert torch.equal(plain.feed(rows), heard.feed(rows))
        assert plain.hidden is not None and heard.hidden is not None and torch.equal(plain.hidden, heard.hidden)
        for one in (plain, heard):
            one.state.settle([[0], [0]])
    assert listening.between is not None
    states = [(one.keys, one.values) for one in plain.state.layers.values()]  # type: ignore[attr-defined]
    others = [(one.keys, one.values) for one in heard.state.layers.values()]  # type: ignore[attr-defined]
    for own, other in zip(states, others, strict=True):
        assert torch.equal(own[0], other[0]) and torch.equal(own[1], other[1])


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_training_puts_the_same_vectors_in_as_decoding(kind: str, tmp_path: Any) -> None:
    """The loss through the appended pass: it falls, by steps of the maps alone."""
    target = model(kind).requires_grad_(False)
    text = own_text(target, [[3, 4, 5], [6, 7, 8, 9], [10, 11, 12]], 20, tmp_path)
    batch = OwnBatches(text, 3).batch(0)
    own = guide("hidden-transfer", target)
    optimizer = torch.optim.Adam(own.parameters(), 3e-2)
    losses = []
    for _ in range(25):
        loss = objective(target, own, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all(weight.grad is None for weight in target.parameters())


@torch.inference_mode()
def test_sections_leave_out_those_before() -> None:
    """A pass that begins at the second section writes the keys of its own layers only."""
    target = model("rotary")
    state = target.start(1, 8)
    sections = Sections(writer(target), [1], state)
    sections.run(1, torch.ones(1, 2, 32), sections.enter(state, 2, before=1))
    first, second = state.layers.values()
    assert not first.keys.any() and second.keys[0, :2].any()  # type: ignore[attr-defined]


def test_a_guide_of_another_model_is_refused() -> None:
    with pytest.raises(FormeryError, match="the guide is for a model of width 16"):
        generate(model("rotary"), [[5, 6]], "hidden-transfer", draft=HiddenTransfer(16, 97, 1, 4), max_new_tokens=4)
