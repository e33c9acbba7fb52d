"""The program: runs a command line, and tells what went wrong in one sentence."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from formery.cli import INTERRUPTED, app
from formery.errors import FormeryError
from formery.web.output import note

MISTAKE = 2


def main(arguments: list[str] | None = None) -> None:
    """Runs a command line (this process's own unless given) and exits: 0, 2 for a mistake, 130 for Ctrl-C.

    Whoever stops reading the output ends the program without a word.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # what a terminal cannot show becomes a question mark
    with one_sentence():
        code = app(arguments, prog_name="formery", standalone_mode=False)
        sys.stdout.flush()
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        sys.exit(code or 0)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns what can go wrong into a sentence on stderr and an exit code."""
    try:
        yield
    except FormeryError as error:
        note(f"formery: {error}")
        sys.exit(MISTAKE)
    except typer.TyperException as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        sentence = " ".join(message.split()).rstrip(".")
        note(f"formery: {sentence[:1].lower()}{sentence[1:]} (formery --help tells more).")
        sys.exit(MISTAKE)
    except (KeyboardInterrupt, typer.Abort):
        note("formery: stopped by Ctrl-C; no file was left half-written.")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
