"""STree: a tree of drafts is checked in one pass of a recurrent or hybrid model, whose state is one for all branches.

Wu, Qin, Wong and Soatto, "STree: Speculative Tree Decoding for Hybrid State-Space Models", 2025. What a recurrence with
a decay gives out at a token depends on the tokens before it by products of decays alone:

    output[t] = queries[t] · (exp(Σ_{k on the way to t} decays[k]) memory
                              + Σ_{s on the way to t} exp(Σ_{k after s, on the way to t} decays[k]) values[s] ⊗ keys[s])

So the mask that shows a node of a packed tree its own branch alone serves a recurrence as it serves attention: it says
which decays are summed and which tokens are added up. No state is made for any node: the inputs of the nodes are kept,
and the memory is taken along the path that the target accepts. This lies in `parts/recurrence.py` and `scan_tree`, so
that every drafter of trees works on every recurrent model; the short convolution looks back along the branch as well.

The tree itself is the simplest there is: the `width` latest different continuations of what was written last, where it
was written before. The paper reports that trees beat chains on hybrid models even so.
"""

import random
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from formery.data.batching import WindowBatches
from formery.data.code import Code
from formery.evidence.card import trained
from formery.evidence.checks import criterion, examples, model_named, untestable
from formery.evidence.measured import Budget, Measured, Row, spread
from formery.evidence.paper import Paper, publish
from formery.evidence.race import Entrant, fitted, identical, race, speedups
from formery.generate import Generation
from formery.generate.copy_tree import CopyTreeDrafter
from formery.generate.draft import Draft, as_batch, as_trees
from formery.generate.method import Method, drafting, register
from formery.models import Decoder, load
from formery.parts import Attention, Embedding, GatedMLP, Layer, Mamba2, PreNorm, RMSNorm, Rotary, TiedOutput
from formery.train.loop import train
from formery.train.objective import mean_loss
from formery.train.plan import Plan
from formery.train.recipe import Recipe, Trained
from formery.train.recipe import register as register_recipe
from formery.train.recipes.code import objective
from formery.train.text import joined

METHOD = register(
    Method(
        "stree",
        "a tree of copies, checked in one pass by recurrent, hybrid and all other models",
        lossless=True,
        make=drafting(CopyTreeDrafter),
        variants=("width=1", "width=2", "width=4"),
        paper="stree",
    )
)

PLAN = Plan(
    steps=500,
    learning_rate=3e-3,
    warmup=50,
    final_learning_rate_ratio=0.02,
    precision="bfloat16",
    evaluate_every=250,
    checkpoint_every=250,
    label="code/stree",
)


def hybrid(vocabulary: int, width: int = 192, head_width: int = 32, state_width: int = 32) -> Decoder:
    """A small decoder of three Mamba-2 layers and one of attention, each with a feed-forward."""
    embedding = Embedding(vocabulary, width)

    def layer(recurrent: bool) -> Layer:
        heads = 2 * width // head_width
        inner = (
            Mamba2(width, heads, head_width, state_width, reach=16)
            if recurrent
            else Attention(width, 4, 2, position=Rotary())
        )
        return Layer([PreNorm(RMSNorm(width), inner), PreNorm(RMSNorm(width), GatedMLP(width, 2 * width))])

    layers = [layer(recurrent) for recurrent in (True, True, False, True)]
    return Decoder(embedding, layers, RMSNorm(width), TiedOutput(embedding), max_length=512)


def run(out: Path, max_steps: int | None, resume: bool) -> Trained:
    """Trains the hybrid on the text and with the tokens of the model `code`."""
    work, tokenizer = Code(), load("code").tokenizer
    assert tokenizer is not None
    batches = WindowBatches(joined(tokenizer, work.texts("train")), length=256, batch_size=8, seed=PLAN.seed)
    held_out = WindowBatches(joined(tokenizer, work.texts("valid")), length=256, batch_size=8)
    torch.manual_seed(PLAN.seed)
    model = hybrid(tokenizer.vocabulary_size)
    model.tokenizer = tokenizer
    evaluate = mean_loss(objective, [held_out.batch(step) for step in range(8)])
    result = train(model, objective, batches, PLAN, out, evaluate, stop_after=max_steps, resume=resume)
    licence = "Python Software Foundation License 2.0 (the training text)"
    return Trained(model, result, PLAN.steps, (PLAN,), work.name, licence)


register_recipe(Recipe(PLAN.label, "a small hybrid of Mamba-2 and attention that continues Python", run))


WIDTHS = (1, 2, 3, 4)


def check(budget: Budget) -> Measured:
    """Trees of 2 to 4 lines in one pass against a chain, and against a row for each line, on a small hybrid."""
    names = [f"seed {seed}" for seed in budget.seeds]
    budget.units.expect(len(names))
    found = [
        budget.units.measure(name, partial(unit, budget, seed)) for name, seed in zip(names, budget.seeds, strict=True)
    ]

    def values(name: str, widths: Sequence[int] = WIDTHS) -> list[float]:
        return [value for one in found for width in widths for value in one[str(width)][name]]

    def best(name: str) -> int:
        return max(WIDTHS[1:], key=lambda width: spread(values(name, [width])).median)

    wide, fast = best("more_accepted"), best("over_chain")
    per_call = f"a call accepts more guesses of a tree than of a chain (width {wide}); the difference, by seed"
    quicker = f"one text at a time, a tree writes faster than a chain (width {fast}); the ratio"
    criteria = [
        criterion(
            "identical",
            "the share of texts with the very tokens of greedy decoding is 1",
            values("identical"),
            "==",
            1.0,
            True,
        ),
        criterion(
            "one pass",
            "in float64, logits at the nodes of random trees differ from those of each path alone by 1e-6 at most",
            [value for one in found for value in one["difference"]],
            "<=",
            1e-6,
            True,
        ),
        criterion("more than a chain", per_call, values("more_accepted", [wide]), ">", 0.0, True),
        criterion("faster than a chain", quicker, values("over_chain", [fast]), ">", 1.0, True),
        criterion(
            "less time than rows",
            "checking a tree takes less time than checking a row for each of its lines; the share of it",
            values("time_of_rows", WIDTHS[1:]),
            "<",
            1.0,
            True,
        ),
        criterion(
            "less state than rows",
            "the state that a tree needs is smaller than that of a row for each of its lines; the share of it",
            values("state_of_rows", WIDTHS[1:]),
            "<",
            1.0,
        ),
        untestable(
            "benchmarks",
            "chains are beaten on three benchmarks with published models of 1 billion parameters and more",
            ">",
            1.0,
            "needs such models, and accelerators",
        ),
    ]
    rows = [
        Row(
            "code",
            f"{METHOD.name}:width={width}",
            1,
            {name: spread(values(name, [width])) for name in found[0][str(width)]},
        )
        for width in WIDTHS
    ]
    return Measured(
        criteria,
        rows,
        baseline="greedy decoding, token by token; width 1 is a chain",
        models=(),
        notes=[
            f"The model is {PLAN.label}, a hybrid of three Mamba-2 layers and one of attention that the check trains "
            "once; a row for each line reads the text's last token and the line anew."
        ],
    )


def unit(budget: Budget, seed: int) -> dict[str, Any]:
    """All widths on the prompts of one seed; values are lists, by round where they are of time."""
    model: Decoder = model_named(str(trained(PLAN.label)))
    prompts, _ = fitted(model, [], examples("code", budget.examples, seed), budget.max_new_tokens)
    entrants = [Entrant("greedy"), *(Entrant(f"{METHOD.name}:width={width}") for width in WIDTHS)]
    common = {"max_new_tokens": budget.max_new_tokens, "seed": seed}
    greedy, *laps = race(model, prompts, entrants, budget.rounds, 1, common)
    found: dict[str, Any] = {"difference": [difference(model, seed)]}
    accepted = [sum(one.accepted for one in lap.outputs) / lap.calls for lap in laps]
    for width, lap, stood in zip(WIDTHS, laps, accepted, strict=True):
        times = [[checked(model, lap.outputs, apart) for apart in (False, True)] for _ in range(budget.rounds)]
        found[str(width)] = {
            "identical": [identical(lap.outputs, greedy.outputs)],
            "calls_per_token": [lap.calls / lap.tokens],
            "accepted_per_call": [stood],
            "more_accepted": [stood - accepted[0]],
            "speedup": speedups(lap, greedy),
            "over_chain": speedups(lap, laps[0]),
            "time_of_rows": [tree[0] / rows[0] for tree, rows in times],
            "state_of_rows": [tree[1] / rows[1] for tree, rows in times[:1]],
            "state_bytes": [tree[1] for tree, _ in times[:1]],
        }
    return found


@torch.inference_mode()
def checked(model: Decoder, outputs: Sequence[Generation], apart: bool) -> tuple[float, float]:
    """Seconds to check the drafts of known texts again, and the bytes of the largest state.

    apart: with a row for each line of a draft rather than as a tree.
    """
    assert model.tokenizer is not None
    seconds, held = 0.0, 0
    for one in outputs:
        text = model.tokenizer.prompt(one.prompt) if isinstance(one.prompt, str) else list(one.prompt)
        state = model.start(1, len(text) + 2 * len(one.tokens) + 64)
        model.read(torch.tensor([text[:-1]]), state)
        for event in one.trace:
            draft, began = Draft(event.drafted, parents=event.parents), time.perf_counter()
            if apart:
                ends = [place for place in range(len(draft.tokens)) if not draft.children(place)]
                lines = [draft.line(place) for place in ends] or [[]]
                chosen = next(n for n, line in enumerate(lines) if line[: len(event.path)] == event.path)
                state.select([0] * len(lines))
                rows = [[text[-1], *(draft.tokens[place] for place in line)] for line in lines]
                tokens, positions = as_batch(rows, state.lengths, model.embedding.weight.device)
                model.step(tokens, state, positions)
                held = max(held, state.nbytes)
                state.select([chosen])
                state.rollback([len(text) + len(event.path)])
            else:
                positions, visible = as_trees([draft], state.lengths, state.slots.used, model.embedding.weight.device)
                model.step(torch.tensor([[text[-1], *draft.tokens]]), state, positions, visible)
                held = max(held, state.nbytes)
                state.settle([[0, *(place + 1 for place in event.path)]])
            seconds += time.perf_counter() - began
            text += event.emitted
    return seconds, float(held)


@torch.inference_mode()
def difference(model: Decoder, seed: int, nodes: int = 16) -> float:
    """The largest difference in float64 between logits at the nodes of a random tree and those of each path alone."""
    exact, chance = model.clone().double().eval(), random.Random(seed)
    text, *guesses = ([chance.randrange(model.vocabulary) for _ in range(n)] for n in (24, *[1] * nodes))
    draft = Draft([guess for [guess] in guesses], parents=[chance.randrange(-1, node) for node in range(nodes)])
    state = exact.start(1, 64)
    exact.read(torch.tensor([text[:-1]]), state)
    positions, visible = as_trees([draft], state.lengths, state.slots.used, state.slots.positions.device)
    found = exact.step(torch.tensor([[text[-1], *draft.tokens]]), state, positions, visible)[0, 1:]
    alone = [exact(torch.tensor([[*text, *(draft.tokens[one] for one in draft.line(node))]])) for node in range(nodes)]
    return max(float((one - other[0, -1]).abs().max()) for one, other in zip(found, alone, strict=True))


PAPER = publish(
    Paper(
        slug="stree",
        title="STree: Speculative Tree Decoding for Hybrid State-Space Models",
        year=2025,
        part="decoding",
        domain="language",
        does="A packed tree of drafts is verified in one pass of a recurrent or hybrid model: the tree's mask chooses "
        "which decays are summed, and the state then goes along the accepted path alone.",
        claims="Trees cost less so than with a state for each branch, and beat chains of drafts on hybrid models even "
        "with a simple drafter.",
        needs="Published Mamba-2 and hybrid models on accelerators, for the speeds reported.",
        name="STree",
        training="none",
        sought="speculative decoding for Mamba or hybrid SSM models; tree verification with recurrent state",
        related={
            "retnet": "recurrent states",
            "apriel-h1": "models with state-space layers",
            "aggressive-decoding": "drafts copied from the text",
            "hybridna": "models with state-space layers",
        },
        added="2026-11-27",
        check=check,
        works=("code",),
    )
)
