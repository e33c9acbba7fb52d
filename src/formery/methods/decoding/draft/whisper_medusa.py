"""Whisper-Medusa: heads on the decoder of an encoder-decoder, behind one more decoder layer that they share.

Segal-Feldman, Shamsian, Navon, Hetz and Keshet, "Whisper in Medusa's Ear: Multi-head Efficient Decoding for
Transformer-based ASR", 2024. Head i guesses the i-th token after the last one, from the frozen decoder's vectors `x`:

    Medusa-Linear: output(x + silu(W_i x + b_i)), the heads of `medusa` on this decoder
    Medusa-Block:  output(y + silu(W_i y + b_i)) with y = norm(layer(x))

where the layer, one for all heads, attends to all x so far and to what the encoder made. The output is the model's own.
Here the model is frozen and the longest agreeing beginning of the guesses stands, so that the text is the very same;
the paper also tunes the model along. It reports half the latency at little loss of words.
"""

from jaxtyping import Float
from torch import Tensor, nn

from formery.evidence.checks import rows, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.generate.headed import Headed, HeadedGuided
from formery.generate.method import Method, drafting, register
from formery.generate.second import SecondGuided
from formery.methods.decoding.draft.checks import accepts_more, faster, fewer_calls, lossless, surveyed
from formery.methods.decoding.draft.training import ahead, decoder_of, guess_loss, guide_recipe
from formery.models import EncoderDecoder, Model
from formery.models.guide import Guide, Heads
from formery.models.second_decoder import SecondDecoder, encoded
from formery.train.objective import Batch

DEPTHS = 4


class MedusaBlock(SecondDecoder, Headed):
    """`heads(norm(layer(vectors)))`: a decoder layer on the model's vectors, and heads for the next `depths` tokens."""

    def __init__(self, width: int, vocabulary: int, attention_heads: int, hidden: int, source: int | None, depths: int):
        super().__init__(width, vocabulary, attention_heads, hidden, source)
        self.depths, self.heads = depths, Heads(width, depths)

    def enter(
        self, vectors: Float[Tensor, "batch time width"], embedded: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch time width"]:
        """The vectors alone."""
        return vectors


class MedusaBlockDrafter(SecondGuided, HeadedGuided):
    """Drafts the likeliest guesses of the heads: a chain, or with `width` above 1 a tree."""

    def __init__(self, draft: Guide, length: int = 4, width: int = 1, nodes: int | None = None):
        super().__init__(draft, length, width, nodes)


METHOD = register(
    Method(
        "whisper-medusa",
        "one more decoder layer on the model's vectors, and heads that guess several tokens at once",
        lossless=True,
        make=drafting(MedusaBlockDrafter),
        variants=("length=2", "width=2:nodes=6"),
        paper="whisper-medusa",
    )
)


def make(model: Model) -> MedusaBlock:
    """A layer and four heads for a model; without an encoder the layer attends to the model's own vectors alone."""
    source = model.encoder.embedding.width if isinstance(model, EncoderDecoder) else None
    return MedusaBlock(decoder_of(model).embedding.width, model.vocabulary, 4, 512, source, DEPTHS)


def objective(model: Model, guide: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Each head learns the token at its depth, deeper ones counting less."""
    assert isinstance(guide, MedusaBlock)
    made = guide.over(batch["hidden"], batch["positions"], *encoded(model, batch))
    places = ahead({**batch, "hidden": made}, DEPTHS)
    return guess_loss(model, guide.heads(places.hidden), places.coming, places.there)


guide_recipe("translate", "whisper-medusa", make, objective, steps=1200)


def check(budget: Budget) -> Measured:
    """Medusa-Block with 2 and 4 heads and as a tree, and Medusa-Linear, against decoding token by token."""
    block = [f"{METHOD.name}:length=2", f"{METHOD.name}:length=4", f"{METHOD.name}:{METHOD.variants[1]}"]
    results = surveyed(budget, [*block, "medusa:length=4"], PAPER.works)
    own = [one for one in results if one.setting.method.startswith(METHOD.name)]
    words = untestable(
        "words",
        "with the model tuned along, the rate of wrong words in speech rises by little",
        "<=",
        0.01,
        "needs a recogniser of Whisper's size and recorded speech; frozen, the text is the very same",
    )
    half = untestable(
        "latency",
        "speech is recognised in half the time",
        ">=",
        2.0,
        "needs a recogniser of Whisper's size, recorded speech and an accelerator",
        essential=True,
    )
    return Measured(
        [
            lossless(results),
            *fewer_calls(own, PAPER.works),
            *accepts_more(results, block[1], "medusa:length=4", PAPER.works),
            *faster(own, PAPER.works),
            half,
            words,
        ],
        rows(results),
        baseline="greedy decoding, token by token; medusa is the paper's Medusa-Linear",
        models=[*PAPER.works, *(f"{work}/{name}" for work in PAPER.works for name in (METHOD.name, "medusa"))],
        notes=["The encoder-decoder is a translator of short captions: few calls are there to be saved."],
    )


PAPER = publish(
    Paper(
        slug="whisper-medusa",
        title="Whisper in Medusa's Ear: Multi-head Efficient Decoding for Transformer-based ASR",
        year=2024,
        part="decoding",
        domain="speech",
        does="Extra heads guess several tokens from the vectors of an encoder-decoder's decoder, each alone or behind "
        "one more decoder layer that all share; one call checks the guesses.",
        claims="Speech is recognised with half the latency, and hardly more words are wrong.",
        needs="A recogniser of Whisper's size, recorded speech and an accelerator, for the latency and the words.",
        name="Whisper-Medusa",
        training="added",
        sought="speed up Whisper; several tokens per decoder step in speech recognition",
        related={
            "medusa": "heads that guess ahead",
            "hybrid-decoding": "faster encoder-decoders",
            "whisfusion": "faster speech recognition",
            "specdec": "faster encoder-decoders",
        },
        added="2026-11-27",
        check=check,
        works=("translate",),
    )
)
