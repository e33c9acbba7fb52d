"""Sampling: what a distribution becomes, what is drawn from it, and that drafts leave it as it was."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import pytest
import torch
from generation import Told, model, noisy, random_told
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from formery.generate import Draft, NoDraft, Row, Settings, draft_and_verify
from formery.generate.draft import stream_of
from formery.generate.drafters import ModelDrafter
from formery.generate.guided import drawn
from formery.generate.run import generate
from formery.generate.sampler import draw, modified_rejection, penalised, probabilities
from formery.methods.decoding.parallel.parallel_jacobi_decoding import JacobiDrafter
from formery.models import EncoderDecoder

TRANSFORMS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.7, "top_k": 2},
    {"temperature": 1.0, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.4},
    {"temperature": 0.9, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.4},
]


@settings(max_examples=80)
@given(
    logits=st.lists(st.integers(-12, 12), min_size=3, max_size=12),
    temperature=st.floats(0.1, 3),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.none() | st.floats(0.05, 1),
    min_p=st.none() | st.floats(0, 1),
    penalty=st.sampled_from([1.0, 0.7, 1.3]),
    history=st.sets(st.integers(0, 2)),
    distinct=st.booleans(),
)
def test_probabilities_are_those_of_transformers(
    logits: list[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    history: set[int],
    distinct: bool,
) -> None:
    """With ties too, save that top-p may keep either of two equal tokens: its kept mass is compared then."""
    scores = torch.tensor(logits, dtype=torch.float64) / 3
    if distinct:
        scores += torch.arange(len(scores)) * 1e-3
    asked = Settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    found = probabilities(scores, sorted(history), asked)
    read = torch.tensor([sorted(history)], dtype=torch.long)
    wanted = scores[None]
    if history:
        wanted = RepetitionPenaltyLogitsProcessor(penalty)(read, wanted)
    wanted = TemperatureLogitsWarper(temperature)(read, wanted)
    if top_k is not None:
        wanted = TopKLogitsWarper(top_k)(read, wanted)
    if top_p is not None:
        wanted = TopPLogitsWarper(top_p)(read, wanted)
    if min_p is not None:
        wanted = MinPLogitsWarper(min_p)(read, wanted)
    chances = wanted[0].softmax(-1)
    if top_p is None:
        assert torch.allclose(found, chances, atol=1e-12)
    elif abs(int((found > 0).sum()) - int((chances > 0).sum())) == 0:
        assert torch.allclose(found.sort().values, chances.sort().values, atol=1e-9)
    else:  # a cumulative sum that meets top_p up to rounding
        kept = penalised(scores, sorted(history), asked) / temperature
        before = kept.softmax(-1).sort(descending=True).values.cumsum(-1)
        assert top_k is not None or bool(((before - top_p).abs() < 1e-9).any())


def test_small_and_large_temperatures() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0])
    for tiny in (1e-300, 1e-12):
        assert probabilities(logits, [], Settings(temperature=tiny)).tolist() == [0, 1, 0]
    assert probabilities(logits, [], Settings(temperature=0)).tolist() == [0, 1, 0]
    assert probabilities(logits, [], Settings(temperature=100)).max() < 0.35


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any))
def test_draw_gives_each_token_its_share(weights: list[int]) -> None:
    chances = torch.tensor(weights, dtype=torch.float64)
    total = sum(weights)
    counts = Counter(draw(chances, (step + 0.5) / total) for step in range(total))
    assert [counts[token] for token in range(len(weights))] == weights
    assert weights[draw(chances, 0.0)] > 0
    assert weights[draw(chances, 1 - 2**-53)] > 0


def accepting(target: Tensor, draft: Tensor | None, token: int) -> float:
    """The probability with which the rule accepts, found from its answers alone."""
    below, above = 0.0, 1.0
    if modified_rejection(target, draft, token, 1 - 2**-53) is None:
        return 1.0
    for _ in range(60):
        middle = (below + above) / 2
        if modified_rejection(target, draft, token, middle) is None:
            below = middle
        else:
            above = middle
    return below


@pytest.mark.parametrize("vocabulary", [4, 5, 6])
@pytest.mark.parametrize("seed", range(5))
def test_one_token_is_distributed_as_the_target(vocabulary: int, seed: int) -> None:
    """Accepted or replaced, a token x comes out with probability target[x], whatever it was drafted from."""
    source_of_chance = torch.Generator().manual_seed(seed)
    target = (2 * torch.randn(vocabulary, generator=source_of_chance, dtype=torch.float64)).softmax(-1)
    draft = (2 * torch.randn(vocabulary, generator=source_of_chance, dtype=torch.float64)).softmax(-1)
    draft[seed % vocabulary] = 0
    target[(seed + 1) % vocabulary] = 0
    target, draft = target / target.sum(), draft / draft.sum()
    certain = [torch.eye(vocabulary, dtype=torch.float64)[token] for token in range(vocabulary)]
    for source, given_ in [(draft, draft), *((one, None) for one in certain)]:
        out = torch.zeros(vocabulary, dtype=torch.float64)
        for token in source.nonzero().flatten().tolist():
            accepted = accepting(target, given_, token)
            out[token] += source[token] * accepted
            rest = modified_rejection(target, given_, token, 1 - 2**-53)
            if rest is not None:
                out += source[token] * (1 - accepted) * rest / rest.sum()
        assert torch.allclose(out, target, atol=1e-12)


class Branches:
    """Follows every way that chance can go: what is random in the loop is asked here, and comes round again."""

    def __init__(self) -> None:
        self.script: list[int] = []

    def run(self, once: Callable[[], Any]) -> Iterator[tuple[float, Any]]:
        """Each outcome of `once` with its probability."""
        waiting: list[list[int]] = [[]]
        while waiting:
            self.script, self.at, self.chance = waiting.pop(), 0, 1.0
            self.waiting = waiting
            yield once(), self.chance

    def choose(self, chances: list[float]) -> int:
        """One of the ways that have a chance; the others wait for their turn."""
        if self.at == len(self.script):
            ways = [way for way, chance in enumerate(chances) if chance > 0]
            self.waiting += [[*self.script, way] for way in ways[1:]]
            self.script = [*self.script, ways[0]]
        way = self.script[self.at]
        self.at += 1
        self.chance *= chances[way]
        return way

    def draw(self, chances: Tensor, uniform: float) -> int:
        return self.choose((chances / chances.sum()).tolist())

    def rule(self, target: Tensor, draft: Tensor | None, token: int, uniform: float) -> Tensor | None:
        accepted = accepting(target, draft, token)
        if self.choose([accepted, 1 - accepted]) == 0:
            return None
        return modified_rejection(target, draft, token, 1 - 2**-53)


class Bush(NoDraft):
    """Two guesses after the last token, and one or two after each of them: drawn without replacement, or named."""

    def __init__(self, draft: Told, drawing: bool, second: int = 1):
        self.draft, self.drawing, self.second = draft, drawing, second

    def begin(self, target: Any, rows: Sequence[Row], settings: Settings) -> None:
        self.settings, self.random = settings, [stream_of(settings.seed, row.index, "draft") for row in rows]

    def select(self, rows: Sequence[int]) -> None:
        self.random = [self.random[row] for row in rows]

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [self._bush(row, room, chance) for row, room, chance in zip(rows, rooms, self.random, strict=True)]

    def _bush(self, row: Row, room: int, chance: random.Random) -> Draft:
        draft = Draft([], [] if self.drawing else None, [])
        lines: list[tuple[int, list[int]]] = [(-1, [])]
        for count in (2, self.second)[:room]:
            after = []
            for place, written in lines:
                left = probabilities(self.draft.says((*row.tokens, *written)), row.tokens + written, self.settings)
                named = [(token, left) for token in left.topk(count).indices.tolist()]
                for token, drawn_from in drawn(left, count, chance) if self.drawing else named:
                    draft.tokens.append(token)
                    draft.parents.append(place)
                    if draft.probabilities is not None:
                        draft.probabilities.append(drawn_from)
                    after.append((len(draft.tokens) - 1, [*written, token]))
            lines = after
        return draft


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("drafter", ["model", "named", "tree", "named tree"])
def test_every_short_text_has_the_targets_probability(
    transform: dict[str, Any], drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact: all branches of the real loop over all texts of 3 tokens, by drafts that are drawn and that are named."""
    vocabulary = 4 if drafter == "named" else 3
    target, draft = random_told(vocabulary, 1), random_told(vocabulary, 2)
    asked = Settings(max_new_tokens=3, **transform)
    branches = Branches()
    for module in ("judge", "drafters", "guided"):
        monkeypatch.setattr(f"formery.generate.{module}.draw", branches.draw)

    def once() -> tuple[int, ...]:
        used: Any = {
            "model": lambda: ModelDrafter(draft, 2),  # type: ignore[arg-type]
            "named": lambda: JacobiDrafter(block=3),
            "tree": lambda: Bush(draft, drawing=True),
            "named tree": lambda: Bush(draft, drawing=False),
        }[drafter]()
        events = draft_and_verify(target, [[0]], asked, 0, used, rule=branches.rule)  # type: ignore[arg-type]
        return tuple(token for group in events for token in group[0].emitted)

    found: Counter[tuple[int, ...]] = Counter()
    ways = 0
    for text, chance in branches.run(once):
        found[text] += chance  # type: ignore[assignment]
        ways += 1
    if transform == {"temperature": 1.0}:  # a named token leads to each text in one way, a drawn one in several
        assert ways == vocabulary**3 if "named" in drafter else ways > 3 * 3**3
    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        wanted = {
            (*text, token): chance * share
            for text, chance in wanted.items()
            for token, share in enumerate(probabilities(target.says((0, *text)), [0, *text], asked).tolist())
        }
    assert set(found) <= set(wanted)
    for text, chance in wanted.items():
        assert found[text] == pytest.approx(chance, abs=1e-12)


def always(target: Tensor, draft: Tensor | None, token: int, uniform: float) -> Tensor | None:
    return None


def careless(target: Tensor, draft: Tensor | None, token: int, uniform: float) -> Tensor | None:
    """Accepts rightly, but replaces from the target instead of from what is left of it."""
    return None if modified_rejection(target, draft, token, uniform) is None else target


def eager(target: Tensor, draft: Tensor | None, token: int, uniform: float) -> Tensor | None:
    """Accepts a little too often."""
    return modified_rejection(target, draft, token, uniform * 0.8)


def unlikely(rule: Any, tree: bool = False, rows: int = 4000) -> float:
    """The p-value of a chi-square test of texts of 2 tokens against the target's own distribution."""
    target, draft = model("rotary", vocabulary=6), model("rotary", seed=1, vocabulary=6)
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=5)
    drafter: Any = Bush(random_told(6, 3), drawing=True) if tree else ModelDrafter(draft, 2)
    events = draft_and_verify(target, [[3]] * rows, asked, 0, drafter, rule=rule)
    texts: dict[int, list[int]] = {row: [] for row in range(rows)}
    for group in events:
        for event in group:
            texts[event.row] += event.emitted
    return p_value(Counter(map(tuple, texts.values())), [3], asked)


def p_value(counts: Counter[tuple[int, ...]], prompt: list[int], asked: Settings, kind: str = "rotary") -> float:
    """Of these counts of texts of 2 tokens, if they came from the target of that kind."""
    target, rows = model(kind, vocabulary=6), counts.total()

    def logits_after(text: list[int]) -> Tensor:
        if isinstance(target, EncoderDecoder):
            return target(torch.tensor([prompt]), torch.tensor([[target.start_token, *text]]))[0, -1].detach()
        return target(torch.tensor([[*prompt, *text]]))[0, -1].detach()

    after = [logits_after(text) for text in ([], *([a] for a in range(6)))]
    first, *second = [probabilities(logits, [], asked) for logits in after]
    wanted = numpy.array([[rows * float(first[a] * second[a][b]) for b in range(6)] for a in range(6)]).flatten()
    seen = numpy.array([counts[a, b] for a in range(6) for b in range(6)])
    rare = wanted < 5  # too few to be tested one by one
    if rare.any():
        wanted = numpy.append(wanted[~rare], wanted[rare].sum())
        seen = numpy.append(seen[~rare], seen[rare].sum())
    return float(chisquare(seen, wanted * seen.sum() / wanted.sum()).pvalue)


@pytest.mark.parametrize("tree", [False, True])
def test_samples_pass_the_chi_square_test(tree: bool) -> None:
    assert unlikely(modified_rejection, tree) > 0.01


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("rule", [always, careless, eager])
def test_wrong_rules_fail_the_chi_square_test(rule: Any, tree: bool) -> None:
    assert unlikely(rule, tree) < 1e-6


def test_siblings_drawn_as_if_with_replacement_fail_the_chi_square_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sibling must be told with what was left when it was drawn."""
    whole = drawn

    def forgetful(left: Tensor, count: int, chance: random.Random) -> list[tuple[int, Tensor]]:
        return [(token, left) for token, _ in whole(left, count, chance)]

    monkeypatch.setitem(globals(), "drawn", forgetful)
    assert unlikely(modified_rejection, tree=True) < 1e-6


@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("sampling", {}),
        ("speculative-sampling:length=2", {"draft": model("rotary", seed=1, vocabulary=6)}),
        ("aggressive-decoding:shortest=1", {}),
        ("parallel-jacobi-decoding:block=2", {}),
    ],
)
def test_every_method_samples_from_the_target(method: str, own: dict[str, Any]) -> None:
    rows = 3000
    asked = Settings(max_new_tokens=2, temperature=1.2, seed=11)
    found = generate(model("rotary", vocabulary=6), [[3, 3]] * rows, method, **{**vars(asked), **own})
    assert p_value(Counter(tuple(one.tokens) for one in found), [3, 3], asked) > 0.01
    assert method == "sampling" or sum(one.accepted for one in found) > 0


METHODS = [
    "sampling",
    "speculative-sampling:length=3",
    "aggressive-decoding:shortest=1",
    "parallel-jacobi-decoding",
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_a_seed_gives_the_same_whatever_the_batch(method: str, kind: str) -> None:
    target = model(kind, max_length=40)
    draft = noisy(model(kind, max_length=18), 0.3)
    draft = noisy(model(kind, max_length=40), 0.3) if kind == "translator" else draft
    own = {"draft": draft} if method.startswith("speculative") else {}
    prompts = [[row + 2, 7, row + 30, 4][: 1 + row % 4] for row in range(9)]
    asked = {"temperature": 0.5, "seed": 3, "max_new_tokens": 20, "stop_tokens": [9, 31], **own}
    whole = [one.tokens for one in generate(target, prompts, method, **asked)]
    for batch in (1, 2, 5):
        assert [one.tokens for one in generate(target, prompts, method, batch=batch, **asked)] == whole
    # Other neighbours, the same places.
    others = [prompts[row] if row % 3 == 0 else [row + 50, row + 60, row] for row in range(9)]
    assert [one.tokens for one in generate(target, others, method, **asked)][::3] == whole[::3]
    assert [one.tokens for one in generate(target, prompts, method, **{**asked, "seed": 4})] != whole


def test_rows_of_equal_prompts_draw_differently() -> None:
    found = generate(model("rotary"), [[5, 6]] * 8, "sampling", temperature=1.0, max_new_tokens=6)
    assert len({tuple(one.tokens) for one in found}) > 1


def test_a_draft_drawn_from_the_target_itself_always_stands() -> None:
    target = model("rotary")
    found = generate(target, [[5, 6], [7]], "speculative-sampling", draft=target, temperature=1.0, max_new_tokens=20)
    assert all(one.accepted == one.drafted > 0 for one in found)


def test_an_empty_draft_holds_nothing() -> None:
    assert Draft().tokens == []
    assert Draft().probabilities is None
