"""Gumiho: the first guesses one after the other by a layer that attends, the later ones all at once by plain heads.

Li, Xu, Huang, Yin, Li, Ngai and Barsoum, "Gumiho: A Hybrid Architecture to Prioritize Early Tokens in Speculative
Decoding", 2025. Of a draft whose guess i stands with probability `p_i` if those before it stand, the length that stands
is `Σ_i Π_{j≤i} p_j` on average: each guess counts in all terms behind it, so early ones matter more. The guide spends
its strength there. A layer that attends to the whole text makes the first `serial` guesses, going on from its own
vectors,

    y_1 = norm(layer(fuse [x_t, e_{t+1}]))      y_2 = norm(layer(fuse [y_1, e(guess 1)]))

and heads that share nothing with each other make the others in one go from all that the layer made,

    y_{2+i} = y_2 + silu(W_i [y_1, e(guess 1), y_2, e(guess 2)] + b_i)

Where the first guesses branch, the heads' guesses of the likeliest line are tried behind every branch: they are there
anyway, and make short candidates as long as the longest ("full tree attention"). Loss: distance to the model's own
distribution and to the tokens that came, at each depth.

The paper's layer part is two layers deep and makes two guesses; it reports faster decoding than by all-serial and
all-parallel guides, and proves the claim about early guesses.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import criterion, rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.evidence.verdict import Criterion
from formery.generate.attending import AttendingGuided, Growing
from formery.generate.draft import Draft, Row
from formery.generate.headed import Headed, hang
from formery.generate.method import Method, drafting, register
from formery.methods.decoding.draft.checks import accepts_more, faster, faster_than, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.training import decoder_of, distilled_loss, guide_recipe, next_vectors, some_places
from formery.models import Model
from formery.models.guide import Guide, Heads
from formery.parts import Attention, GatedMLP, Layer, Linear, PreNorm, RMSNorm, Rotary
from formery.train.objective import Batch

SERIAL, PARALLEL = 1, 3
LEARNED = 384  # places of a batch that are learned from in a step
DRAWS = 20_000  # simulated drafts


class GumihoGuide(Headed):
    """A layer that makes `serial` guesses one after the other, and heads for `parallel` more."""

    def __init__(self, width: int, vocabulary: int, attention_heads: int, hidden: int, serial: int, parallel: int):
        attention = Attention(width, attention_heads, max(1, attention_heads // 2), position=Rotary())
        layer = Layer([PreNorm(RMSNorm(width), attention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])
        super().__init__([layer], RMSNorm(width))
        self.width, self.vocabulary, self.attention_heads, self.hidden = width, vocabulary, attention_heads, hidden
        self.serial, self.parallel = serial, parallel
        self.fuse = Linear(2 * width, width)
        self.heads = Heads(width, parallel, 2 * serial * width)

    def later(
        self, vectors: Float[Tensor, "place serial width"], embedded: Float[Tensor, "place serial width"]
    ) -> Float[Tensor, "place parallel width"]:
        """The guesses behind the serial ones, of which these are the vectors and their tokens' embeddings."""
        return self.heads(vectors[:, -1], torch.cat((vectors, embedded), -1).flatten(1))


class GumihoDrafter(AttendingGuided):
    """Drafts a chain, or with `beam` and `width` above 1 a tree, whose branches all end in the heads' guesses."""

    draft: GumihoGuide

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, beam: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes, beam)

    def propose(self, rows: Sequence[Row], rooms: Sequence[int]) -> list[Draft]:
        lengths = [min(self.length, room) for room in rooms]
        vectors = self.caught_up(rows)[:, None]
        slots, texts, serial = self.state.slots, self.state.lengths, self.draft.serial
        growing = [
            Growing(row, chance, self.settings, used, length)
            for row, chance, used, length in zip(rows, self.random, slots.used, slots.lengths, strict=True)
        ]
        made: list[Tensor] = []  # by the layer at each depth, for each row those of the front before
        origins: list[list[list[int]]] = []
        for depth in range(min(serial, max(lengths))):
            made.append(vectors if depth == 0 else self._read(growing, made[-1]))
            logits = self.logits(made[-1])
            for one, here, length in zip(growing, logits, lengths, strict=True):
                if depth < length:
                    one.grow(here, self.width, self.beam)
                if depth + 1 >= length:
                    one.front, one.origins = [], []
            origins.append([one.origins for one in growing])
            if not any(one.front for one in growing):
                break
        self.state.rollback(texts)
        if max(lengths) > serial:
            levels = self.logits(self._later(growing, made, origins))
            for one, here, length in zip(growing, levels, lengths, strict=True):
                for place in one.front:
                    hang(one, place, here[: length - serial], self.width, self.nodes)
        return [one.finished(self.nodes) for one in growing]

    def _later(
        self, growing: Sequence[Growing], made: Sequence[Tensor], origins: Sequence[Sequence[Sequence[int]]]
    ) -> Float[Tensor, "batch depth width"]:
        """What the heads make of each row's likeliest line of serial guesses."""
        tokens, places = [], []
        for row, one in enumerate(growing):
            line = [one.draft.tokens[place] for place in one.draft.line(one.front[0])] if one.front else [0] * len(made)
            tokens.append(line)
            at, way = 0, list[int]()
            for depth in reversed(range(len(made))):
                at = origins[depth][row][at] if one.front else 0
                way.append(at)
            places.append(way[::-1])
        chosen = torch.tensor(places, device=self.last.device)
        vectors = [found.take_along_dim(chosen[:, depth, None, None], 1) for depth, found in enumerate(made)]
        return self.draft.later(torch.cat(vectors, 1), self.embedded(tokens))


METHOD = register(
    Method(
        "gumiho",
        "an attending layer makes the first guesses, plain heads all later ones at once",
        lossless=True,
        make=drafting(GumihoDrafter),
        variants=("width=2:beam=2:nodes=7",),
        paper="gumiho",
    )
)


def make(model: Model) -> GumihoGuide:
    """One serial guess and three parallel ones for a model."""
    width = decoder_of(model).embedding.width
    return GumihoGuide(width, model.vocabulary, 4, hidden=5 * width // 4, serial=SERIAL, parallel=PARALLEL)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """The layer learns the first guesses, going on from its own vectors, and the heads those behind them."""
    assert isinstance(guide, GumihoGuide)
    vectors, embedded, positions, written = next_vectors(model, batch)
    at = some_places(guide, written, LEARNED)
    text, place = at.unbind(1)
    made, read = [guide(vectors, embedded, positions)], [embedded]
    for _ in range(1, guide.serial):
        # The guess before stands in the model's vector's place; the token after it is the one that came.
        embedded = nn.functional.pad(embedded, (0, 0, 0, 1))[:, 1:]
        made.append(guide(made[-1], embedded, positions))
        read.append(embedded)
    # Behind each vector of the layer stands the guess that was made of it.
    tokens = [nn.functional.pad(one, (0, 0, 0, 1))[:, 1:][text, place] for one in read]
    serial = torch.stack([one[text, place] for one in made], 1)
    later = guide.later(serial, torch.stack(tokens, 1))
    return distilled_loss(model, torch.cat((serial, later), 1), batch, at)


STEPS = 1300
for target in ("code", "translate"):
    guide_recipe(target, "gumiho", make, objective, STEPS, batch_size=8)


def expected_length(chances: Sequence[float]) -> float:
    """`Σ_i Π_{j≤i} chances_j`: how many guesses of a chain stand on average."""
    total, reached = 0.0, 1.0
    for chance in chances:
        reached *= chance
        total += reached
    return total


def simulated_length(chances: Sequence[float], draws: int, chance: random.Random) -> tuple[float, float]:
    """The mean of how many guesses stand in drawn drafts, and the standard error of that mean."""
    lengths = []
    for _ in range(draws):
        stood = 0
        while stood < len(chances) and chance.random() < chances[stood]:
            stood += 1
        lengths.append(stood)
    mean = sum(lengths) / draws
    return mean, (sum((one - mean) ** 2 for one in lengths) / (draws - 1) / draws) ** 0.5


def moved(chances: Sequence[float], chance: random.Random) -> list[float]:
    """The same chances, some of a later one's moved to an earlier one, their sum unchanged."""
    early, late = sorted(chance.sample(range(len(chances)), 2))
    found = list(chances)
    share = chance.random() * min(1 - found[early], found[late])
    found[early] += share
    found[late] -= share
    return found


def early_ones_matter(trials: int = 400) -> list[Criterion]:
    """Of chances that are moved from a later guess to an earlier one: how often the expected length rises.

    From equal chances, and from those that fall with depth, as a drafter's do; and from any, where it need not.
    """
    chance, found = random.Random(0), {}
    for name in ("equal", "falling", "any"):
        rises, apart = [], []
        for trial in range(trials):
            depth = chance.randrange(2, 9)
            chances = [chance.uniform(0.2, 0.9)] * depth if name == "equal" else []
            chances = chances or [chance.uniform(0.2, 0.95) for _ in range(depth)]
            chances = sorted(chances, reverse=True) if name == "falling" else chances
            after = moved(chances, chance)
            rises.append(expected_length(after) - expected_length(chances))
            if trial < 10:
                mean, error = simulated_length(after, DRAWS, chance)
                apart.append(abs(mean - expected_length(after)) / max(error, 1e-9))
        found[name] = (rises, apart)
    errors = [one for _, apart in found.values() for one in apart]
    shares = {name: [sum(one > 0 for one in rises) / trials] for name, (rises, _) in found.items()}
    return [
        criterion(
            "formula",
            "the formula of the expected length is that of drawn drafts, in standard errors",
            errors,
            "<",
            4.0,
        ),
        criterion(
            "early, equal",
            "moving acceptance forward lengthens drafts of equal chances: the share",
            shares["equal"],
            "==",
            1.0,
        ),
        criterion(
            "early, falling",
            "it lengthens drafts whose chances fall with depth: the share",
            shares["falling"],
            "==",
            1.0,
        ),
        criterion("early, any", "it lengthens drafts of any chances: the share", shares["any"], "==", 1.0),
    ]


def check(budget: Budget) -> Measured:
    """A chain and a tree against an all-serial and an all-parallel guide; and why early guesses count more."""
    results = surveyed(budget, ["gumiho", "gumiho:width=2:beam=2:nodes=7", "eagle", "medusa"], sampled=["gumiho"])
    own = [one for one in results if one.setting.method.startswith("gumiho")]
    criteria = [
        lossless(own),
        *early_ones_matter(),
        *fewer_calls(own),
        *faster(own),
        *faster_than(results, "gumiho", "eagle", essential=True),
        *faster_than(results, "gumiho", "medusa", essential=True),
        *accepts_more(results, "gumiho", "medusa"),
        untestable(
            "large models",
            "chat models of 7 to 70 billion parameters decode at least 2.4 times as fast",
            ">=",
            2.4,
            "needs such models, and hardware on which scoring more tokens is nearly free",
        ),
    ]
    return Measured(criteria, rows(results), baseline="token by token", models=[*PAPER.works])


PAPER = publish(
    Paper(
        slug="gumiho",
        title="Gumiho: A Hybrid Architecture to Prioritize Early Tokens in Speculative Decoding",
        year=2025,
        part="decoding",
        domain="language",
        does="An attending layer on the frozen model's vectors makes the first guesses one after the other; heads that "
        "are independent of each other make all later ones in one go.",
        claims="Early guesses matter more than late ones, and a guide that is strong there and cheap elsewhere decodes "
        "faster than all-serial and all-parallel ones.",
        needs="Chat models of 7 to 70 billion parameters on accelerators, for the size of the speed-up.",
        name="Gumiho",
        training="added",
        sought="speculative decoding: first draft tokens matter most; hybrid of serial and parallel draft heads",
        related={
            "eagle": "one attention layer drafts",
            "medusa": "heads that guess ahead",
            "redrafter": "serial guesses",
            "clover-2": "serial guesses",
        },
        added="2026-11-27",
        check=check,
        works=("code", "translate"),
    )
)
