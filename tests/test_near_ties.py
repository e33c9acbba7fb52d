"""Near ties: where rounding would decide, all ways of computing agree all the same."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from generation import KINDS, Told, feed, model, noisy
from torch import Tensor

from formery.generate import Drafter, NoDraft, Settings, draft_and_verify
from formery.generate.drafters import CopyDrafter, ModelDrafter
from formery.generate.target import canonical, rounding_bound
from formery.methods.decoding.parallel.parallel_jacobi_decoding import JacobiDrafter
from formery.models import Decoder, EncoderDecoder
from formery.parts import Packing
from formery.parts.native import using

Model = Decoder | EncoderDecoder
PROMPTS = [[row + 2, row + 5, 3 * row + 1][: 1 + row % 3] for row in range(16)]


@pytest.fixture(autouse=True)
def without_kernels() -> Iterator[None]:
    """The compiled kernels leave nothing to decide."""
    with using(False):
        yield


def tied(kind: str, difference: float, vocabulary: int = 98) -> Model:
    """A model in which every token has a twin whose logit differs by rounding at most (or not at all)."""
    made = model(kind, vocabulary=vocabulary)
    random = torch.Generator().manual_seed(0)
    weight = made.output.map.weight
    half = vocabulary // 2
    with torch.no_grad():
        weight[half:] = weight[:half] * (1 + difference * torch.randn(weight[:half].shape, generator=random))
    return made


def decoded(
    target: Model, drafter: Drafter, batch: int, guard: bool, penalty: float = 1.0
) -> tuple[list[list[int]], int]:
    """The tokens of all prompts, and how many near ties were decided apart."""
    texts: list[list[int]] = [[] for _ in PROMPTS]
    guarded = 0
    asked = Settings(max_new_tokens=10, repetition_penalty=penalty)
    for first in range(0, len(PROMPTS), batch):
        prompts = PROMPTS[first : first + batch]
        for events in draft_and_verify(target, prompts, asked, first, drafter, guard=guard):
            for event in events:
                texts[event.row] += event.emitted
                guarded += event.guarded
    return texts, guarded


def ways(target: Model) -> list[tuple[Drafter, int]]:
    draft = noisy(target, 0.02)
    return [
        *((NoDraft(), batch) for batch in (2, 3, 16)),
        *((ModelDrafter(draft, length), batch) for length, batch in ((1, 1), (3, 5), (7, 16))),
        (CopyDrafter(shortest=1), 4),
        (JacobiDrafter("plain"), 16),
        (JacobiDrafter("block", block=4), 1),
    ]


@pytest.mark.parametrize("kind", ["rotary", "alibi", "translator"])
@pytest.mark.parametrize("difference", [0.0, 1e-7])
def test_near_ties_flip_without_the_guard_and_never_with_it(kind: str, difference: float) -> None:
    target = tied(kind, difference)
    free, _ = decoded(target, NoDraft(), 1, guard=False)
    plain, guarded = decoded(target, NoDraft(), 1, guard=True)
    assert guarded > 10 * len(PROMPTS) // 2
    flipped = 0
    for drafter, batch in ways(target):
        flipped += decoded(target, drafter, batch, guard=False)[0] != free
        assert decoded(target, drafter, batch, guard=True)[0] == plain
    assert difference == 0 or flipped > 0, "these models no longer have ties that flip: the test above shows nothing"


def test_ties_are_decided_alike_under_a_repetition_penalty() -> None:
    target = tied("rotary", 1e-7)
    for penalty in (1.2, 0.8):
        plain, guarded = decoded(target, NoDraft(), 1, guard=True, penalty=penalty)
        assert guarded > 0
        for drafter, batch in ways(target)[1::3]:
            assert decoded(target, drafter, batch, guard=True, penalty=penalty)[0] == plain


def test_logits_that_are_all_zero_are_a_tie() -> None:
    target = model("rotary")
    with torch.no_grad():
        target.output.map.weight.zero_()
    plain, guarded = decoded(target, NoDraft(), 1, guard=True)
    assert guarded == 10 * len(PROMPTS)
    assert decoded(target, NoDraft(), 16, guard=True)[0] == plain


def test_ordinary_models_hardly_need_the_guard() -> None:
    guarded = sum(decoded(model(kind), NoDraft(), 16, guard=True)[1] for kind in KINDS)
    assert guarded <= 2  # of 800 decisions


def test_a_penalty_does_not_hide_how_large_the_logits_were() -> None:
    """Logits of 100 are off by more than their difference here, also where a penalty makes them small after that."""
    target = Told(3, lambda text: torch.tensor([100.0, 0.10001, -1.0]))
    asked = Settings(max_new_tokens=1, repetition_penalty=1000.0)
    events = [event for group in draft_and_verify(target, [[0]], asked, 0, NoDraft()) for event in group]  # type: ignore[arg-type]
    assert [event.guarded for event in events] == [1]


@torch.inference_mode()
def deviation(target: Model, texts: Sequence[tuple[list[int], list[int]]], width: int, batch: int) -> float:
    """The largest difference between logits of this way of computing and the canonical ones, in rounding bounds."""
    worst = 0.0
    packing = Packing()
    for first in range(0, len(texts), batch):
        part = texts[first : first + batch]
        with packing:
            state, _ = target.begin([prompt for prompt, _ in part], 8)
        found: list[list[Tensor]] = [[] for _ in part]
        for at in range(0, max(len(text) for _, text in part), width):
            rows = [text[at : at + width] for _, text in part]
            before = state.lengths
            with packing:
                logits = feed(target, state, rows)
            state.rollback([old + len(row) for old, row in zip(before, rows, strict=True)])
            for row, tokens in enumerate(rows):
                found[row] += logits[row, : len(tokens)]
        for (prompt, text), logits_of in zip(part, found, strict=True):
            for place in range(0, len(text), 4):
                wanted = canonical(target, prompt, text[: place + 1])
                gap = (logits_of[place] - wanted).abs().amax() / rounding_bound(wanted)
                worst = max(worst, float(gap))
    return worst


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rounding_bound_is_one(kind: str, dtype: torch.dtype, scale: float) -> None:
    """A choice is safe where its margin exceeds twice what either logit may be off; here there is room to spare.

    Weights three times as large make attention and logits sharp, and errors larger than in any trained model.
    """
    target = model(kind).to(dtype)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in target.parameters():
            if weight.dim() > 1:
                weight *= scale
    texts = [
        (
            torch.randint(0, 97, (4 + row % 5,), generator=random).tolist(),
            torch.randint(0, 97, (21 - row % 7,), generator=random).tolist(),
        )
        for row in range(16)
    ]
    if not target.reads_apart:
        texts = [(text, text) for _, text in texts]
    worst = max(
        deviation(target, texts[:rows], width, rows) for width, rows in ((1, 1), (1, 16), (3, 5), (8, 1), (16, 16))
    )
    assert 0 < worst < 0.5
