"""The program that commands belong to."""

from typing import Annotated

import typer

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
