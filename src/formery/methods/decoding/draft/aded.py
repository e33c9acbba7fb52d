"""ADED: drafts from counts of what followed what, which learn from every word of the model, searched as a tree.

Liu, Lei, Zhang and Xu, "Adaptive Draft-Verification for Efficient Large Language Model Decoding", 2024. No network
drafts. A table says how likely a token is after a run of tokens; it begins with a corpus and takes in all that the
model says while it decodes: what it writes, and what it would have written after guesses that did not stand. Which
guesses make the draft is searched for as in a game (PUCT): `nodes` walks go down from the text's end, at each token to
the child with the highest

    Q(child) + explore · P(child) · sqrt(Σ N) / (1 + N(child))

where P is the table's estimate, N counts walks, and Q is the chance of the likeliest line that is still to be found
there, `Π P`; each walk adds one guess. With `explore` 0 these are the likeliest ones. The target checks the tree in one
call, so that the text stays the very same.

The paper's table has runs of two tokens and begins with a general corpus; here the longest run that is known decides,
of `longest` down to `shortest` tokens, and the corpus is what the model itself wrote on its training prompts. Both are
looked up where they are needed, and what a text taught is forgotten with it, so that no text depends on another. A
guess below the chance `least` is not made: on a small model each token of a call costs something. The paper reports
that decoding is 2.5 times faster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from formery.errors import FormeryError
from formery.evidence.checks import Setting, criterion, rows, survey, untestable, values_of
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.race import Laps
from formery.generate.draft import Draft, Row, Verdict
from formery.generate.method import Method, drafting, register
from formery.generate.ngrams import CorpusGuide, Counts
from formery.generate.settings import Settings
from formery.generate.target import Target
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless
from formery.methods.decoding.draft.training import LICENCES, decoder_of, frozen, texts_of
from formery.models import Guide, Model, load
from formery.train.loop import Result
from formery.train.recipe import Recipe, Trained
from formery.train.recipe import register as register_recipe

FRESH = 8.0  # how often the text itself counts for each time in the corpus
DOUBT = 0.5  # added to what followed a run, as if something else had followed it so often


@dataclass
class Node:
    """A guess in the search: its token, its chance after its parent, and that of the line to it.

    best: the chance of the likeliest line that is still to be found, at it or below.
    """

    token: int
    chance: float
    line: float
    depth: int
    place: int = -1  # in the draft, where it is part of it
    visits: int = 0
    best: float = 0.0
    children: list["Node"] = field(default_factory=list)


class AdedDrafter:
    """Drafts the tree that the search finds; without `draft` the table begins with the prompt alone.

    length: how deep a draft may be. nodes: how many tokens it has at most. width: how many guesses may follow a token.
    static: nothing is learned while decoding.
    """

    def __init__(
        self,
        draft: Guide | None = None,
        length: int = 12,
        nodes: int = 12,
        width: int = 2,
        longest: int = 5,
        shortest: int = 2,
        explore: float = 0.1,
        least: float = 0.2,
        static: bool = False,
    ):
        if length < 1 or nodes < 1 or width < 1 or explore < 0 or not 0 <= least <= 1:
            raise FormeryError(
                f"a search needs length, nodes and width >= 1, explore >= 0 and 0 <= least <= 1, not length {length}, "
                f"nodes {nodes}, width {width}, explore {explore}, least {least}."
            )
        Counts(shortest, longest)
        if draft is not None and not isinstance(draft, CorpusGuide):
            raise FormeryError("aded drafts from a corpus: take a guide that was made for it, or none.")
        self.draft, self.length, self.nodes, self.width = draft, length, nodes, width
        self.longest, self.shortest = longest, shortest
        self.corpus = None if draft is None else draft.corpus(shortest, longest)
        self.explore, self.least, self.static = explore, least, static

    def begin(self, target: Target, rows: Sequence[Row], settings: Settings) -> None:
        if self.draft is not None and self.draft.vocabulary != target.model.vocabulary:
            raise FormeryError(
                f"the corpus is of {self.draft.vocabulary} tokens, the model of {target.model.vocabulary}: take one "
                "that this model wrote."
            )
        self.tables = []
        for row in rows:
            table = Counts(self.shortest, self.longest)
            text = row.prefix if row.apart else row.prompt
            for place in range(self.shortest, len(text)):
                table.add(text[max(0, place - self.longest) : place], text[place], FRESH)
            self.tables.append(table)

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        return [
            self._search(table, row.tokens[-self.longest :], min(self.length, room))
            for table, row, room in zip(self.tables, rows, rooms, strict=True)
        ]

    def _search(self, table: Counts, text: list[int], depth: int) -> Draft:
        draft, root = Draft([], None, [], []), Node(-1, 1.0, 1.0, 0)
        root.children = self._children(table, text, root) if depth > 0 else []
        while len(draft.tokens) < self.nodes and any(child.best > 0 for child in root.children):
            walk, before = [root], list(text)
            while walk[-1] is root or walk[-1].visits:
                walk.append(self._chosen(walk[-1]))
                before.append(walk[-1].token)
            node = walk[-1]
            node.children = self._children(table, before, node) if node.depth < depth else []
            node.place = len(draft.tokens)
            draft.tokens.append(node.token)
            draft.parents.append(walk[-2].place)  # type: ignore[union-attr]
            draft.chances.append(node.chance)  # type: ignore[union-attr]
            for one in reversed(walk):
                one.visits, one.best = one.visits + 1, max((child.best for child in one.children), default=0.0)
        if draft.parents == list(range(-1, len(draft.tokens) - 1)):
            draft.parents = None
        return draft

    def _chosen(self, node: Node) -> Node:
        """The child to go to: one below which something is left to be found, by value and exploration."""
        eager = self.explore * math.sqrt(node.visits + 1)
        left = [child for child in node.children if child.best > 0]
        return max(left, key=lambda child: child.best + eager * child.chance / (1 + child.visits))

    def _children(self, table: Counts, before: list[int], node: Node) -> list[Node]:
        """The likeliest next tokens by the longest run that is known."""
        for size in range(min(self.longest, len(before)), self.shortest - 1, -1):
            run = tuple(before[-size:])
            fresh = table.after(run)
            followers = {} if self.corpus is None else self.corpus.after(run)
            if fresh or followers:
                counts = {**followers}
                for token, count in fresh.items():
                    counts[token] = counts.get(token, 0.0) + count
                total = sum(counts.values()) + DOUBT
                best = sorted(counts.items(), key=lambda pair: -pair[1])[: self.width]
                made = [(token, n / total, node.line * n / total) for token, n in best]
                return [Node(*one, node.depth + 1, best=one[2]) for one in made if one[2] >= self.least]
        return []

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
        if self.static:
            return
        for row, verdict, table in zip(rows, verdicts, self.tables, strict=True):
            text = row.tokens
            start = len(text) - min(len(verdict.emitted), len(row.output))
            for place in range(start, len(text)):
                table.add(text[max(0, place - self.longest) : place], text[place], FRESH)
            before = text[max(0, start - self.longest) : start]
            draft = verdict.draft
            for place in sorted({*range(len(draft.tokens))} - {*verdict.path}):
                said = [*before, *(draft.tokens[one] for one in draft.line(place))]
                table.add(said[-self.longest :], verdict.choices[place + 1], FRESH)

    def select(self, rows: Sequence[int]) -> None:
        self.tables = [self.tables[row] for row in rows]


METHOD = register(
    Method(
        "aded",
        "a tree searched in counts of what followed what, which learn from every word of the model",
        lossless=True,
        make=drafting(AdedDrafter),
        variants=("width=1",),
        paper="aded",
    )
)


def make(model: Model) -> CorpusGuide:
    """An empty corpus for a model."""
    return CorpusGuide(decoder_of(model).embedding.width, model.vocabulary, count=0)


def gathered(name: str) -> CorpusGuide:
    """All that the shipped model of that name was given and wrote on the training split of its work."""
    model = frozen(load(name))
    text = texts_of(name, model)
    tokens = text.tokens[text.positions >= 0]
    guide = CorpusGuide(decoder_of(model).embedding.width, model.vocabulary, len(tokens))
    guide.tokens.copy_(tokens)
    return guide


def gathering(name: str) -> Recipe:
    """Registers the recipe that gathers the corpus for the shipped model of that name."""

    def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
        return Trained(gathered(name), Result(1, 0.0, 0.0), 1, (), name, LICENCES[name])

    description = f"the corpus by which {METHOD.name} drafts for the model `{name}`"
    return register_recipe(Recipe(f"{name}/{METHOD.name}", description, run, (gathered,)))


for work in ("code", "translate"):
    gathering(work)


def over_time(
    model: Model, draft: Model | None, prompts: Sequence[str | list[int]], laps: Laps, temperature: float
) -> dict[str, float]:
    """Guesses accepted in a call among the first and among the last third of each text's calls."""
    thirds: dict[str, list[int]] = {"first": [], "last": []}
    for one in laps.outputs:
        accepted = [event.accepted for event in one.trace]
        third = max(1, len(accepted) // 3)
        thirds["first"] += accepted[:third]
        thirds["last"] += accepted[-third:]
    return {f"accepted in the {name} third": sum(some) / len(some) for name, some in thirds.items()}


def check(budget: Budget) -> Measured:
    """The tree and a chain; without exploration, without learning, and with runs of two tokens alone."""
    static, greedy_search = f"{METHOD.name}:static=true", f"{METHOD.name}:explore=0"
    trigrams = f"{METHOD.name}:longest=2"
    names = [METHOD.name, f"{METHOD.name}:width=1", greedy_search, static, trigrams, "aggressive-decoding"]
    results = survey(budget, [Setting(name, extra=over_time) for name in names])
    own = [one for one in results if one.setting.method.startswith(METHOD.name)]
    adaptive = [one for one in own if one.setting.method == METHOD.name]
    first, last = (values_of(adaptive, f"accepted in the {name} third", batch=1) for name in ("first", "last"))
    factor = untestable(
        "factor",
        "chat models of 7 and 13 billion parameters decode 2.5 times as fast",
        ">=",
        2.5,
        "needs such models, and hardware on which a call costs the reading of the weights",
    )
    return Measured(
        [
            lossless(own),
            *fewer_calls(own),
            *faster(own),
            *accepts_more(results, METHOD.name, static, essential=True),
            *accepts_more(results, METHOD.name, greedy_search),
            *accepts_more(results, METHOD.name, trigrams),
            *accepts_more(results, METHOD.name, "aggressive-decoding"),
            criterion(
                "adapts",
                "more guesses are accepted in a call in the last third of a text's calls than in the first",
                [later - earlier for earlier, later in zip(first, last, strict=True)],
                ">",
                0.0,
            ),
            factor,
        ],
        rows(results),
        baseline="greedy decoding, token by token",
        models=[*PAPER.works, *(METHOD.draft_of(work) for work in PAPER.works)],
        notes=["aggressive-decoding copies from the prompt and the text alone, in a chain."],
    )


PAPER = publish(
    Paper(
        slug="aded",
        title="Adaptive Draft-Verification for Efficient Large Language Model Decoding",
        year=2024,
        part="decoding",
        domain="language",
        does="Drafts come from counts of what followed what, which begin with a corpus and learn from every word of "
        "the model while it decodes; a search that weighs likely against untried guesses makes them a tree.",
        claims="Decoding is about 2.5 times faster without any training, the text unchanged, and drafts get better as "
        "the model goes on.",
        needs="Chat models on accelerators, for the size of the speed-up.",
        name="ADED",
        training="none",
        sought="speed up LLM without training a draft model; n-gram lookup speculative decoding; "
        "draft adapts to my text",
        related={
            "aggressive-decoding": "drafts without a network",
            "stree": "trees without a network",
            "swift": "learns while it decodes",
            "pg-td": "a search over tokens",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
