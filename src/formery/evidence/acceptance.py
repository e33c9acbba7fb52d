"""What theory predicts of drafting while sampling, against what was written."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from formery.evidence.race import Laps
from formery.generate.run import encoded
from formery.generate.sampler import probabilities
from formery.generate.settings import Settings
from formery.generate.verify import Event
from formery.models import Model


@torch.inference_mode()
def acceptance(
    model: Model, draft: Model | None, prompts: Sequence[str | list[int]], laps: Laps, temperature: float
) -> dict[str, float]:
    """Sums over all drafted tokens that were looked at, and over all tokens written.

    judged: drafted tokens that the target decided on. accepted: those that stood. expected: the sum of `sum
    over v of min(target[v], draft[v])`, the chance that each stands; expected_variance: of that sum.
    surprise: the sum of `ln target[token] + entropy(target)` over the written tokens, which is 0 on average
    where they are distributed as the target has it; surprise_variance: of that sum. acceptance,
    expected_acceptance: accepted and expected over judged.
    """
    assert draft is not None
    settings = Settings(temperature=temperature)
    names = ("judged", "accepted", "expected", "expected_variance", "surprise", "surprise_variance")
    sums = dict.fromkeys(names, 0.0)
    for number, (prompt, output) in enumerate(zip(prompts, laps.outputs, strict=True), 1):
        tokens = [int(token) for token in encoded(model, prompt, number)]
        written = [*output.tokens, *ended(model, output.stop)]
        target, guess = (chances(one, tokens, written, settings) for one in (model, draft))
        overlap = torch.minimum(target, guess).sum(-1)
        for place, stood in judged(output.trace, written):
            sums["judged"] += 1
            sums["accepted"] += stood
            sums["expected"] += float(overlap[place])
            sums["expected_variance"] += float(overlap[place] * (1 - overlap[place]))
        log = target.clamp_min(torch.finfo(target.dtype).tiny).log()
        mean = (target * log).sum(-1)
        sums["surprise"] += float((log[range(len(written)), written] - mean).sum())
        sums["surprise_variance"] += float(((target * log.square()).sum(-1) - mean.square()).sum())
    rates = {"acceptance": sums["accepted"], "expected_acceptance": sums["expected"]}
    return sums | {name: value / max(sums["judged"], 1) for name, value in rates.items()}


def ended(model: Model, stop: str) -> list[int]:
    """The end token where the model chose it: it was decided on like any other."""
    end = None if model.tokenizer is None else model.tokenizer.eos
    return [end] if stop == "end" and end is not None else []


def chances(
    model: Model, prompt: list[int], written: list[int], settings: Settings
) -> Float[Tensor, "time vocabulary"]:
    """The distribution from which a model would have drawn each written token."""
    state, prefixes = model.begin([prompt], len(prompt) + len(written))
    logits = model.step(torch.tensor([[*prefixes[0], *written]]), state)[0, len(prefixes[0]) - 1 : -1]
    return torch.stack([probabilities(one, [], settings) for one in logits])


def judged(trace: Sequence[Event], written: Sequence[int]) -> list[tuple[int, bool]]:
    """(place in what was written, whether the draft stood) for each drafted token that the target decided on.

    A replacement is never the token that it replaces, so a draft stood where it is what was written.
    """
    found = []
    begin = 0
    for event in trace:
        for place, token in enumerate(event.drafted, begin):
            if place >= len(written):
                break
            found.append((place, token == written[place]))
            if token != written[place]:
                break
        begin += len(event.emitted)
    return found
