"""Commands that let a model leave: export, gguf."""

from pathlib import Path
from typing import Annotated

import typer

from formery.cli.app import app
from formery.web.output import note


@app.command()
def export(
    model: Annotated[str, typer.Argument(metavar="NAME|DIR|ID", help="What `--model` takes.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="The new folder.")],
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. [default: as stored]")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--for", metavar="ENGINE", help="vllm, llama.cpp or ctranslate2: only what it serves as it is."),
    ] = None,
) -> None:
    """Write a model as a Hugging Face folder, for transformers and what reads its folders.

    With --for, a model with a part that the engine has no notion of is refused; otherwise the next commands are told.
    """
    from formery.models import load
    from formery.models.hub.engines import engine_named
    from formery.models.hub.export import export as write
    from formery.models.weights import named_dtype

    kind = named_dtype(dtype)
    commands = [] if engine is None else engine_named(engine).commands(folder)
    write(load(model, dtype=None), folder, kind, engine)
    note(f"written: {folder}")
    for command in commands:
        print(command)


@app.command()
def gguf(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="What `export --for llama.cpp` has written.")],
    file: Annotated[str, typer.Argument(metavar="FILE", help="The new file, .gguf.")],
    converter: Annotated[
        str,
        typer.Option("--converter", metavar="DIR", envvar="FORMERY_LLAMA_CPP", help="llama.cpp's sources."),
    ],
    outtype: Annotated[str, typer.Option(metavar="TYPE", help="f32, f16, bf16, q8_0 or auto: of the weights.")] = "f32",
) -> None:
    """Write an exported folder as a file for llama.cpp, by llama.cpp's own converter.

    The converter has to be told how the text of a tokenizer that was trained here is cut; this command tells it.
    """
    from formery.models.hub.gguf import convert

    convert(folder, Path(file), converter, outtype)
    note(f"written: {file}")
