"""PHD-Transformer: each token is read K times and predicts from its last copy, in the cache of one reading.

Wu, Yan, Zhang, Lu, Zeng, Wang and Zhou, "Efficient Pretraining Length Scaling", 2025. Of the K readings of a token the
first is the original, the others are hidden decoding tokens. With token m's i-th reading as key and token n's j-th as
query, `M = 1 if (i = 1 and m < n) or (i ≤ j and m = n) else 0`: what comes later sees the originals only, so that the
keys and values of all copies can be forgotten when the token has been predicted, and the originals compute what the
plain model would. Further forms let copies see those of a window of tokens before (PHD-SWA), and cut that window at
the borders of chunks (PHD-CSWA), so that of a prompt only the copies in its last chunk are ever needed. The paper
reports better benchmarks than the plain model's with a cache of the same size, at about a billion parameters.

The K readings stand at positions of their own, as they would if the text itself were repeated: that alone tells them
apart, no parameters are added, and originals stand K positions apart. A window counts tokens here, each with all of its
copies.
"""

import time
from collections.abc import Callable
from functools import partial

import torch

from formery.data import long_text
from formery.data.batching import WindowBatches
from formery.evidence.accounting import account
from formery.evidence.checks import criterion, untestable
from formery.evidence.forms import Findings, Forms
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.models.compose import language_model
from formery.models.decoder import Decoder
from formery.models.repeating import Repeating, repeating_model
from formery.parts.copies import EveryCopy, HiddenDecoding
from formery.parts.native import using
from formery.train.plan import Plan

WIDTH, LAYERS, HEADS, HIDDEN, LONGEST = 64, 3, 4, 168, 1024
LENGTH, BATCH, STEPS = 128, 8, 200  # of a training: tokens of a row, rows of a step
LOUDER = 5.0  # than usual are embeddings at first, so that models learn more than frequencies in these steps
WINDOW, CHUNK = 16, 32
BATCHES = 16  # held-out ones
PROMPT, STEPPED = 500, 16  # tokens of a timed prompt, which is no whole number of chunks, and tokens behind it
SHORT, LONG = 257, 513  # one more than is read at once

plain = partial(language_model, long_text.VOCABULARY, WIDTH)
repeated = partial(repeating_model, long_text.VOCABULARY, WIDTH, LAYERS, HEADS, HIDDEN, LONGEST)

MADE: dict[str, Callable[[], Decoder]] = {
    "plain": partial(plain, LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
    "PHD, K=2": partial(repeated, HiddenDecoding(2)),
    "PHD, K=3": partial(repeated, HiddenDecoding(3)),
    "PHD-SWA, K=2": partial(repeated, HiddenDecoding(2, WINDOW)),
    "PHD-CSWA, K=2": partial(repeated, HiddenDecoding(2, WINDOW, CHUNK)),
    "every copy kept, K=2": partial(repeated, EveryCopy(2)),
    "plain, twice the layers": partial(plain, 2 * LAYERS, HEADS, HEADS, HIDDEN, LONGEST),
}
FORMS = Forms(
    "phd-transformer", MADE, Plan(STEPS, 4e-3, warmup=20), LENGTH, BATCH, LOUDER, [language_model, repeating_model]
)
TIMED = ("plain", "PHD, K=2", "PHD-SWA, K=2", "PHD-CSWA, K=2")


@torch.inference_mode()
def difference(form: str, seed: int) -> dict[str, float]:
    """The largest difference between logits of cached decoding and of the pass that trains, over the largest logit."""
    model = FORMS.trained(form, seed).double()
    tokens = WindowBatches(long_text.prose("test"), 3 * CHUNK, 2).batch(seed)["tokens"]
    whole, state = model(tokens), model.start(len(tokens), tokens.shape[1])
    pieces = tokens.split([5, 1, 17, *[1] * (tokens.shape[1] - 23)], 1)
    cached = torch.cat([model.step(piece, state) for piece in pieces], 1)
    return {"difference": float((cached - whole).abs().max() / whole.abs().max())}


def held(form: str) -> dict[str, float]:
    """Bytes of a state behind short and long texts, the last token of which was read alone."""
    model = MADE[form]()
    return {f"bytes at {length:,} tokens": account(model, length).total for length in (SHORT, LONG)}


@torch.inference_mode()
def timed(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds that the forms take to read a prompt, and to read single tokens behind it, over the plain model's."""
    models = {form: MADE[form]().eval() for form in TIMED}
    tokens = torch.randint(long_text.VOCABULARY, (1, PROMPT + 1))
    seconds: dict[str, dict[str, list[float]]] = {form: {"prompt": [], "token": []} for form in models}
    with using(False):
        for lap in range(rounds + 1):
            for form, model in models.items():
                state, began = model.start(1, PROMPT + STEPPED), time.perf_counter()
                reading = model.prefill if isinstance(model, Repeating) else model.read
                reading(tokens[:, :PROMPT], state)
                read = time.perf_counter()
                for _ in range(STEPPED):
                    model.step(tokens[:, PROMPT:], state)
                if lap:  # the first one warms up
                    seconds[form]["prompt"].append(read - began)
                    seconds[form]["token"].append((time.perf_counter() - read) / STEPPED)
    base = seconds["plain"]
    return {
        form: {f"{name}, times plain": [a / b for a, b in zip(own[name], base[name], strict=True)] for name in own}
        for form, own in seconds.items()
    }


def check(budget: Budget) -> Measured:
    """Copies against the plain model, plain repetition and a deeper model: loss, bytes of the state, times."""
    plan = [(form, seed) for form in MADE for seed in budget.seeds]
    exact = [form for form in MADE if "K=" in form]
    budget.units.expect(len(plan) + len(exact) + len(MADE) + 1)
    found = Findings(FORMS)
    for form, seed in plan:
        found.note(form, budget.units.measure(f"{form}, seed {seed}", partial(FORMS.loss, form, seed, BATCHES)))
    for form in exact:
        found.note(form, budget.units.measure(f"{form}, cached", partial(difference, form, budget.seeds[0])))
    for form in MADE:
        found.note(form, budget.units.measure(f"{form}, state", partial(held, form)))
    for form, values in budget.units.measure("times", partial(timed, max(5, budget.rounds))).items():
        found.note(form, values)

    def more(form: str, length: int) -> float:
        return found.more(form, "plain", f"bytes at {length:,} tokens")[0]

    phd = ("PHD, K=2", "PHD, K=3")
    window, chunks = "PHD-SWA, K=2", "PHD-CSWA, K=2"
    return Measured(
        [
            *(
                criterion(
                    f"gain, {form}",
                    f"{form} loses less than the plain model of the same weights, in nats a token",
                    found.more("plain", form, "loss"),
                    ">",
                    0.0,
                )
                for form in (*phd, window, chunks)
            ),
            criterion(
                "more copies",
                "a second copy gains more than a first one alone",
                found.more(phd[0], phd[1], "loss"),
                ">",
                0.0,
            ),
            criterion(
                "window",
                "copies in a window gain more than forgotten ones",
                found.more(phd[0], window, "loss"),
                ">",
                0.0,
            ),
            criterion(
                "bytes",
                "the state takes the very bytes of the plain model's",
                [more(form, length) for form in phd for length in (SHORT, LONG)],
                "==",
                0.0,
                essential=True,
            ),
            criterion(
                "bytes of the window",
                "a window adds bytes that do not grow with the text",
                [more(form, LONG) - more(form, SHORT) for form in (window, chunks)],
                "==",
                0.0,
            ),
            criterion(
                "exact",
                "cached decoding gives the logits of the mask that trains, to a billionth of the largest in 64 bits",
                [found.of(form, "difference")[0] for form in exact],
                "<=",
                1e-9,
                essential=True,
            ),
            criterion(
                "prompt",
                f"PHD and PHD-CSWA read a prompt of {PROMPT} tokens in at most 1.25 times the plain model's time",
                [one for form in (phd[0], chunks) for one in found.of(form, "prompt, times plain")],
                "<=",
                1.25,
            ),
            criterion(
                "prompt without chunks",
                "PHD-SWA takes longer for it than PHD-CSWA",
                found.more(window, chunks, "prompt, times plain"),
                ">",
                0.0,
            ),
            untestable(
                "benchmarks",
                "consistently better on the benchmarks of language models of about a billion parameters",
                ">",
                0.0,
                "needs pre-training such models",
                essential=True,
            ),
        ],
        found.rows("write"),
        baseline="the plain model of the same weights, trained on the same tokens from the same seeds",
        notes=[
            f"Each form learns from {STEPS} steps of {BATCH * LENGTH:,} tokens of WikiText-2, far from convergence; "
            "losses are on its test part, in nats a token of a vocabulary of 2,048.",
            "With K = 2 the layers' products cost as much as those of the plain model of twice the layers, which has "
            "more weights and a cache twice as large; with every copy kept the weights stay, and the cache is twice as "
            "large too.",
            "Bytes are of the storage that a state holds, book-keeping and all. Behind a longer pass the forms with a "
            "window hold that pass's copies too, until the next one, so that drafts can be taken back.",
            "Times are without the compiled kernels, which know no copies. A pass over one token is mostly overhead in "
            "models this small, so that copies cost less in it than they would in large ones.",
            "The decoding loop reads prompts by `read`, which gives predictions for each token and so computes all "
            "copies; the times of prompts are those of `prefill`, which leaves out what no later token depends on.",
        ],
    )


PAPER = publish(
    Paper(
        slug="phd-transformer",
        title="Efficient Pretraining Length Scaling",
        year=2025,
        part="cache",
        domain="language",
        does="Lets each token compute several times within the same memory: it is repeated, predicts from its last "
        "copy, and the copies' keys and values are dropped or kept only in a window.",
        claims="Better than the plain model on several benchmarks with a cache of the same size, and one form no "
        "longer slows down reading the prompt.",
        needs="Pretraining of about a billion parameters.",
        name="PHD-Transformer",
        training="whole",
        sought="spend more compute per token in pretraining without a bigger cache; hidden tokens; scaling sequence "
        "length",
        related={
            "cla": "cache size while training",
            "mlkv": "cache size",
            "differentiable-cache-augmentation": "more computation for each token",
            "algoformer": "looped computation",
        },
        added="2026-11-28",
        check=check,
        works=("write",),
    )
)
