"""Beam search: the likeliest text among several that grow side by side."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from formery.errors import FormeryError
from formery.generate.sampler import penalised
from formery.generate.settings import Settings
from formery.generate.stopping import Stopping
from formery.generate.target import Target, full_length
from formery.generate.verify import Decoding, Event
from formery.models import Model, Source


@dataclass
class Search:
    """The beams of one prompt; scores are sums of log-probabilities."""

    index: int
    prefix: list[int]
    room: int
    beams: list[tuple[float, list[int]]] = field(default_factory=lambda: [(0.0, [])])
    finished: list[tuple[float, list[int], str]] = field(default_factory=list)

    def advance(self, scores: torch.Tensor, ends: frozenset[int], width: int, penalty: float) -> list[int]:
        """Goes one token on; scores[i, token] continues beam i. Returns the beam that each new one came from."""
        total = scores + torch.tensor([score for score, _ in self.beams], dtype=scores.dtype)[:, None]
        # Enough for `width` beams that go on, even if each of them could end in every way.
        best = total.flatten().topk(min((1 + max(1, len(ends))) * width, total.numel()))
        origins: list[int] = []
        beams: list[tuple[float, list[int]]] = []
        for rank, (score, place) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            origin, token = divmod(place, scores.shape[1])
            tokens = [*self.beams[origin][1], token]
            if token in ends:
                if rank < width:  # what ends must be as good as what goes on
                    self.finished.append((score / len(tokens) ** penalty, tokens[:-1], "end"))
            elif len(beams) < width:
                beams.append((score, tokens))
                origins.append(origin)
        self.beams = beams
        if self.beams and len(self.beams[0][1]) >= self.room:
            self.finished += [(score / len(tokens) ** penalty, tokens, "length") for score, tokens in self.beams]
            self.beams, origins = [], []
        self.finished = sorted(self.finished, key=lambda one: -one[0])[:width]
        if self.beams and len(self.finished) == width:
            score, tokens = self.beams[0]
            if self.finished[-1][0] >= score / len(tokens) ** penalty:
                self.beams, origins = [], []
        return origins


def beam_search(beams: int = 5, length_penalty: float = 1.0) -> Decoding:
    """Decoding by beam search: the finished text with the highest `log-probability / tokens ** length_penalty`.

    Ends when as many texts are finished as there are beams and none that still grows scores better. Stop strings
    end the best text afterwards. With as many beams as there are texts it finds the likeliest of all.
    """
    if beams < 1:
        raise FormeryError(f"beam search needs at least 1 beam, not {beams}.")

    @torch.inference_mode()
    def decode(model: Model, prompts: Sequence[Source], settings: Settings, first: int) -> Iterator[list[Event]]:
        if settings.temperature > 0:
            raise FormeryError("beam search does not sample: leave temperature at 0.")
        target = Target(model, prompts, settings)
        ends = Stopping(model, settings).ends
        searches = [
            Search(first + i, prefix, full_length(model, len(prefix), settings))
            for i, prefix in enumerate(target.prefixes)
        ]
        while searches:
            started = time.perf_counter()
            fed = [(one.prefix + tokens)[-1:] for one in searches for _, tokens in one.beams]
            logits = target.feed(fed)[:, -1].cpu()
            rows: list[int] = []
            events, going, row = [], [], 0
            for one in searches:
                count = len(one.beams)
                scores = torch.stack(
                    [
                        penalised(logits[row + i], one.prefix + tokens, settings, not tokens).double().log_softmax(-1)
                        for i, (_, tokens) in enumerate(one.beams)
                    ]
                )
                rows += [row + origin for origin in one.advance(scores, ends, beams, length_penalty)]
                row += count
                event = Event(one.index, state_bytes=target.state.nbytes)
                if one.beams:
                    going.append(one)
                else:
                    _, tokens, stop = one.finished[0]
                    stopping = Stopping(model, settings, one.prefix)
                    kept, event.text, stopped = stopping.take([], tokens, len(tokens) + 1)
                    event.emitted, event.stop = kept, stopped or stop
                    event.text += "" if stopped else stopping.whole(kept)[len(event.text) :]
                events.append(event)
            searches = going
            if searches:
                target.state.select(rows)
            for event in events:
                event.verify_seconds = time.perf_counter() - started
            yield events

    return decode
