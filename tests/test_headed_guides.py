"""Guides that attend and have heads: the text stays as it was, drafts are those of the text alone, shapes are right."""

import random
from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import numpy
import pytest
import torch
from generation import KINDS, decoder, from_scratch, model
from guides import guide
from scipy.stats import chisquare

from formery.generate import Draft, Settings
from formery.generate.run import generate
from formery.generate.sampler import probabilities
from formery.methods.decoding.draft.chimera import make_of_one_token
from formery.methods.decoding.draft.chimera import objective as chimera_objective
from formery.methods.decoding.draft.gumiho import GumihoGuide, expected_length, moved, simulated_length
from formery.methods.decoding.draft.gumiho import objective as gumiho_objective
from formery.models import Decoder, Guide
from formery.parts import Rotary
from formery.parts.native.mode import using
from formery.train.objective import Batch

SHAPES = {
    "chimera": ["", ":length=2", ":length=4:width=2:nodes=6", ":length=3:width=3:nodes=9", ":adapt=true"],
    "gumiho": ["", ":length=1", ":width=2:beam=2:nodes=7", ":length=3:width=3:beam=2:nodes=12", ":adapt=true"],
}
NAMES = [name + shape for name, shapes in SHAPES.items() for shape in shapes]
STEADY = [one for one in NAMES if "adapt" not in one]


def serial(target: Any, count: int) -> GumihoGuide:
    """A guide that makes so many guesses one after the other, nearer to the model's vectors than a random one."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = GumihoGuide(32, target.vocabulary, 4, 40, serial=count, parallel=2).eval()
        with torch.no_grad():
            made.fuse.weight[:, :32] += 0.5 * torch.eye(32)
    return made


PROMPTS = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
ASKED = (Settings(max_new_tokens=14), Settings(max_new_tokens=8, repetition_penalty=1.3))


@cache
def wanted(kind: str, asked: int) -> list[tuple[list[int], str]]:
    """Greedy decoding's own texts."""
    return [from_scratch(model(kind, max_length=16), prompt, ASKED[asked]) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_the_same_by_every_shape(kind: str, name: str) -> None:
    target = model(kind, max_length=16)
    own = guide(name, target)
    for asked, batch in ((0, 1), (0, 5), (1, 5)):
        found = generate(target, PROMPTS, name, batch=batch, draft=own, **vars(ASKED[asked]))
        assert [(one.tokens, one.stop) for one in found] == wanted(kind, asked)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", ["gumiho:length=5", "gumiho:length=2", "gumiho:length=5:width=2:beam=3:nodes=14"])
def test_more_serial_guesses_leave_the_text_as_it_was(name: str, count: int) -> None:
    target = model("rotary", max_length=16)
    own = serial(target, count)
    whole = generate(target, PROMPTS, name, draft=own, **vars(ASKED[0]))
    assert [(one.tokens, one.stop) for one in whole] == wanted("rotary", 0)
    alone = generate(target, PROMPTS, name, batch=1, draft=own, **vars(ASKED[0]))
    assert [drafted(one) for one in alone] == [drafted(one) for one in whole]


def drafted(output: Any) -> list[tuple[list[int], list[int] | None]]:
    return [(event.drafted, event.parents) for event in output.trace]


@pytest.mark.parametrize("name", STEADY)  # how much others draft, the clock says
def test_some_guesses_stand_and_some_do_not(name: str) -> None:
    """Without this, the tests above could pass with drafts that are never looked at."""
    target = model("rotary")
    found = generate(target, [[row + 2, 5] for row in range(12)], name, draft=guide(name, target), max_new_tokens=40)
    assert 0 < sum(one.accepted for one in found) < sum(one.drafted for one in found)
    if "nodes" in name:
        assert any(event.parents is not None for one in found for event in one.trace)
        assert any(event.path != list(range(len(event.path))) for one in found for event in one.trace)


@pytest.mark.parametrize("name", STEADY)
def test_guides_sample_from_the_target(name: str) -> None:
    """Texts of three tokens, so that guesses of two depths are drawn and tried."""
    target, asked = model("rotary", vocabulary=4), Settings(max_new_tokens=3, temperature=1.2, seed=11)
    found = generate(target, [[3, 3]] * 900, name, draft=guide(name, target), **vars(asked))
    counts = Counter(tuple(one.tokens) for one in found)
    expected = []
    for text in product(range(4), repeat=3):
        logits = target(torch.tensor([[3, 3, *text[:2]]]))[0, 1:].detach()
        chances = [float(probabilities(here, [], asked)[token]) for here, token in zip(logits, text, strict=True)]
        expected.append(len(found) * numpy.prod(chances))
    seen, often = numpy.array([counts[text] for text in product(range(4), repeat=3)]), numpy.array(expected)
    rare = often < 5
    seen, often = (numpy.append(one[~rare], one[rare].sum()) for one in (seen, often))
    assert chisquare(seen, often * seen.sum() / often.sum()).pvalue > 0.01
    if "length=1" not in name:
        assert any(event.accepted > 1 for one in found for event in one.trace)


@pytest.mark.parametrize("name", ["gumiho:length=4:width=2:nodes=8", "chimera:length=3:width=3:nodes=9"])
def test_drawn_siblings_differ(name: str) -> None:
    target = model("rotary", vocabulary=6)
    own = serial(target, 2) if name.startswith("gumiho") else guide(name, target)
    found = generate(target, [[3, 3]] * 100, name, draft=own, max_new_tokens=6, temperature=1.5, seed=2)
    for one in found:
        for event in one.trace:
            draft = Draft(event.drafted, parents=event.parents)
            for place in range(-1, len(event.drafted)):
                tokens = [event.drafted[child] for child in draft.children(place)]
                assert len(set(tokens)) == len(tokens)


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_do_not_depend_on_neighbours(name: str, temperature: float) -> None:
    target = model("rotary")
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    asked: dict[str, Any] = {"temperature": temperature, "seed": 3, "max_new_tokens": 20, "stop_tokens": [9, 31]}
    asked["draft"] = guide(name, target)
    whole = generate(target, prompts, name, **asked)
    for batch in (1, 4):
        parts = generate(target, prompts, name, batch=batch, **asked)
        assert [one.tokens for one in parts] == [one.tokens for one in whole]
        assert [drafted(one) for one in parts] == [drafted(one) for one in whole]


def fused(target: Decoder, tokens: list[int], count: int) -> torch.Tensor:
    """The embeddings that Chimera's guide reads at each token: of the token after it, and of those before that."""
    places = [[max(0, place - back) for back in reversed(range(count))] for place in range(1, len(tokens))]
    return target.embedding.looked_up(torch.tensor(tokens)[torch.tensor(places)])[None].flatten(2)


@torch.inference_mode()
@pytest.mark.parametrize("of_one", [False, True])
def test_chimera_guesses_as_if_it_read_the_text_anew(of_one: bool) -> None:
    """After any history of accepted and rejected guesses its chain is the one that it makes from scratch."""
    target = model("rotary")
    torch.manual_seed(0)
    own: Any = make_of_one_token(target).eval() if of_one else guide("chimera", target)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8, 3]]
    found = generate(target, prompts, "chimera:length=3", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            vectors = target.hidden(torch.tensor([text]))[:, :-1]
            made = own(vectors, fused(target, text, 1 if of_one else 3), torch.arange(len(text) - 1)[None])
            best = target.logits(own.heads(made[:, -1])).argmax(-1)[0].tolist()
            assert event.drafted == best[: len(event.drafted)]
            text += event.emitted


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2])
def test_gumiho_guesses_as_if_it_read_the_text_anew(count: int) -> None:
    target = model("rotary")
    own = serial(target, count)
    prompts = [[5, 6, 7], [9, 10, 11, 12], [8, 3]]
    found = generate(target, prompts, f"gumiho:length={count + 2}", draft=own, max_new_tokens=18)
    for one in found:
        text = list(one.prompt)
        for event in one.trace:
            vectors, tokens = target.hidden(torch.tensor([text]))[:, :-1], text[1:]
            made, guesses = [], list[int]()
            for _ in range(count):
                read = own(vectors, target.embedding.looked_up(torch.tensor([tokens])), torch.arange(len(tokens))[None])
                made.append(read[:, -1])
                guesses.append(int(target.logits(read[:, -1:]).argmax()))
                vectors, tokens = torch.cat((vectors, read[:, -1:]), 1), [*tokens, guesses[-1]]
            later = own.later(torch.stack(made, 1), target.embedding.looked_up(torch.tensor([guesses])))
            guesses += target.logits(later).argmax(-1)[0].tolist()
            assert event.drafted == guesses[: len(event.drafted)]
            text += event.emitted


@torch.inference_mode()
def test_the_heads_read_the_likeliest_line_of_serial_guesses() -> None:
    target = model("rotary")
    own = serial(target, 2)
    prompts = [[row + 2, 7, 3 * row + 1] for row in range(30)]
    name = "gumiho:length=3:width=2:beam=2:nodes=100"
    found = generate(target, prompts, name, draft=own, max_new_tokens=6)
    second = 0  # how often the likeliest line does not begin with the likeliest guess
    for prompt, one in zip(prompts, found, strict=True):
        lines = []
        vectors = target.hidden(torch.tensor([prompt]))[:, :-1]

        def read(vectors: torch.Tensor, tokens: list[int]) -> torch.Tensor:
            embedded = target.embedding.looked_up(torch.tensor([tokens]))
            return own(vectors, embedded, torch.arange(len(tokens))[None])[:, -1:]

        first = read(vectors, prompt[1:])
        for chance, token in zip(
            *(one[0, 0].tolist() for one in target.logits(first).softmax(-1).topk(2)), strict=True
        ):
            after = read(torch.cat((vectors, first), 1), [*prompt[1:], token])
            best = target.logits(after).softmax(-1)[0, 0].max(-1)
            lines.append((chance * float(best.values), [token, int(best.indices)], after))
        _, tokens, after = max(lines, key=lambda line: line[0])
        second += lines[1][0] > lines[0][0]
        later = own.later(torch.cat((first, after), 1), target.embedding.looked_up(torch.tensor([tokens])))
        event = one.trace[0]
        draft = Draft(event.drafted, parents=event.parents)
        leaves = {event.drafted[place] for place, depth in enumerate(draft.depths) if depth == 3}
        assert leaves == set(target.logits(later)[0, 0].topk(2).indices.tolist())
    assert second > 0


def test_behind_every_branch_hang_the_same_guesses() -> None:
    """The heads' guesses of the likeliest line lengthen all others too."""
    target = model("rotary")
    name = "gumiho:length=3:width=2:beam=2:nodes=100"
    found = generate(target, [[5, 6, 7], [9, 10, 11, 12]], name, draft=guide("gumiho", target), max_new_tokens=12)
    for one in found:
        for event in one.trace[:-3]:  # near the end there is less room
            draft = Draft(event.drafted, parents=event.parents)
            below = []
            for first in draft.children(-1):
                places = [place for place in range(len(event.drafted)) if first in draft.line(place)[:-1]]
                below.append({tuple(event.drafted[at] for at in draft.line(place)[1:]) for place in places})
            assert len(below) == 2 and below[0] == below[1] and len(below[0]) == 6


def learned(target: Decoder) -> Batch:
    """Texts that the target wrote, as a batch to learn from; the second one is shorter."""
    tokens = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).repeat(2, 1)
    positions[1, 8:] = -1
    with torch.inference_mode():
        hidden = target.hidden(tokens, positions)
    written = (torch.arange(12) >= 4) & (positions >= 0)
    return {"tokens": tokens, "positions": positions, "hidden": hidden.clone(), "written": written}


@pytest.mark.parametrize("name", ["chimera", "gumiho", "gumiho of two"])
def test_learning_changes_every_weight_and_reads_no_padding(name: str) -> None:
    target = model("rotary").requires_grad_(False)
    own: Guide = serial(target, 2) if name.endswith("two") else guide(name, target)
    objective = chimera_objective if name == "chimera" else gumiho_objective
    batch = learned(target)
    loss = objective(target, own, batch)
    loss.backward()
    assert all(one.grad is not None and bool(one.grad.abs().sum() > 0) for one in own.parameters())
    batch["tokens"][1, 8:] = 0
    batch["hidden"][1, 8:] = 7.0
    assert torch.equal(objective(target, own, batch), loss)


def test_how_long_drafts_are_on_average() -> None:
    chance = random.Random(3)
    assert expected_length([0.5, 0.5]) == 0.75
    mean, error = simulated_length([0.9, 0.6, 0.3], 20_000, chance)
    assert abs(mean - expected_length([0.9, 0.6, 0.3])) < 4 * error
    for _ in range(50):
        before = [chance.uniform(0.2, 0.9)] * 4
        after = moved(before, chance)
        assert sum(after) == pytest.approx(sum(before)) and all(0 <= one <= 1 for one in after)
        assert expected_length(after) > expected_length(before)


@pytest.fixture
def wide() -> tuple[Decoder, Guide]:
    """A model and a guide whose weights are so many that guesses are made by copies of them in 8 bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        target = decoder(Rotary(), vocabulary=2100, width=240, key_value_heads=2).eval()
    return target, guide("chimera", target)


@torch.inference_mode()
def test_guesses_in_8_bits_are_near_the_exact_ones(wide: tuple[Decoder, Any]) -> None:
    target, own = wide
    random_ = torch.Generator().manual_seed(1)
    vectors, embedded = (torch.randn(2, 6, size, generator=random_) for size in (240, 720))

    def read(compiled: bool) -> tuple[torch.Tensor, ...]:
        with using(compiled):
            state = own.start(2, 16)
            assert (state.entry is not None) == compiled
            first = own.read(vectors[:, :4], embedded[:, :4], state)
            made = torch.cat((first, own.read(vectors[:, 4:], embedded[:, 4:], state)), 1)
            return made, own.heads(made[:, -1]), target.guessed(made)

    using_kernels = read(True)
    for found, exact in zip(using_kernels, read(False), strict=True):
        assert 0 < float((found - exact).norm() / exact.norm()) < 0.03
    assert not torch.equal(using_kernels[2], target.logits(using_kernels[0]))

    own.fuse.weight.mul_(2)  # copies follow the weights
    with using(True):
        again = own.read(vectors[:, :4], embedded[:, :4], own.start(2, 16))
    assert not torch.allclose(again, using_kernels[0][:, :4], atol=0.1)


def test_guesses_in_8_bits_leave_the_text_as_it_was(wide: tuple[Decoder, Guide]) -> None:
    target, own = wide
    prompts = [[row + 2, 3 * row + 2, 7][: 1 + row % 3] for row in range(5)]
    for batch in (1, 5):
        plain = generate(target, prompts, batch=batch, max_new_tokens=20)
        found = generate(target, prompts, "chimera", batch=batch, draft=own, max_new_tokens=20)
        assert [one.tokens for one in found] == [one.tokens for one in plain]
