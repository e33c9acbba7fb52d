"""The command line: it reads what is asked for, has the rooms below do it, and prints what they give."""

import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from formery.errors import FormeryError
from formery.web.output import check_targets, note, write_json

app = typer.Typer(
    name="formery",
    help="The Transformer literature, running: find a method, run it, see whether its claim holds.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="List and fetch the data that works use.")
app.add_typer(data_app, name="data")

INTERRUPTED = 130
Model = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|DIR|ID", help="A shipped model, a folder, or an id on the hub: owner/name."),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", metavar="NAME|DIR", help="A smaller model of the same vocabulary. [default: MODEL-draft]"),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", metavar="N", help="At most so many new tokens.")]
Seed = Annotated[int, typer.Option("--seed", metavar="S", help="Of all that is drawn.")]
Quantize = Annotated[
    str | None, typer.Option("--quantize", metavar="KIND", help="int8 or int4: weights of so many bits (not exact).")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. [default: float32]")
]
Compiled = Annotated[
    bool | None, typer.Option("--compile/--no-compile", help="Fast kernels. [default: where that pays]")
]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write the result there; - is stdout.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Input = Annotated[
    str | None,
    typer.Option(
        "--input",
        metavar="FILE",
        help="Your own prompts: .jsonl has an object with a prompt a line; any other text is one prompt, "
        "for a translator one a line; compare cuts a .py file within its functions; - is stdin.",
    ),
]


@app.callback(invoke_without_command=True)
def formery(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from formery import __version__

        print(__version__)
    elif context.invoked_subcommand is None:
        print(context.get_help())


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
    with Steps("comparing") as progress:
        comparison = run(
            model or named, named if given is None else given, names, draft=draft, limit=limit,
            batch=batch, max_new_tokens=max_new_tokens, seed=seed, progress=progress,
        )  # fmt: skip
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

    Kernels, fewer bits, batches, drafting: measured or predicted in less than a minute, each with its error bar, what
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


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="NAME|DIR|ID", help="What `--model` takes.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The new folder.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. [default: as stored]")
    ] = None,
) -> None:
    """Write a model as a Hugging Face folder, for transformers and what reads its folders."""
    from formery.models import load
    from formery.models.hub.export import export as write
    from formery.models.weights import named_dtype

    kind = named_dtype(dtype)
    write(load(model, dtype=None), folder, kind)
    note(f"written: {folder}")


@app.command()
def papers(
    query: Annotated[list[str] | None, typer.Argument(metavar="QUERY", help="What you need, in your words.")] = None,
    part: Annotated[str | None, typer.Option(metavar="PART", help="Of a transformer: attention, cache, ...")] = None,
    domain: Annotated[str | None, typer.Option(metavar="DOMAIN", help="Shown on: language, speech, ...")] = None,
    status: Annotated[
        str | None, typer.Option(metavar="STATUS", help="'entry only', runs, checked or stale.")
    ] = None,
    lossless: Annotated[
        bool | None, typer.Option("--lossless/--lossy", help="With the plain method's very output, or not.")
    ] = None,
    training: Annotated[
        bool | None, typer.Option("--needs-training/--no-training", help="Something is trained for it, or not.")
    ] = None,
    meaning: Annotated[
        bool | None,
        typer.Option("--meaning/--words", help="By meaning too, or by words alone. [default: by words]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="At most so many. [default: 10 of a query]")] = None,
    as_json: AsJson = False,
) -> None:
    """List the papers, or what a query finds.

    With a query the best match comes first. Search by meaning needs the extra formery[search] and a few seconds.
    """
    from formery import catalog

    words = " ".join(query or []).strip()
    wanted = catalog.Wanted(part, domain, status, lossless=lossless, trained=training)
    entries = catalog.search(words, wanted, meaning=bool(meaning))
    most = limit if limit is not None else 10 if words else len(entries)
    if as_json:
        write_json([entry.to_json() for entry in entries[:most]], "-")
        return
    from formery.web.cards import paper_list
    from formery.web.table import console

    if not entries:
        about = f"has to do with {words!r}" if words else "is like that"
        raise FormeryError(f"no paper here {about}; `formery papers` lists them all.")
    console().print(paper_list(entries[:most]))
    if most < len(entries):
        note(f"{most} of {len(entries)}; --limit shows more.")


@app.command()
def show(slug: str, as_json: AsJson = False) -> None:
    """Show a paper, its evidence, how to run it."""
    from formery.catalog import entry
    from formery.web.cards import card, card_json

    found = entry(slug)
    if as_json:
        write_json(card_json(found), "-")
        return
    from formery.web.table import console

    console().print(card(found))


@app.command()
def verify(slug: str, as_json: AsJson = False) -> None:
    """Run a paper's check and write its record.

    The record goes to evidence/SLUG.json; a check that was stopped goes on where it was.
    """
    from formery.evidence.verify import verify as run
    from formery.methods import discover
    from formery.web.progress import Steps

    discover()
    with Steps(f"verifying {slug}") as progress:
        record = run(slug, progress=progress)
    if as_json:
        write_json(record.to_json(), "-")
        return
    from formery.web.cards import evidence
    from formery.web.table import console

    console().print(evidence(record))


@app.command()
def digest(
    since: Annotated[str | None, typer.Option(metavar="DATE", help="YYYY-MM-DD. [default: 30 days ago]")] = None,
    markdown: Annotated[str, typer.Option(metavar="FILE", help="Where the Markdown goes; - is stdout.")] = "-",
    feed: Annotated[str | None, typer.Option(metavar="FILE", help="Write an Atom feed there too.")] = None,
    address: Annotated[str, typer.Option(metavar="URL", help="Where the pages are, for the feed's links.")] = "",
) -> None:
    """Tell what is new or newly checked.

    As Markdown, and as a feed that people can follow.
    """
    check_targets(markdown, feed)
    from formery.catalog.news import day, news
    from formery.web.feed import atom
    from formery.web.feed import markdown as as_markdown
    from formery.web.output import write_text

    start = day(since)
    events = news(start)
    write_text(as_markdown(events, start), markdown)
    if feed is not None:
        write_text(atom(events, start, address and f"{address.rstrip('/')}/"), feed)


@app.command()
def web(
    host: Annotated[str, typer.Option(metavar="HOST", help="Who may connect: by default this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(metavar="PORT", help="0 takes a free one.")] = 8765,
    export: Annotated[
        str | None, typer.Option(metavar="DIR", help="Write the pages, the viewer aside, and serve nothing.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", help="Decodings at once in the viewer.")] = 2,
) -> None:
    """Serve the catalogue as pages: search, papers, evidence, and tokens watched as they are decoded.

    Ctrl-C ends it. Needs the extra formery[web].
    """
    from formery.web.site import need

    need()
    if export is not None:
        from formery.web.site.export import export as write

        number = write(Path(export))
        note(f"{number} pages: {export}/index.html")
        return
    from formery.web.site.serve import serve

    serve(host, port, runs)


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="What to train; see --list.")] = None,
    list_them: Annotated[bool, typer.Option("--list", help="List the recipes.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Stop after N steps.")] = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="[default: runs/RECIPE]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in DIR.")] = False,
) -> None:
    """Train a model that ships, by its recipe.

    Ctrl-C keeps a checkpoint, from which --resume goes on.
    """
    from formery.train.recipe import recipes

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
    try:
        shipped = train_and_ship(recipe, folder, max_steps, resume)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)  # the loop has said where it stopped
    note(f"the model is in {shipped}." if shipped else f"stopped early, as asked; --resume goes on in {folder}.")


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


ALL = ("all", "all-lossless")


def split(methods: str) -> list[str]:
    """The names between the commas."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise FormeryError("--methods names no method.")
    return names
