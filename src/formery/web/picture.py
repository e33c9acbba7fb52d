"""The dependency graph of a decoding: which call settled which token, and what was guessed before."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from formery.data.tokenizer import Tokenizer
from formery.files import atomic_write
from formery.generate import Generation

COLOURS = {
    "accepted guess": "#0072b2",
    "token of the target's own": "#8ec9e8",
    "rejected guess": "#f3c29b",
}
COLUMNS = 48  # tokens that fit side by side and can still be read


def dependency_graph(generation: Generation, tokenizer: Tokenizer | None = None) -> Figure:
    """Rows are target calls, columns are places in the text; a column ends where its token is settled.

    Tokens settled by one call did not wait for each other: the shape below the diagonal is what parallel decoding
    gains (after the dependency graphs of Santilli et al., 2023). At most the first 48 tokens are drawn.
    """
    events = [event for event in generation.trace if event.emitted or event.drafted]
    width = min(COLUMNS, max(1, len(generation.tokens)))
    shown, start = [], 0
    for event in events:
        if start >= width:
            break
        shown.append((start, event))
        start += len(event.emitted)
    figure = Figure(figsize=(1.2 + 0.46 * width, 1.4 + 0.26 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for row, (begin, event) in enumerate(shown, 1):
        cells = [(token, "accepted guess") for token in event.emitted[: event.accepted]]
        cells += [(token, "token of the target's own") for token in event.emitted[event.accepted :]]
        cells += [(token, "rejected guess") for token in event.rejected]
        for column, (token, kind) in enumerate(cells, begin):
            if column < width:
                _cell(axes, row, column, label(token, tokenizer), kind)
    axes.set(
        xlim=(-0.5, width - 0.5),
        ylim=(max(1, len(shown)) + 0.5, 0.5),
        xlabel="place in the text",
        ylabel="target call",
        title=f"{len(generation.tokens)} tokens in {generation.calls} calls"
        + (f"; the first {width} are shown" if width < len(generation.tokens) else ""),
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=colour, label=kind) for kind, colour in COLOURS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def save_dependency_graph(generation: Generation, path: Path, tokenizer: Tokenizer | None = None) -> None:
    """Writes the picture; the ending of `path` says in which format (png, svg, pdf)."""
    figure = dependency_graph(generation, tokenizer)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)


def label(token: int, tokenizer: Tokenizer | None) -> str:
    """A token as a short text that can be seen."""
    known = tokenizer is not None and token < tokenizer.vocabulary_size
    text = tokenizer.token_text(token) if tokenizer is not None and known else f"#{token}"
    text = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= 6 else text[:5] + "…"


def _cell(axes: Axes, row: int, column: int, text: str, kind: str) -> None:
    axes.add_patch(Rectangle((column - 0.48, row - 0.45), 0.96, 0.9, color=COLOURS[kind], linewidth=0))
    dark = kind == "accepted guess"
    axes.text(
        column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black", parse_math=False
    )
