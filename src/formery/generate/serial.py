"""Drafting with a serial guide: one guess after the other, by a beam or by lines that are drawn."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from formery.errors import FormeryError
from formery.generate.draft import Draft, Row
from formery.generate.guided import Guided, drawn, nodes_of
from formery.generate.sampler import probabilities
from formery.models.guide import Guide


class SerialGuide(Guide):
    """A guide that makes one guess after the other; what it carries from guess to guess is a vector of each line."""

    def step(
        self, carry: Float[Tensor, "lines carried"], embedded: Float[Tensor, "lines width"]
    ) -> tuple[Float[Tensor, "lines width"], Float[Tensor, "lines carried"]]:
        """The vector of the next guess, and what is then carried, after a guessed token with that embedding."""
        raise NotImplementedError


class SerialGuided(Guided):
    """Drafts with a serial guide: greedily by a beam over its guesses, sampling by lines that go on independently.

    width: how many guesses after each token are looked at; sampling, how many lines there are. beam: how many lines go
    on from each depth; those that begin alike share their beginnings, so that together they are a tree. nodes: the tree
    of so many guesses, the likeliest of all that were looked at; without it, of the lines that are left at the end.
    """

    draft: SerialGuide

    def __init__(self, draft: Guide, length: int, width: int, nodes: int | None, beam: int = 1):
        if beam < 1:
            raise FormeryError(f"a beam needs at least 1 line, not {beam}.")
        super().__init__(draft, length, width, max(beam, width) * length if nodes is None else nodes)
        self.beam, self.whole = beam, nodes is None

    def opened(self, rows: Sequence[Row]) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch carried"]]:
        """The vectors of the first guesses, and what the guide then carries; a paper's own drafter says how."""
        raise NotImplementedError

    def ends(self, rows: Sequence[Row]) -> Float[Tensor, "batch width"]:
        """The embeddings of the rows' last tokens."""
        return self.looked_up(torch.tensor([row.tokens[-1] for row in rows], device=self.last.device))

    def looked_up(self, tokens: Int[Tensor, "lines"]) -> Float[Tensor, "lines width"]:
        """The target's own embeddings of tokens."""
        return self.target.model.embedding.looked_up(tokens)

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        lengths = [min(self.length, room) for room in rooms]
        if max(lengths) < 1:
            return [Draft() for _ in rows]
        if self.settings.temperature > 0:
            return self._drawn(rows, lengths)
        return self._chains(rows, lengths) if self.beam == self.width == 1 else self._trees(rows, lengths)

    def _chains(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Draft]:
        """The likeliest guess, and the likeliest after that one: nothing comes back from the device on the way."""
        vectors, carry = self.opened(rows)
        made: list[Tensor] = []
        found: list[Tensor] = []
        for depth in range(max(lengths)):
            if depth > 0:
                vectors, carry = self.draft.step(carry, self.looked_up(found[-1]))
            made.append(self.logits(vectors[:, None])[:, 0])
            found.append(made[-1].argmax(-1))
        tokens, logits = torch.stack(found, 1), torch.stack(made, 1)
        chances = (logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)).exp()
        return [
            Draft(ids[:length], None, None, sure[:length])
            for ids, sure, length in zip(tokens.tolist(), chances.tolist(), lengths, strict=True)
        ]

    def _trees(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Draft]:
        """A beam over all rows at once."""
        batch = len(rows)
        vectors, carry = self.opened(rows)
        reached = vectors.new_ones(batch, 1)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []  # all that were looked at, their chances, which go on
        for depth in range(max(lengths)):
            logits = self.logits(vectors.view(batch, -1, self.draft.width))
            best, tokens = logits.topk(min(self.width, logits.shape[-1]), -1)
            chances = (best - logits.logsumexp(-1, keepdim=True)).exp()
            together = (reached[..., None] * chances).flatten(1)
            reached, kept = together.topk(min(self.beam, together.shape[1]), -1)
            steps.append((tokens, chances, kept))
            if depth + 1 < max(lengths):
                lines = (kept // tokens.shape[-1] + reached.new_tensor(range(batch))[:, None] * tokens.shape[1]).long()
                going = tokens.flatten(1).gather(1, kept).flatten()
                vectors, carry = self.draft.step(carry[lines.flatten()], self.looked_up(going))
        told = [(tokens.tolist(), chances.tolist(), kept.tolist()) for tokens, chances, kept in steps]
        return [
            self._tree([(tokens[i], chances[i], kept[i]) for tokens, chances, kept in told[:length]])
            for i, length in enumerate(lengths)
        ]

    def _tree(self, steps: Sequence[tuple[list[list[int]], list[list[float]], list[int]]]) -> Draft:
        """One row's draft: of each depth the guesses after each line, their chances, and which of them went on."""
        tokens: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        reached: list[float] = []
        front = [-1]
        for found, sure, kept in steps:
            first = len(tokens)
            for place, some, of_some in zip(front, found, sure, strict=True):
                tokens += some
                chances += of_some
                parents += [place] * len(some)
                above = 1.0 if place < 0 else reached[place]
                reached += [above * chance for chance in of_some]
            front = [first + one for one in kept]
        draft = Draft(tokens, None, parents, chances)
        if not self.whole:
            return nodes_of(draft, reached, self.nodes)
        stays = sorted({place for one in front if one >= 0 for place in draft.line(one)})
        return nodes_of(draft.only(stays), [reached[place] for place in stays], len(stays))

    def _drawn(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Draft]:
        """`width` lines from each row's last token, each drawn on by itself."""
        drafts = [Draft([], [], []) for _ in rows]
        lines: list[tuple[int, int, list[int]]] = [(i, -1, []) for i in range(len(rows))]  # row, place, its line
        vectors, carry = self.opened(rows)
        for depth in range(max(lengths)):
            logits, after, origin = self.logits(vectors[:, None])[:, 0], [], []
            for line, (i, place, written) in enumerate(lines):
                if depth >= lengths[i]:
                    continue
                first = not rows[i].output and depth == 0
                left = probabilities(logits[line], rows[i].tokens + written, self.settings, first)
                for token, drawn_from in drawn(left, self.width if depth == 0 else 1, self.random[i]):
                    if len(drafts[i].tokens) < self.nodes:
                        drafts[i].tokens.append(token)
                        drafts[i].parents.append(place)  # type: ignore[union-attr]
                        drafts[i].probabilities.append(drawn_from)  # type: ignore[union-attr]
                        after.append((i, len(drafts[i].tokens) - 1, [*written, token]))
                        origin.append(line)
            lines = after
            if not lines or depth + 1 == max(lengths):
                break
            tokens = torch.tensor([written[-1] for *_, written in lines], device=carry.device)
            vectors, carry = self.draft.step(carry[origin], self.looked_up(tokens))
        for draft in drafts:
            if draft.parents == list(range(-1, len(draft.tokens) - 1)):
                draft.parents = None
        return drafts
