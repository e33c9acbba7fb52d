"""MASFormer: full attention in a few layers, a sliding window in all others.

Zhang, Ram, Hawkins, Zha and Zhao, "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily
at Every Layer", 2023. Layer l lets the query at n see the keys `n - span[l] < m <= n`, with no such bound in a few
layers. Such a model is made of a trained one by narrowing masks, and trained on for a while. The paper reports that
1.3 billion parameters are then as good at long texts as with full attention everywhere, at up to 75% less computation.

`masformer` rewrites any decoder. The windows' caches hold no more than can still be seen (`parts/rolling.py`), and
their queries are computed in blocks over the keys that they see (`parts/local.py`). The check takes the model `code`,
which has 8 layers, and asks at distances beyond all windows together: what a passage costs that was read before, and
how many of its tokens are foretold.
"""

from collections.abc import Sequence
from functools import cache, partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formery.data.base import Split
from formery.data.batching import WindowBatches
from formery.data.works import work as work_named
from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.evidence.checks import criterion, model_named, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.study import grown, losses
from formery.models import Decoder, load
from formery.models.rewrite import rewritten
from formery.parts import Attention
from formery.parts.local import localised
from formery.train.plan import Plan
from formery.train.text import joined

SPAN, WIDER = 12, 38  # with the latter in all layers a state is as large as with the former and one full layer
FULL: dict[str, tuple[int, ...]] = {  # which of 8 layers attend to everything
    "all full": tuple(range(8)),
    "all local": (),
    "all local, wider": (),
    "1 at the bottom": (0,),
    "1 in the middle": (4,),
    "1 at the top": (7,),
    "2 at the bottom": (0, 1),
    "2 in the middle": (3, 4),
    "2 at the top": (6, 7),
}
WINDOW, ROWS, STEPS = 256, 4, 16  # tokens of a window, windows of a batch, batches
SUMMED = 8 * (SPAN - 1)  # how far back all windows together reach
PASSAGE, SETTLED, GAPS = 32, 8, (16, 128, 192)  # tokens: of a passage, of its beginning that is not asked; between
HELD = 257  # tokens behind which states are measured: the last one by itself, as while decoding
LENGTHS = (512, 2048, 8192)


def masformer(model: Decoder, full: Sequence[int], span: int) -> Decoder:
    """A twin of a decoder in which the layers `full` (from 0) attend as before, all others to the last `span` tokens.

    The weights are the model's own. Raises FormeryError where it has no such layers, or masks that cannot be narrowed.
    """
    if span < 1:
        raise FormeryError(f"a window shows at least the token itself, not {span}.")
    layers = [part for part in model.modules() if isinstance(part, Attention)]
    if any(not 0 <= one < len(layers) for one in full):
        raise FormeryError(f"{list(full)} cannot be full: attention layers are 0 to {len(layers) - 1} here.")

    def change(part: Attention, number: int) -> nn.Module:
        try:
            return part if number in full else localised(part, span)
        except ValueError as error:
            raise FormeryError(f"layer {number} cannot have a window of its own: {error}.") from error

    return rewritten(model, Attention, change)


def scores(full: int, layers: int, span: int, length: int) -> int:
    """How many scores a head of each layer computes for a text, added up: attention's cost but for a constant."""
    whole = length * (length + 1) // 2
    short = min(span, length)
    near = short * (short + 1) // 2 + (length - short) * short
    return full * whole + (layers - full) * near


def make(name: str) -> Decoder:
    """The model `code` with these layers full."""
    model: Decoder = load("code")
    span = WIDER if name == "all local, wider" else SPAN
    return masformer(model, FULL[name], span) if len(FULL[name]) < len(model.layers) else model


@cache
def text(split: Split) -> Int[Tensor, " total"]:
    """The tokens of the work `code`."""
    return joined(model_named("code").tokenizer, work_named("code").texts(split))


def trained(name: str, seed: int) -> Decoder:
    """Such a model, trained on from that seed."""
    label = f"masformer, {name}"
    plan = Plan(STEPS, 3e-4, warmup=4, evaluate_every=STEPS, checkpoint_every=STEPS, seed=seed, label=label)
    windows = WindowBatches(text("train"), WINDOW, ROWS, seed)
    return grown(f"masformer/{name.replace(' ', '-')}", partial(make, name), windows, plan)


@torch.inference_mode()
def quality(model: Decoder, seed: int) -> dict[str, float]:
    """The loss on held-out text by position, and what is remembered of a passage that comes again."""
    found = losses(model, WindowBatches(text("valid"), WINDOW, 8, seed), 2)
    values = {"loss": float(found.mean()), "loss beyond the windows": float(found[:, SUMMED:].mean())}
    values["loss within the windows"] = float(found[:, :SUMMED].mean())
    for gap in GAPS:
        first, again, right = reread(model, gap, seed)
        values |= {f"gain at {gap + PASSAGE}": first - again, f"foretold at {gap + PASSAGE}": right}
    return values


def reread(model: Decoder, gap: int, seed: int, rows: int = 24) -> tuple[float, float, float]:
    """The loss of a passage, its loss when it comes again behind `gap` other tokens, and how many are then foretold."""
    ids, draw = text("valid"), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - WINDOW, (rows, 2), generator=draw)
    passage, other = (ids[starts[:, i, None] + torch.arange(size)] for i, size in enumerate((PASSAGE, gap)))
    read = torch.cat((passage, other, passage), 1).long()
    logits = model(read[:, :-1])
    cost: Float[Tensor, "row time"] = nn.functional.cross_entropy(logits.mT, read[:, 1:], reduction="none")
    asked = slice(PASSAGE + gap + SETTLED - 1, None)
    right = (logits.argmax(-1) == read[:, 1:])[:, asked].double().mean()
    return float(cost[:, SETTLED - 1 : PASSAGE - 1].mean()), float(cost[:, asked].mean()), float(right)


@torch.inference_mode()
def held() -> dict[str, float]:
    """The bytes that the layers of states hold, and how far logits from a rolling cache are from those of the masks."""
    found: dict[str, float] = {}
    for name in FULL:
        found[name] = sum(account(make(name), HELD).layers)
    found["code-draft"] = sum(account(model_named("code-draft"), HELD).layers)
    model, tokens = make("1 in the middle"), text("valid")[None, :WINDOW].long()
    state = model.start(1, WINDOW)
    cached = torch.cat([model.step(piece, state) for piece in tokens.split((100, *[1] * 20, *[17] * 8), 1)], 1)
    found["apart"] = float((cached - model(tokens)).abs().max())
    return found


def measured(name: str, seed: int) -> dict[str, float]:
    """The quality of a rewritten model as it is, and trained on; of the smaller model as it ships."""
    if name == "code-draft":
        return quality(model_named(name), seed)
    before = {f"{key}, not trained on": value for key, value in quality(make(name), seed).items()}
    return quality(trained(name, seed), seed) | before


def check(budget: Budget) -> Measured:
    """Full attention in 0, 1, 2 and all layers, at the bottom, in the middle and at the top, each trained on alike."""
    names = [*FULL, "code-draft"]
    budget.units.expect(1 + len(names) * len(budget.seeds))
    states = budget.units.measure("states", held)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for seed in budget.seeds:
        for name in names:
            for key, value in budget.units.measure(f"{name}, seed {seed}", partial(measured, name, seed)).items():
                found[name].setdefault(key, []).append(value)

    def less(first: str, other: str, key: str) -> list[float]:
        return [one - two for one, two in zip(found[first][key], found[other][key], strict=True)]

    def best(number: int) -> str:
        """Of the places for so many full layers the one with the lowest loss beyond the windows."""
        some = [name for name, full in FULL.items() if len(full) == number]
        return min(some, key=lambda name: spread(found[name]["loss beyond the windows"]).median)

    far, late = f"gain at {GAPS[1] + PASSAGE}", "loss beyond the windows"
    criteria = [
        criterion("cache", "logits from the rolling cache are those of the masks", [states["apart"]], "<=", 1e-3, True),
        *(
            criterion(
                f"loss, {number} full",
                "beyond the windows it costs at most 0.05 nats a token more than full attention",
                less(best(number), "all full", late), "<=", 0.05,
            )
            for number in (1, 2)
        ),
        *(
            criterion(
                f"recall, {number} full", "a passage beyond the windows is remembered as well, up to 0.1 nats a token",
                less(best(number), "all full", far), ">=", -0.1,
            )
            for number in (1, 2)
        ),
        criterion(
            "local", "without a full layer it is remembered worse, by at least 0.3 nats a token",
            less("all local", "all full", far), "<=", -0.3,
        ),
        criterion(
            "wider", "one full layer remembers it better than wider windows that hold as many bytes",
            less(best(1), "all local, wider", far), ">", 0.0,
        ),
        criterion(
            "smaller", "with one full layer it costs less than a smaller dense model",
            less(best(1), "code-draft", late), "<", 0.0,
        ),
        criterion(
            "computation", "with 2 of 8 layers full at most 0.3 of the scores are computed for 8,192 tokens",
            [scores(2, 8, SPAN, 8192) / scores(8, 8, SPAN, 8192)], "<=", 0.3,
        ),
        criterion(
            "bytes", f"with 1 of 8 layers full a state of {HELD} tokens holds at most 0.3 of the bytes",
            [states["1 in the middle"] / states["all full"]], "<=", 0.3,
        ),
        untestable(
            "size", "so it is at 1.3 billion parameters and 8,192 tokens", "<=", 0.0,
            "needs such a model and texts of that length", essential=True,
        ),
    ]  # fmt: skip
    rows = [Row("code", name, 1, {key: spread(some) for key, some in found[name].items()}) for name in names]
    rows += [Row("code", f"{name}, state", 1, {"bytes of layers": spread([states[name]])}) for name in names]
    for name, full in list(FULL.items())[:2] + [(f"{n} full", tuple(range(n))) for n in (1, 2)]:
        share = {f"scores at {n}": spread([scores(len(full), 8, SPAN, n) / scores(8, 8, SPAN, n)]) for n in LENGTHS}
        rows.append(Row("any text", f"{name}, share of full attention", 1, share))
    baseline = "the same model with full attention, trained on alike"
    return Measured(criteria, rows, baseline, ["code", "code-draft"], NOTES)


NOTES = [
    f"Each form of `code` was trained on with {STEPS} batches of {ROWS} windows of {WINDOW} tokens, which adapts it "
    "and teaches nothing new; full attention was trained on as long.",
    f"Windows show {SPAN} tokens; all eight together reach {SUMMED} back, so that only full layers know of a passage "
    f"{GAPS[1] + PASSAGE} tokens back. The gain is by how much less a token of a passage costs, in nats, when it comes "
    "again; the model learned from windows of 256 tokens.",
    "A rolling cache holds its span and 31 tokens more, to be taken back and so that it is seldom rearranged, and 16 "
    "bytes of book-keeping for each. `code-draft` was trained alone; its state is smaller than all others.",
    "Scores are counted from the masks, not timed. On a processor the window layers' steps run in PyTorch, those of "
    "full attention in compiled kernels: at short contexts the windows are slower.",
]

PAPER = publish(
    Paper(
        slug="masformer",
        title="Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every Layer",
        year=2023,
        part="attention",
        domain="language",
        does="Reads long texts at low cost: few layers attend to everything, all others to a window, in a model that "
        "is trained on from an ordinary one.",
        claims="A decoder of 1.3 billion parameters is as good as full attention in language modelling and generation "
        "with up to 75% less computation.",
        needs="A pretrained model of 1.3 billion parameters, long texts.",
        name="MASFormer",
        training="added",
        sought="long sequences with full attention in few layers; mix sliding window and global attention; reduce "
        "compute",
        related={
            "tidaldecode": "full attention in few layers",
            "cla": "layers of unlike cost",
            "focusllm": "long context",
            "sharedllm": "long context",
            "nope-length-generalisation": "longer than trained",
        },
        added="2026-11-28",
        check=check,
        works=("code",),
    )
)
