"""A finished training becomes a model to ship: its weights, and a card of what it is and what was measured."""

import hashlib
import inspect
import json
import platform
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from formery.data.sources import cache
from formery.data.works import Example, Work
from formery.data.works import work as work_named
from formery.errors import FormeryError, unknown
from formery.evidence.race import fitted
from formery.files import atomic_write
from formery.generate import generate
from formery.models import Guide, Model, load, save
from formery.models.checkpoint import guides, locate, shipped
from formery.train import load_weights
from formery.train.recipe import Trained, recipes, run_recipe
from formery.train.world import world

Results = dict[str, float | str]
GUESSED = 100  # examples of the test split on which a guide is tried
EXAMPLES = 200  # of the test split, where a decoder continues them


def train_and_ship(name: str, out: Path, max_steps: int | None, resume: bool) -> Path | None:
    """Runs a recipe in `out` and, when it has come to its end, writes `out`/model; None where it stopped before.

    Of many processes that train together the leading one writes.
    """
    trained = run_recipe(name, out, max_steps, resume)
    return ship(name, trained, out) if trained.finished and world().leads else None


def ship(name: str, trained: Trained, out: Path) -> Path:
    """Writes the best weights in 16 bits, with tokenizer, loss curve and card, and gives the folder.

    What the card reports is measured on the stored weights. What was gathered, not trained, is taken as it is.
    """
    if trained.plans:
        if trained.result.best_weights is None:
            raise FormeryError(f"{out} has no evaluated weights to ship.")
        load_weights(trained.model, trained.result.best_weights)
    folder = out / "model"
    save(trained.model, folder, torch.float16)
    results = guessed(name, trained, folder) if isinstance(trained.model, Guide) else measured(trained, folder)
    if trained.plans:
        shutil.copyfile(out / "curve.png", folder / "curve.png")
    with atomic_write(folder / "results.json") as path:
        path.write_text(json.dumps(results, indent=1) + "\n")
    with atomic_write(folder / "README.md") as path:
        path.write_text(card(name, trained, results))
    return folder


def trained(name: str) -> Path:
    """The folder of what a recipe makes: where it does not ship, it is trained into the cache, once, resumably.

    What lies in the cache counts as long as the files that define the recipe are the same.
    """
    if name in (*shipped(), *guides()):
        return locate(name)
    known = recipes()
    if name not in known:
        raise unknown("recipe", name, known)
    sources = {_source(one) for one in (known[name].run, *known[name].parts)}
    digest = hashlib.sha256(b"".join(Path(source).read_bytes() for source in sorted(sources))).hexdigest()[:16]
    out = cache() / "trained" / f"{name}-{digest}"
    if not (out / "model" / "README.md").exists():
        with torch.inference_mode(False), torch.enable_grad():  # a check that asks for it may be only reading
            train_and_ship(name, out, None, resume=out.exists())
    return out / "model"


def _source(made: Any) -> str:
    """The file that defines a function or a class, with arguments already given or not."""
    while isinstance(made, partial):
        made = made.func
    return inspect.getfile(inspect.unwrap(made))


def measured(trained: Trained, folder: Path) -> Results:
    """What the work says of the stored model on its test split."""
    model = load(folder)
    work = work_named(trained.work)
    assert model.tokenizer is not None
    with torch.inference_mode():
        results: Results = dict(work.evaluate(model, model.tokenizer, "test"))
    if model.reads_apart:
        examples = work.examples("test")
        for method in ("greedy", "beam:beams=5"):
            found = scores(model, work, examples, method)
            results |= {f"{method}: {key}": value for key, value in found.items()}
        return results
    examples = work.examples("test", EXAMPLES)
    found = scores(model, work, examples, "greedy")
    return results | {f"greedy on {len(examples)} examples: {key}": value for key, value in found.items()}


def guessed(name: str, trained: Trained, folder: Path) -> Results:
    """How good the stored guide's guesses are: target calls for each token, and how often each depth stands."""
    model, guide, method = load(trained.work), load(folder), name.rpartition("/")[2]
    prompts, _ = fitted(model, [], work_named(trained.work).examples("test", GUESSED), 64)
    outputs = generate(model, prompts, method, batch=10, max_new_tokens=64, draft=guide)
    events = [event for one in outputs for event in one.trace]
    about = f"{len(outputs)} examples, at most 64 tokens"
    results: Results = {f"target calls for each token ({about})": len(events) / sum(len(one.tokens) for one in outputs)}
    for depth in range(max(event.depth for event in events)):
        reached = [event for event in events if event.depth > depth and event.accepted >= depth]
        if reached:
            stood = sum(event.accepted > depth for event in reached)
            results[f"guesses at depth {depth + 1} that stand, of those reached"] = stood / len(reached)
    return results


def scores(model: Model, work: Work[Any], examples: Sequence[Example], method: str) -> Results:
    """The work's quality of a method's outputs."""
    most = 96 if model.reads_apart else 48
    prompts = [example.prompt for example in examples]
    outputs = generate(model, prompts, method, batch=25, max_new_tokens=most)
    quality: Results = work.quality([one.text for one in outputs], examples)
    return quality


def card(name: str, trained: Trained, results: Results) -> str:
    """The model card, as Markdown."""
    model = trained.model
    guide = isinstance(model, Guide)
    work = work_named(trained.work)
    takes = f"at most {getattr(model, 'max_length', None)} tokens; vocabulary of {model.vocabulary:,} byte pairs."
    data = f"the train split of the work `{work.name}`"
    facts = {
        "Parameters": f"{model.parameter_count():,}, stored in 16 bits{', computed in 32' if trained.plans else ''}.",
        **({"For": f"the model `{work.name}` alone."} if guide else {"Takes": takes}),
        "Data": f"{f'what that model writes, greedily, on {data}' if guide else data}. Licence of the text: "
        f"{trained.licence}.",
        **made(name, trained),
    }
    lines = [
        f"# {name}",
        f"A guide: by it the method `{name.rpartition('/')[2]}` drafts for the model `{work.name}`."
        if guide
        else f"{work.description[0].upper()}{work.description[1:]}.",
        "\n".join(f"- **{key}**: {value}" for key, value in facts.items()),
        "## Results on the test split",
        "\n".join(["| measure | value |", "|---|---|", *(f"| {k} | {shown(v)} |" for k, v in results.items())]),
        *(["![Loss over the steps](curve.png)"] if trained.plans else []),
        "## What it is made of",
        "\n".join(f"    {line}" for line in str(model).splitlines()),
    ]
    return "\n\n".join(lines) + "\n"


def made(name: str, trained: Trained) -> dict[str, str]:
    """How it was made, for the card."""
    result, plans = trained.result, trained.plans
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__.split('+')[0]}"
    if not plans:
        return {"Recipe": f"`formery train {name}`, which gathers and learns nothing; {versions}."}
    seeds = " and ".join(str(plan.seed) for plan in plans)
    best = ", ".join(f"{key} {value:.4g}" for key, value in result.best_scores.items())
    return {
        "Recipe": f"`formery train {name}`: {trained.steps:,} steps in {plans[0].precision}, "
        f"seed {seeds}, {result.seconds / 60:.0f} minutes; {versions}.",
        "Kept": f"the weights of step {result.best_step:,}, the best on the validation split ({best}).",
    }


def shown(value: float | str) -> str:
    """A result in a cell of a Markdown table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
