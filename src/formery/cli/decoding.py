"""Commands that run models: compare, generate, advise, inspect."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from formery.cli.app import app
from formery.cli.options import AsJson, Compiled, Draft, Dtype, Input, Json, MaxNewTokens, Model, Quantize, Seed
from formery.errors import FormeryError
from formery.web.output import check_targets, note, write_json

ALL = ("all", "all-lossless")


@app.command()
def compare(
    work: Annotated[str, typer.Argument(metavar="WORK", help="What to run on: code, translate, ...")] = "code",
    model: Model = None,
    draft: Draft = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", metavar="A,B", help="Such as beam,medusa:width=2, or all-lossless. [default: all]"),
    ] = None,
    input: Input = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", help="At most so many examples.")] = 20,
    batch: Annotated[int, typer.Option("--batch", metavar="B", help="Prompts decoded together.")] = 1,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 0,
    json_file: Json = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a report there.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="On a node of that Ray cluster (auto: the one here).")
    ] = None,
) -> None:
    """Run decoding methods side by side.

    What each costs and saves, and whether its output is greedy's: a table, and a report with --html.
    """
    check_targets(json_file, html)
    from formery.data.prompts import read_prompts
    from formery.data.works import work as work_named
    from formery.evidence.compare import compare as run
    from formery.methods import discover
    from formery.models import load, shipped, writing
    from formery.web.progress import Steps
    from formery.web.table import comparison_table, console

    discover()
    named = work_named(work).name
    if model is None and named not in shipped():
        raise FormeryError(
            f"no model ships for the work {named}: train one (`formery train {named}`) and name it with --model."
        )
    chosen = writing(load(model or named), model or named)
    given = None if input is None else read_prompts(input, lines=chosen.reads_apart, cut=True)
    if methods in (None, *ALL):
        names, left_out = every_method(model or named, draft, lossless=methods == "all-lossless")
    else:
        names, left_out = split(str(methods)), []
    what = (model or named, named if given is None else given, names)
    options: dict[str, Any] = {"draft": draft, "limit": limit, "batch": batch, "seed": seed}
    options["max_new_tokens"] = max_new_tokens
    if ray is not None:
        from formery.evidence.cluster import compare_on_ray

        comparison = compare_on_ray(ray, *what, **options)
    else:
        with Steps("comparing") as progress:
            comparison = run(*what, **options, progress=progress)
    console(stderr=json_file == "-").print(comparison_table(comparison))
    if left_out:
        note(f"without {', '.join(left_out)}: no draft ships for {model or named}; name one with --draft.")
    if json_file is not None:
        write_json(comparison.to_json(), json_file)
    if html is not None:
        from formery.web.report import write_report

        write_report(comparison, html, chosen.tokenizer, shlex.join(["formery", *sys.argv[1:]]))
        note(f"report: {html}")


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Texts to go on with.")] = None,
    model: Model = "code",
    method: Annotated[
        str | None,
        typer.Option("--method", metavar="NAME", help="[default: greedy, sampling above temperature 0]"),
    ] = None,
    draft: Draft = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Annotated[float | None, typer.Option(metavar="T", help="0 is greedy. [default: the method's]")] = None,
    top_k: Annotated[int | None, typer.Option(metavar="K", help="Draw from the K likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(metavar="P", help="Draw from the likeliest with together P.")] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw from those with P times the likeliest's.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(metavar="R", help="Above 1: repeat less.")] = None,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask by the chat template, where the model has one.")] = False,
    input: Input = None,
    json_file: Json = None,
    picture: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Draw which call settled which token (png, svg, pdf); of one prompt."),
    ] = None,
    quantize: Quantize = None,
    dtype: Dtype = None,
    compile: Compiled = None,
    profile: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Say where the time went, and write a trace for ui.perfetto.dev (json)."),
    ] = None,
) -> None:
    """Go on with prompts, translate them, or write down what is said.

    A model that listens takes paths of recordings for prompts. The text comes as it is written; what it took goes to
    stderr.
    """
    check_targets(json_file, picture, profile)
    if picture is not None and Path(picture).suffix not in (".png", ".svg", ".pdf"):
        raise FormeryError(f"{picture} should end in .png, .svg or .pdf: the ending chooses the kind of picture.")
    from formery.data.prompts import read_prompts
    from formery.generate.method import find
    from formery.generate.profile import profiled
    from formery.generate.prompts import asked
    from formery.generate.run import events
    from formery.methods import discover
    from formery.models import load, writing
    from formery.parts.native import using
    from formery.web.streaming import follow

    discover()
    method = method or ("sampling" if temperature else "greedy")
    takes_draft = find(method)[0].takes_draft
    loaded = writing(load(str(model), **how(dtype, quantize, compile)), str(model))
    texts = list(prompts or [])
    if input is not None:
        texts += [one.prompt for one in read_prompts(input, lines=loaded.reads_apart)]
    if not texts:
        raise FormeryError("there is no prompt: give one, or a file of them with --input.")
    given: list[Any] = [asked(loaded, text, str(model)) for text in texts] if chat else list(texts)
    if picture is not None and len(texts) > 1:
        raise FormeryError(f"--picture draws one text, and there are {len(texts)} prompts; give one.")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    settings["repetition_penalty"] = repetition_penalty
    options |= {name: value for name, value in settings.items() if value is not None}
    if draft is not None and not takes_draft:
        raise FormeryError(f"{method} takes no draft: leave --draft out, or add --method speculative-sampling.")
    if takes_draft:
        from formery.evidence.compare import draft_for

        options["draft"] = draft_for(str(model), draft, method)
    # A draft model is computed as the other one is.
    mode = using("auto" if compile is None else compile)
    with mode, profiled() if profile is not None else nullcontext() as watched:
        results = follow(
            events(loaded, given, method, 1, options),
            texts,
            titles=not loaded.reads_apart,
            shown=json_file != "-",
        )
    if profile is not None and watched is not None:
        from formery.web.table import console, profile_table

        watched.save(profile)
        console(stderr=True).print(profile_table(watched.table(), watched.seconds))
        note(f"trace: {profile}")
    if json_file is not None:
        keys = ("prompt", "text", "tokens", "calls", "drafted", "accepted", "stop")
        write_json([{key: getattr(result, key) for key in keys} for result in results], json_file)
    if picture is not None:
        from formery.web.picture import save_dependency_graph

        save_dependency_graph(results[0], Path(picture), loaded.tokenizer)


@app.command()
def advise(
    model: Model = "code",
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="Your own prompts, as for generate's --input. [default: examples of a shipped model's work]",
        ),
    ] = None,
    draft: Draft = None,
    max_new_tokens: MaxNewTokens = 64,
    confirm: Annotated[bool, typer.Option("--confirm", help="Run the best three, and compare.")] = False,
    json_file: Json = None,
) -> None:
    """Say what would make a model faster here, and by how much.

    Kernels, fewer bits, batches, drafting: measured or predicted in about a minute, each with its error bar, what
    it costs and how to apply it.
    """
    check_targets(json_file)
    from formery.evidence.advise import advise as run
    from formery.web.advice import advice
    from formery.web.progress import Steps
    from formery.web.table import console

    with Steps("advising") as progress:
        found = run(str(model), prompts, draft, max_new_tokens, confirm=confirm, progress=progress)
    console(stderr=json_file == "-").print(advice(found))
    if json_file is not None:
        write_json(found.to_json(), json_file)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(metavar="NAME|DIR|ID", help="What `--model` takes.")],
    as_json: AsJson = False,
) -> None:
    """Say what a checkpoint is, without reading its weights.

    Family, parts, parameters, types, context, and what decoding keeps in memory for each token.
    """
    from dataclasses import asdict

    from formery.models.inspection import inspect as look

    found = look(checkpoint)
    if as_json:
        write_json(asdict(found), "-")
        return
    from formery.web.inspection import inspection
    from formery.web.table import console

    console().print(inspection(found))


def how(dtype: str | None, quantize: str | None, compile: bool | None) -> dict[str, Any]:
    """The options of `load` that were given."""
    given = {"dtype": dtype, "quantize": quantize, "compile": compile}
    return {name: value for name, value in given.items() if value is not None}


def every_method(model: str, draft: str | None, lossless: bool = False) -> tuple[list[str], list[str]]:
    """All methods, or the lossless ones, and the variants worth comparing; apart, those that lack a draft."""
    from formery.generate import METHODS
    from formery.models import Guide, guides, load, shipped

    given = None if draft is None else isinstance(load(draft), Guide)
    known, names, left_out = (*shipped(), *guides()), [], []
    for one in METHODS.values():
        if lossless and (not one.lossless or one.defaults.get("temperature")):
            continue
        if one.needs_draft and given != one.guided and one.draft_of(model) not in known:
            left_out.append(one.name)
        else:
            names += [one.name, *(f"{one.name}:{each}" for each in one.variants)]
    return names, left_out


def split(methods: str) -> list[str]:
    """The names between the commas."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise FormeryError("--methods names no method.")
    return names
