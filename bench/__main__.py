"""The command line: `python -m bench decode --json decode.json`, `python -m bench plot decode.json`."""

import argparse
import dataclasses
import importlib
import logging
import sys
from pathlib import Path
from typing import Any, NoReturn

from bench.cases import MODELS, WORKS, cases, split
from formery.errors import FormeryError, unknown

ROUNDS = 5
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise FormeryError(f"{message.rstrip('.')}; python -m bench --help tells what there is.")


def parser() -> Parser:
    """All options."""
    top = Parser(prog="python -m bench", description="Formery timed beside other people's programs.")
    names = (*WORKS, "context", "drafting", "finding", "pages", "scale", "serving", "plot")
    commands = top.add_subparsers(dest="command", required=True, metavar="|".join(names))
    for work in WORKS:
        one = commands.add_parser(work, help=f"on {' and '.join(MODELS[work])}")
        one.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and versions there")
        one.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help="interleaved rounds (default 5)")
        one.add_argument("--systems", metavar="A,B", help="only these, in this order")
        one.add_argument("--dtype", metavar="A,B", help="only these of float32, bfloat16, int8, int4")
        one.add_argument("--models", metavar="A,B", help="only these")
        one.add_argument("--quick", action="store_true", help="tiny models, to see that all works")
    drafting = commands.add_parser("drafting", help="every drafting method on the shipped models")
    drafting.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and versions there")
    drafting.add_argument("--models", metavar="A,B", help="only these of code, translate")
    drafting.add_argument("--variants", action="store_true", help="each method in its other shapes too")
    drafting.add_argument("--quick", action="store_true", help="a few prompts, to see that all works")
    finding = commands.add_parser("finding", help="how well the catalogue's search finds")
    finding.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    pages = commands.add_parser("pages", help="the catalogue's pages: how fast, and under load")
    pages.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and versions there")
    pages.add_argument("--quick", action="store_true", help="some seconds, to see that all works")
    scale = commands.add_parser("scale", help="many processes: memory beside what a plan says, and speed")
    scale.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and versions there")
    scale.add_argument("--quick", action="store_true", help="a few cases, to see that all works")
    context = commands.add_parser("context", help="long contexts: memory of decode states, and speed")
    context.add_argument("--json", type=Path, metavar="FILE", help="write machine, rows and versions there")
    context.add_argument("--plot", type=Path, metavar="FILE.png", help="draw that, and what records say of caches")
    context.add_argument("--again", type=Path, metavar="FILE", help="draw what was measured before, from its --json")
    context.add_argument("--quick", action="store_true", help="short contexts, to see that all works")
    serving = commands.add_parser("serving", help="the text of other engines that serve a model of ours")
    serving.add_argument("--converter", type=Path, metavar="DIR", help="llama.cpp's sources; without, it is left out")
    serving.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    plot = commands.add_parser("plot", help="a bar chart of results")
    plot.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json")
    plot.add_argument("--out", type=Path, default=Path("speed.png"), metavar="FILE")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Does what is asked; 0 when it went well, 1 when a system failed, 2 for a mistake in the options."""
    try:
        asked = parser().parse_args(arguments)
        if asked.command == "plot":
            from bench.plot import plot

            plot(asked.results, asked.out)
            return 0
        if asked.command in ("context", "drafting", "finding", "pages", "scale", "serving"):
            measure = importlib.import_module(f"bench.{asked.command}").measure
            return int(measure(asked))
        return _measure(asked)
    except FormeryError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: stopped; the cases that were finished are kept where --json names a file.", file=sys.stderr)
        return INTERRUPTED


def _measure(asked: argparse.Namespace) -> int:
    from rich.console import Console

    from bench import report
    from bench.run import run
    from bench.systems import KNOWN
    from bench.table import WIDTH, progress, tables

    for library in ("torchao", "torch.utils._pytree"):  # what they say when they are imported is no news here
        logging.getLogger(library).setLevel(logging.CRITICAL)
    if asked.rounds < 1:
        raise FormeryError(f"--rounds must be at least 1, not {asked.rounds}.")
    names = list(KNOWN) if asked.systems is None else split(asked.systems, "--systems")
    if wrong := [name for name in names if name not in KNOWN]:
        raise unknown("system", wrong[0], KNOWN)
    dtypes, models = (text and split(text, option) for text, option in
                      ((asked.dtype, "--dtype"), (asked.models, "--models")))  # fmt: skip
    chosen = cases(asked.command, dtypes, models, asked.quick)
    console, told = Console(), Console(stderr=True)
    width = console.width if console.is_terminal else WIDTH
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    for case in chosen:
        with progress(told, case.title) as tell:
            outcome = run(case, names, asked.rounds, tell)
        for drawn in tables(case.title, outcome.rows):
            console.print(drawn, width=width)
            console.print()
        for one in outcome.skipped:
            told.print(f"{one['system']} did not take part: {one['why']}", markup=False, highlight=False)
        rows += map(dataclasses.asdict, outcome.rows)
        skipped += outcome.skipped
        if asked.json:
            report.write(asked.json, report.document(rows, skipped, asked.rounds))
    return int(any(one["why"].startswith("failed") for one in skipped))


if __name__ == "__main__":
    sys.exit(main())
