"""Block Transformer: a decoder over blocks of tokens below, a decoder inside of each block above.

Ho, Bae, Kim, Jo, Kim, Schuster, Fisch, Thorne and Yun, "Block Transformer: Global-to-Local Language Modeling for Fast
Inference", 2024. Three parts: an embedder makes one vector of the `length` tokens of a block (their embeddings, of
width / length each, side by side); a block decoder attends over these vectors, one for each block; its vector behind
block b becomes, by a linear map, a prefix of two vectors, behind which a token decoder predicts the tokens of block
b + 1, attending to nothing but prefix and block. The lower half then keeps keys and values for one position in `length`
tokens, and the upper half those of the present block only: `1 / (2 · length)` of a plain model's. The paper reports 10
to 20 times the throughput of plain transformers of equal perplexity, on graphics cards with batches that fill them.

The paper does not predict the first block; here its context is a learned vector, so that any prompt can be gone on
with, from its first token.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from formery.data import long_text
from formery.evidence.accounting import account
from formery.evidence.checks import criterion, untestable
from formery.evidence.forms import Findings, Forms
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.models.blocks import BlockTransformer, block_model
from formery.models.compose import language_model
from formery.models.decoder import Decoder
from formery.train.plan import Plan

WIDTH, LAYERS, HEADS, HIDDEN, LONGEST = 64, 4, 4, 168, 1024
LENGTH, BATCH, STEPS = 128, 8, 200  # of a training: tokens of a row, rows of a step
LOUDER = 5.0  # than usual are embeddings at first, so that models learn more than frequencies in these steps
BATCHES = 16  # held-out ones
HELD = 1024  # tokens of a state that is measured
PROMPT, WRITTEN = 960, 32  # tokens behind which decoding is timed, and so many of them
ROWS = (1, 16, 64)  # of a batch

plain = partial(language_model, long_text.VOCABULARY, WIDTH)
halves = partial(block_model, long_text.VOCABULARY, WIDTH, LAYERS // 2, LAYERS // 2, HEADS, HIDDEN, LONGEST)

MADE: dict[str, Callable[[], Decoder]] = {
    "plain": partial(plain, LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
    "smaller plain": partial(plain, LAYERS // 2, HEADS, 1, HIDDEN, LONGEST),
    "blocks of 2": partial(halves, 2),
    "blocks of 4": partial(halves, 4),
    "blocks of 8": partial(halves, 8),
    "blocks of 4, twice the layers": partial(
        block_model, long_text.VOCABULARY, WIDTH, LAYERS, LAYERS, HEADS, HIDDEN, LONGEST, 4
    ),
}
FORMS = Forms(
    "block-transformer", MADE, Plan(STEPS, 4e-3, warmup=20), LENGTH, BATCH, LOUDER, [language_model, block_model]
)
BLOCKS = {"blocks of 2": 2, "blocks of 4": 4, "blocks of 8": 8}
TIMED = ("plain", "smaller plain", "blocks of 4")


def held(form: str) -> dict[str, float]:
    """Bytes of a state of `HELD` tokens, as measured and, for blocks, as they follow from the sizes."""
    model = MADE[form]()
    values = {f"bytes at {HELD:,} tokens": float(account(model, HELD).total)}
    if isinstance(model, BlockTransformer):
        values["bytes foreseen"] = foreseen(model, HELD)
    return values


def foreseen(model: BlockTransformer, tokens: int) -> int:
    """Bytes of a state of one row, from the sizes of the model alone, in numbers of 4 bytes and positions of 8.

    A block's keys and values and its position; those of a prefix, of the present block and of a place to pad; the
    context of this block and of the first; each token and its position.
    """
    wide, width = model.embedder.width, model.embedding.width
    outer = tokens // model.length * (4 * 2 * len(model.block_layers) * wide + 8)
    inner = (2 * model.prefix + model.length - 2) * (4 * 2 * len(model.layers) * width + 8)
    return outer + inner + 2 * 4 * wide + tokens * (4 + 8)


@torch.inference_mode()
def timed(rows: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second that the forms write behind prompts, in interleaved rounds, over the plain model's."""
    tokens = torch.randint(long_text.VOCABULARY, (rows, PROMPT))
    models = {form: MADE[form]().eval() for form in TIMED}
    states = {form: model.start(rows, PROMPT + WRITTEN) for form, model in models.items()}
    last = {}
    for form, model in models.items():
        for piece in tokens.split(64, 1):
            last[form] = model.read(piece, states[form])[:, -1:]
    seconds: dict[str, list[float]] = {form: [] for form in models}
    for lap in range(rounds + 1):
        for form, model in models.items():
            state, hidden, began = states[form], last[form], time.perf_counter()
            for _ in range(WRITTEN):
                hidden = model.read(model.logits(hidden, state).argmax(-1), state)
            if lap:  # the first one warms up
                seconds[form].append(time.perf_counter() - began)
            state.rollback([PROMPT] * rows)
    name = f"tokens a second, times plain, {rows} rows"
    return {form: {name: [b / a for a, b in zip(own, seconds["plain"], strict=True)]} for form, own in seconds.items()}


def check(budget: Budget) -> Measured:
    """Blocks of several lengths against plain models of the same layers and of the same bytes: loss, bytes, speed."""
    plan = [(form, seed) for form in MADE for seed in budget.seeds]
    budget.units.expect(len(plan) + len(MADE) + len(ROWS))
    found = Findings(FORMS)
    for form, seed in plan:
        found.note(form, budget.units.measure(f"{form}, seed {seed}", partial(FORMS.loss, form, seed, BATCHES)))
    for form in MADE:
        found.note(form, budget.units.measure(f"{form}, state", partial(held, form)))
    for rows in ROWS:
        times = budget.units.measure(f"{rows} rows, timed", partial(timed, rows, max(5, budget.rounds)))
        for form, values in times.items():
            found.note(form, values)

    def bytes_of(form: str) -> float:
        return found.of(form, f"bytes at {HELD:,} tokens")[0]

    middle, deeper = "blocks of 4", "blocks of 4, twice the layers"
    return Measured(
        [
            criterion(
                "equal loss",
                "blocks of 4 in twice the layers lose at most what the plain model loses, in nats a token",
                found.more(deeper, "plain", "loss"),
                "<=",
                0.0,
            ),
            criterion(
                "equal bytes",
                "blocks of 4 lose less than a smaller plain model whose keys and values take as many bytes",
                found.more("smaller plain", middle, "loss"),
                ">",
                0.0,
            ),
            criterion(
                "bytes",
                f"a state of {HELD:,} tokens takes the very bytes that follow from the sizes",
                [bytes_of(form) - found.of(form, "bytes foreseen")[0] for form in MADE if "blocks" in form],
                "==",
                0.0,
            ),
            criterion(
                "fewer bytes",
                "blocks of L tokens take at most 1.25 / (2 L) of the plain model's bytes",
                [bytes_of(form) / bytes_of("plain") * 2 * length for form, length in BLOCKS.items()],
                "<=",
                1.25,
                essential=True,
            ),
            criterion(
                "longer blocks",
                "the longer the blocks, the more is lost: 8 above 4, and 4 above 2",
                [*found.more("blocks of 8", middle, "loss"), *found.more(middle, "blocks of 2", "loss")],
                ">",
                0.0,
            ),
            *(
                criterion(
                    f"throughput, {rows} rows",
                    f"blocks of 4 write more tokens a second than the plain model of as many layers, {rows} rows at a "
                    f"time behind prompts of {PROMPT} tokens",
                    found.of(middle, f"tokens a second, times plain, {rows} rows"),
                    ">",
                    1.0,
                )
                for rows in ROWS
            ),
            untestable(
                "claimed throughput",
                "10 to 20 times the throughput of plain transformers of equal perplexity",
                ">=",
                10.0,
                "needs models of up to a billion parameters and a graphics card whose memory batches fill",
                essential=True,
            ),
        ],
        found.rows("write"),
        baseline=f"the plain model of {LAYERS} layers, trained on the same tokens from the same seeds",
        notes=[
            f"Each form learns from {STEPS} steps of {BATCH * LENGTH:,} tokens of WikiText-2, far from convergence; "
            "losses are on its test part, in nats a token of a vocabulary of 2,048.",
            f"Both decoders of blocks have {LAYERS // 2} layers unless said otherwise; the embedder's table and the "
            "map to the prefix come on top. The smaller plain model has half of the layers, and one head of keys and "
            "values for four of queries.",
            "A block takes book-keeping too: each token's number, from which a block can be decoded again after "
            "rollback, its position, and room to pad rows whose blocks end at different times.",
            "Speed is of decoding alone, with the compiled kernels on both sides. A pass of a model in two levels is "
            "more calls than one of the plain model, whose layers are all one program: in models this small, with few "
            "rows, that outweighs what is not read from the cache.",
        ],
    )


PAPER = publish(
    Paper(
        slug="block-transformer",
        title="Block Transformer: Global-to-Local Language Modeling for Fast Inference",
        year=2024,
        part="block",
        domain="language",
        does="Speeds up text generation by splitting the model in two: lower layers attend over blocks of about four "
        "tokens at a coarse level, and upper layers decode tokens inside one block only, so most of the key-value "
        "cache disappears.",
        claims="Generates with 10-20x higher throughput than plain transformers of equal perplexity.",
        needs="GPU serving with large batches to see the 10-20x gain.",
        name="Block Transformer",
        training="whole",
        sought="higher LLM serving throughput; reduce KV cache access; hierarchical language model",
        related={
            "fit": "local and global levels for long sequences",
            "sharedllm": "coarse context",
            "cla": "smaller key-value cache by design",
            "focusllm": "long context handled in chunks",
            "tnt": "inner and outer transformer levels",
            "mlkv": "smaller key-value cache by design",
        },
        added="2026-11-28",
        check=check,
        works=("write",),
    )
)
