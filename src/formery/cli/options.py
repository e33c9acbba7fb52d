"""Options that several commands have."""

from typing import Annotated

import typer

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
