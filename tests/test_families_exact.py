"""What other people's models write, exactly: the state behind drafts, beams, suppressed tokens, several ends."""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generation import Told, noisy, random_told
from published import VOCABULARY, is_pair, saved, sources, their_text, tokens
from test_near_ties import deviation
from test_sampling import Branches
from torch import Tensor

import formery
from formery.errors import FormeryError
from formery.generate import NoDraft, Settings, draft_and_verify, generate, verify
from formery.generate.drafters import CopyDrafter, ModelDrafter
from formery.generate.target import Target, canonical, rounding_bound
from formery.methods.decoding.parallel.parallel_jacobi_decoding import JacobiDrafter
from formery.models import Conventions
from formery.parts import TiedOutput
from formery.parts.native import using

FAMILIES = ["gpt2", "gpt-neox", "llama3", "gemma2", "bloom", "opt", "mixtral", "mamba2", "t5", "bart", "whisper"]
LENGTHS = (5, 11, 8)
METHODS = [
    "aggressive-decoding:shortest=1:length=3",
    "parallel-jacobi-decoding",
    "parallel-jacobi-decoding:form=plain",
    "speculative-sampling:length=1",
    "speculative-sampling:length=5",
]
WAYS = [("greedy", 0.0), ("sampling", 0.7), ("beam:beams=4", 0.0), *itertools.product(METHODS, (0.0, 0.7))]


def loaded(name: str) -> tuple[Any, list[Any]]:
    """The family's model, and three prompts of unequal lengths."""
    return formery.load(saved(name)[1]), sources(name, LENGTHS)


def options(method: str, target: Any) -> dict[str, Any]:
    """A draft that is often right, where one is needed."""
    return {"draft": noisy(target, 0.05)} if method.startswith("speculative") else {}


def texts(target: Any, prompts: Sequence[Any], method: str = "greedy", **asked: Any) -> list[list[int]]:
    return [one.tokens for one in generate(target, prompts, method, **asked)]


class Watched(Target):
    """A target that can be asked what it remembers, and whether tokens were taken back."""

    latest: "Watched"

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        Watched.latest = self
        self.taken_back = 0
        settle = self.state.settle

        def counted(paths: Sequence[Sequence[int]]) -> None:
            before = sum(self.state.lengths)
            settle(paths)
            self.taken_back += before - sum(self.state.lengths)

        self.state.settle = counted  # type: ignore[method-assign]


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_the_state_is_as_if_nothing_had_been_guessed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After rounds of drafts the state tells just what stands: its lengths, and the logits that come of it."""
    target, prompts = loaded(name)
    monkeypatch.setattr(verify, "Target", Watched)
    asked = Settings(max_new_tokens=100, stop_tokens=frozenset())
    drafters = [CopyDrafter(shortest=1), ModelDrafter(noisy(target, 0.3), 4), JacobiDrafter("block", block=12)]
    for drafter in drafters:
        written: list[list[int]] = [[], [], []]
        drafted = accepted = 0
        rounds = draft_and_verify(target, prompts, asked, 0, drafter)
        for events in itertools.islice(rounds, 7):
            for event in events:
                written[event.row] += event.emitted
                drafted, accepted = drafted + len(event.drafted), accepted + event.accepted
            state, prefixes = Watched.latest.state, Watched.latest.prefixes
            stands = [len(prefix) + len(text) - 1 for prefix, text in zip(prefixes, written, strict=True)]
            assert state.lengths == stands
        assert drafted > accepted and Watched.latest.taken_back > 0
        logits = Watched.latest.feed([text[-1:] for text in written])[:, 0]
        for row, (prompt, prefix, text) in enumerate(zip(prompts, prefixes, written, strict=True)):
            wanted = canonical(target, prompt, prefix + text)
            assert float((logits[row] - wanted).abs().max()) <= 0.5 * float(rounding_bound(wanted))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_rounding_bound_is_one_for_other_peoples_models(name: str) -> None:
    target = formery.load(saved(name)[1])
    written = [tokens(1, 21 - row % 5, 50 + row)[0].tolist() for row in range(6)]
    pairs = [(text, text) for text in written]
    if is_pair(name):
        read = sources(name, range(4, 10))
        pairs = [(source, [target.start_token, *text]) for source, text in zip(read, written, strict=True)]
    ways = ((1, 1), (1, 6), (3, 5), (8, 6))
    with using(False):
        assert 0 < max(deviation(target, pairs[:rows], width, rows) for width, rows in ways) < 0.5
    # By the compiled kernels the bits are the same, where they know all parts.
    if name not in ("mamba2", "whisper"):
        assert max(deviation(target, pairs[:rows], width, rows) for width, rows in ways) == 0


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bart"])
def test_a_row_samples_by_its_seed_and_its_place(name: str) -> None:
    target, prompts = loaded(name)
    prompts = [*prompts, prompts[0]]
    asked: dict[str, Any] = {"temperature": 0.7, "seed": 5, "max_new_tokens": 16, "stop_tokens": []}
    whole = texts(target, prompts, "sampling", **asked)
    for batch in (1, 3):
        assert texts(target, prompts, "sampling", batch=batch, **asked) == whole
    found = texts(target, [prompts[2], prompts[1], prompts[1], prompts[3]], "sampling", **asked)
    assert (found[1], found[3]) == (whole[1], whole[3])
    assert found[2] != found[1] and texts(target, prompts, "sampling", **{**asked, "seed": 6}) != whole


# Beams


@torch.inference_mode()
def score(target: Any, prompt: Any, text: list[int], ends: bool) -> float:
    """The log-probability of a text, a pass for each token, divided by their number; ends: with the end token."""
    whole = [*text, *([min(target.conventions.stop)] if ends else [])]
    _, [prefix] = target.begin([prompt], 4)
    logits = [canonical(target, prompt, prefix + whole[:place]).double() for place in range(len(whole))]
    chances = [float(one.log_softmax(-1)[token]) for one, token in zip(logits, whole, strict=True)]
    return sum(chances) / len(whole)


@pytest.mark.parametrize("name", ["gpt2", "llama3", "opt", "mixtral", "t5", "bart", "whisper"])
def test_beams_are_those_of_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts, or (where rounding decides between two) equally likely ones.

    Without suppressed tokens: here what is left sums to one again, as in Whisper's own beam search.
    """
    theirs, _ = saved(name)
    target, prompts = loaded(name)
    for setting in ("suppress_tokens", "begin_suppress_tokens"):
        monkeypatch.setattr(theirs.generation_config, setting, None)
    target.conventions = replace(target.conventions, suppressed=(), suppressed_first=())
    wanted = their_text(theirs, prompts, 16, target.conventions.pad or 0, num_beams=4, length_penalty=1.0)
    found = generate(target, prompts, "beam", beams=4, max_new_tokens=16)
    assert len({tuple(one.tokens) for one in found}) == 3
    for one, other, prompt in zip(found, wanted, prompts, strict=True):
        if one.tokens != other:
            ours = score(target, prompt, one.tokens, one.stop == "end")
            assert ours == pytest.approx(score(target, prompt, other, len(other) < 16), abs=1e-4)
    assert [one.tokens for one in found] != texts(target, prompts, max_new_tokens=16)
    assert texts(target, prompts, "beam", batch=1, beams=4, max_new_tokens=16) == [one.tokens for one in found]


# Tokens that are never written


@pytest.mark.parametrize(("method", "temperature"), WAYS)
def test_what_whisper_suppresses_is_never_written(method: str, temperature: float) -> None:
    target = formery.load(saved("whisper")[1])
    assert target.conventions.suppressed == (5, 6) and target.conventions.suppressed_first == (7, 2)
    prompts = sources("whisper", range(8))
    # Made likely, so that they would be written if they were not held back.
    target.decoder.replace("output", TiedOutput(target.decoder.embedding, bias=True))
    with torch.no_grad():
        target.decoder.output.shift[[5, 6, 7]] = torch.tensor([3.0, 3.0, 4.0])
    asked: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 20, "seed": 1, **options(method, target)}

    def written() -> tuple[list[int], set[int]]:
        found = generate(target, prompts, method, **asked)
        assert method in ("greedy", "sampling", "beam:beams=4") or sum(one.drafted for one in found) > 0
        return [one.tokens[0] for one in found if one.tokens], {*itertools.chain(*(one.tokens for one in found))}

    begun, everywhere = written()
    assert len(begun) == len(prompts), "a text began with its end"
    assert not {5, 6} & everywhere and 7 not in begun and 7 in everywhere
    target.conventions = Conventions(stop=(2,))
    begun, everywhere = written()
    assert {5, 6} & everywhere and 7 in begun


@pytest.mark.parametrize("name", ["gpt2", "mamba2", "t5"])
def test_what_a_caller_suppresses_is_never_written(name: str) -> None:
    target, prompts = loaded(name)
    asked: dict[str, Any] = {"max_new_tokens": 24, "stop_tokens": []}
    plain = texts(target, prompts, **asked)
    usual = [token for token, _ in Counter(itertools.chain(*plain)).most_common(3)]
    asked |= {"suppressed": usual, "suppressed_first": [one[0] for one in plain]}
    wanted = texts(target, prompts, batch=1, **asked)
    for row, text in enumerate(wanted):
        assert text[0] != plain[row][0] and not set(text) & set(usual)
    for method, temperature in WAYS:
        found = texts(target, prompts, method, temperature=temperature, **asked, **options(method, target))
        assert found == wanted or temperature or method.startswith("beam"), method
        assert not {*itertools.chain(*found)} & set(usual)
        assert not {one[0] for one in found} & set(asked["suppressed_first"])
    # What no model of this size has is no matter; tokens that are none, or all of them, are told.
    assert texts(target, prompts, suppressed=[VOCABULARY, 10**6], max_new_tokens=24, stop_tokens=[]) == plain
    for wrong, says in (([-1], "suppressed must be token ids"), (["a"], "'a'"), (range(VOCABULARY), "all tokens")):
        for method in ("greedy", "sampling", "beam"):
            with pytest.raises(FormeryError, match=says):
                generate(target, prompts, method, suppressed=wrong)


HELD_BACK: list[dict[str, Any]] = [
    {"temperature": 1.0, "suppressed": {1}},
    {"temperature": 0.8, "suppressed_first": {0, 2}},
    {"temperature": 1.3, "suppressed": {3}, "suppressed_first": {1}, "repetition_penalty": 1.5, "top_k": 2},
    {"temperature": 1.0, "suppressed": {0}, "suppressed_first": {0, 3}, "top_p": 0.8},
    {"temperature": 1.0, "suppressed": {0, 1, 2}},
]


def chances_by_hand(logits: Tensor, history: Sequence[int], asked: dict[str, Any], first: bool) -> list[float]:
    """The distribution over the tokens that may be written."""
    scores = {token: float(logit) for token, logit in enumerate(logits)}
    for token in set(history):
        penalty = asked.get("repetition_penalty", 1.0)
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    gone = asked.get("suppressed", set()) | (asked.get("suppressed_first", set()) if first else set())
    ranked = sorted((token for token in scores if token not in gone), key=lambda token: -scores[token])
    ranked = ranked[: asked.get("top_k")]
    weights = torch.tensor([scores[token] / asked["temperature"] for token in ranked], dtype=torch.float64).exp()
    weights /= weights.sum()
    kept = [float(weight) for rank, weight in enumerate(weights) if weights[:rank].sum() < asked.get("top_p", 1.0)]
    shares = dict(zip(ranked, kept, strict=False))
    return [shares.get(token, 0.0) / sum(kept) for token in scores]


class Careless(ModelDrafter):
    """Drafts as if nothing were suppressed."""

    def begin(self, target: Any, rows: Any, settings: Settings) -> None:
        super().begin(target, rows, Settings(max_new_tokens=settings.max_new_tokens, temperature=1.0))


DRAFTERS: dict[str, Callable[[Any], Any]] = {
    "model": lambda draft: ModelDrafter(draft, 2),
    "careless model": lambda draft: Careless(draft, 2),
    "named": lambda draft: JacobiDrafter(block=3),
    "none": lambda draft: NoDraft(),
}


@pytest.mark.parametrize("asked", HELD_BACK, ids=str)
@pytest.mark.parametrize("drafter", sorted(DRAFTERS))
def test_suppressing_leaves_every_other_text_its_probability(
    asked: dict[str, Any], drafter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All branches of the real loop over all texts of 3 tokens; a careless draft also draws what is held back."""
    target, draft = random_told(4, 1), random_told(4, 2)
    frozen = {key: frozenset(value) if isinstance(value, set) else value for key, value in asked.items()}
    settings = Settings(max_new_tokens=3, **frozen)
    branches = Branches()
    monkeypatch.setattr("formery.generate.judge.draw", branches.draw)
    monkeypatch.setattr("formery.generate.drafters.draw", branches.draw)

    def once() -> tuple[int, ...]:
        used = DRAFTERS[drafter](draft)
        events = draft_and_verify(target, [[0]], settings, 0, used, rule=branches.rule)  # type: ignore[arg-type]
        return tuple(token for group in events for token in group[0].emitted)

    found: Counter[tuple[int, ...]] = Counter()
    for text, chance in branches.run(once):
        found[text] += chance  # type: ignore[assignment]
    wanted: dict[tuple[int, ...], float] = {(): 1.0}
    for place in range(3):
        wanted = {
            (*text, token): chance * share
            for text, chance in wanted.items()
            for token, share in enumerate(chances_by_hand(target.says((0, *text)), [0, *text], asked, place == 0))
        }
    for text, chance in wanted.items():
        assert found[text] == pytest.approx(chance, abs=1e-12)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(4))
def test_beams_find_the_best_text_without_what_is_suppressed(seed: int) -> None:
    """Every text of up to 3 tokens over 3 tokens and an end token is scored by hand."""
    target, end, longest = random_told(4, seed), 3, 3
    gone, first = {seed % 3}, {(seed + 1) % 3, end}

    def log_chance(text: tuple[int, ...], place: int) -> float:
        logits = target.says((0, *text[:place])).clone()
        logits[[*gone, *(first if place == 0 else ())]] = -torch.inf
        return float(logits.log_softmax(-1)[text[place]])

    scores: dict[tuple[int, ...], float] = {}
    for length in range(1, longest + 1):
        for text in itertools.product(range(3), repeat=length):
            whole = (*text, end) if length < longest else text
            scores[text] = sum(log_chance(whole, place) for place in range(len(whole))) / len(whole)
    for beams in (1, 4, 100):
        found = generate(  # type: ignore[arg-type]
            target, [[0]], "beam", beams=beams, max_new_tokens=longest, stop_tokens=[end],
            suppressed=gone, suppressed_first=first,
        )[0]  # fmt: skip
        assert scores[tuple(found.tokens)] > -torch.inf
    assert tuple(found.tokens) == max(scores, key=lambda text: scores[text])


def test_an_end_that_is_suppressed_first_ends_nothing_at_once() -> None:
    target = Told(4, lambda text: torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    asked: dict[str, Any] = {"max_new_tokens": 5, "stop_tokens": [3]}
    for method in ("greedy", "beam", "parallel-jacobi-decoding", "aggressive-decoding"):
        assert texts(target, [[0], [1, 2]], method, **asked) == [[], []]
        found = generate(target, [[0], [1, 2]], method, suppressed_first=[3], **asked)  # type: ignore[arg-type]
        assert [(one.tokens, one.stop) for one in found] == [([2], "end")] * 2


# Ends


@pytest.mark.parametrize("name", ["gpt2", "llama3", "mixtral", "t5", "whisper"])
def test_a_text_ends_at_any_of_the_published_ends(name: str, tmp_path: Path) -> None:
    theirs, folder = saved(name)
    target, prompts = loaded(name)
    free = texts(target, prompts, max_new_tokens=30, stop_tokens=[])
    # Tokens that end two of the texts, each in its middle.
    ends = [free[0][7], next(token for token in free[1][4:] if token != free[0][7])]
    twin = tmp_path / "twin"
    shutil.copytree(folder, twin)
    told = json.loads((twin / "generation_config.json").read_text())
    (twin / "generation_config.json").write_text(json.dumps({**told, "eos_token_id": ends}))
    again = formery.load(twin)
    assert again.conventions.stop == tuple(ends)
    wanted = [text[: min((text.index(end) for end in ends if end in text), default=30)] for text in free]
    assert len(wanted[0]) < 30 > len(wanted[1])
    for method in ("greedy", *METHODS):
        found = generate(again, prompts, method, max_new_tokens=30, **options(method, again))
        assert [one.tokens for one in found] == wanted, method
        assert [one.stop for one in found] == ["end" if len(text) < 30 else "length" for text in wanted]
    their_twin = type(theirs).from_pretrained(twin).eval()
    assert their_text(their_twin, prompts, 30, again.conventions.pad or 0) == wanted
    if not again.conventions.suppressed:
        beams = their_text(their_twin, prompts, 12, again.conventions.pad or 0, num_beams=3)
        assert texts(again, prompts, "beam", beams=3, max_new_tokens=12) == beams
