"""A checkpoint's facts in a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from formery.models.inspection import Inspection
from formery.web.words import counted, size


def inspection(one: Inspection) -> RenderableType:
    """What a checkpoint is, and below it the tree of its parts."""
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    kind = f"{one.family} ({one.architecture})" if one.family else "made of our parts"
    facts.add_row("model", f"{kind}, as a {one.format} checkpoint")
    facts.add_row("parameters", f"{one.parameters:,} in {counted(one.tensors, 'tensor')}, {counted(one.files, 'file')}")
    facts.add_row("stored", ", ".join(f"{size(count)} of {dtype}" for dtype, count in one.stored.items()))
    facts.add_row("context", "unbounded" if one.context is None else f"{one.context:,} positions")
    if one.vocabulary is not None:
        facts.add_row("vocabulary", f"{one.vocabulary:,} tokens")
    facts.add_row("tokenizer", _tokenizer(one))
    if one.state_bytes_per_token is not None:
        facts.add_row("state", _state(one))
    return Group(Text(one.name, style="bold"), facts, Text(), Text(one.tree))


def _tokenizer(one: Inspection) -> str:
    if one.tokenizer is None:
        return "none: prompts are token ids"
    told = one.tokenizer
    parts = [f"{told['tokens']:,} tokens"]
    parts += [f"{name}s with {told[name]}" for name in ("begin", "end") if told[name]]
    return ", ".join([*parts, "with a chat template" if told["chat"] else "no chat template"])


def _state(one: Inspection) -> str:
    assert one.state_bytes_per_token is not None
    parts = [f"{size(one.state_bytes_per_token)} a token and row"]
    if one.state_bytes:
        parts.append(f"{size(one.state_bytes)} a row besides")
    if one.memory_bytes_per_token:
        parts.append(f"{size(one.memory_bytes_per_token)} for each place that the encoder read")
    return ", ".join(parts)
