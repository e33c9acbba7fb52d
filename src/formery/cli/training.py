"""Commands that train, and that fetch what is trained on."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from formery.cli.app import INTERRUPTED, app, data_app
from formery.cli.options import AsJson
from formery.errors import FormeryError
from formery.web.output import note, write_json


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="What to train; see --list.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Stop after N steps.")] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="[default: runs/RECIPE]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute activations again for gradients: less memory, more time.")
    ] = False,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="N", help="Processes that share each layer, under torchrun.")
    ] = 1,
) -> None:
    """Train a model that ships, by its recipe.

    Ctrl-C keeps a checkpoint, from which --resume goes on. With
    `torchrun --nproc-per-node=N -m formery train RECIPE` N processes train it.
    """
    from formery.train.layout import Layout, laid_out
    from formery.train.recipe import recipes
    from formery.train.world import world

    if list_them:
        from formery.web.table import console, listing

        console().print(listing(("recipe", "what it trains"), [(k, v.description) for k, v in recipes().items()]))
        return
    if recipe is None:
        raise FormeryError(f"name a recipe: {', '.join(recipes())}.")
    from formery.evidence.card import train_and_ship

    folder = Path(out or f"runs/{recipe}")
    if resume and not folder.exists():
        raise FormeryError(f"there is nothing to resume in {folder}: no run was begun there.")
    chosen = Layout(recompute, tensor_parallel)
    chosen.check(world().size)
    try:
        with laid_out(chosen):
            shipped = train_and_ship(recipe, folder, max_steps, resume)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # the loop has said where it stopped
    if not world().leads:
        return
    note(f"the model is in {shipped}." if shipped else f"stopped early, as asked; --resume goes on in {folder}.")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="What would be trained; see train --list.")],
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", help="Processes, each with a card or a part of one.")] = 1,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Of each process, as 80GB: what would fit.")
    ] = None,
    tensor_parallel: Annotated[
        int, typer.Option("--tensor-parallel", metavar="N", help="Processes that share each layer.")
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Say what memory a training needs, with activations kept and recomputed.

    One step is gone through here, in which the other processes are stand-ins; nothing is trained.
    """
    from formery.train.estimate import largest, need, trainings
    from formery.train.layout import Layout
    from formery.web.needs import memory as amount
    from formery.web.needs import needs
    from formery.web.progress import Steps
    from formery.web.table import console

    if gpus < 1:
        raise FormeryError(f"a training has at least 1 process, not {gpus}.")
    within = None if memory is None else amount(memory)
    layouts = [Layout(recompute, tensor_parallel) for recompute in (False, True)]
    for one in layouts:
        one.check(gpus)
    found = []
    with Steps("going through a step") as progress:
        for done, one in enumerate(layouts):
            progress(done, len(layouts), "activations recomputed" if one.recompute else "activations kept")
            found.append(need(largest(trainings(recipe)), gpus, one))
    if as_json:
        write_json({"memory": within, "needs": [asdict(one) for one in found]}, "-")
        return
    console().print(needs(found, within))


@data_app.command("list")
def data_list() -> None:
    """List the datasets: licence, where they are from, and whether they are here."""
    from formery.data.sources import DATASETS, find
    from formery.web.table import console, listing

    def here(name: str) -> str:
        try:
            for file in DATASETS[name].files:
                find(f"{DATASETS[name].folder}/{file.removesuffix('.gz')}")
        except FormeryError:
            return "no"
        return "yes"

    rows = [(name, here(name), f"{one.licence}\n{one.home}") for name, one in DATASETS.items()]
    console().print(listing(("dataset", "here", "licence, and where it is from"), rows))


@data_app.command("get")
def data_get(
    name: str,
    base_url: Annotated[str | None, typer.Option("--base-url", metavar="URL", help="A mirror to fetch from.")] = None,
) -> None:
    """Fetch a dataset from the people who publish it, with checksums."""
    from formery.data.sources import get

    for path in get(name, base_url, tell=note):
        print(path)


@data_app.command("tokenise")
def data_tokenise(
    sources: Annotated[list[str], typer.Argument(metavar="FILE...", help="Files or folders: .parquet .jsonl .txt …")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", metavar="MODEL", help="A model's, or a tokenizer.json.")],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Where the shards go.")],
    column: Annotated[str, typer.Option("--column", metavar="NAME", help="Which has the text.")] = "text",
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", help="[default: one a core]")] = None,
) -> None:
    """Turn a corpus of any size into token shards to train on.

    The same command goes on where it was stopped.
    """
    from formery.data.tokenise import tokenise
    from formery.data.tokenizer import Tokenizer
    from formery.models import locate
    from formery.web.progress import Steps
    from formery.web.words import counted

    path = Path(tokenizer)
    if not path.is_file():
        path = locate(tokenizer) / "tokenizer.json"
    with Steps("tokenising") as progress:
        shards = tokenise(sources, Tokenizer.load(path), out, column, jobs, progress)
    note(f"{len(shards):,} tokens in {counted(len(shards.paths), 'shard')}, in {out}.")
