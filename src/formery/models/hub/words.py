"""What many published configurations say in the same words: ways out, activations, first tokens."""

from typing import Any

from formery.models.hub.config import ACTIVATIONS, Config
from formery.parts import Embedding, Output, Part, TiedOutput


def output(config: Config, embedding: Embedding, tied: bool = False, **more: Any) -> Output | TiedOutput:
    """The way to logits, by the embedding's table or by one of its own; tied: the family's default."""
    if config.flag("tie_word_embeddings", default=tied):
        return TiedOutput(embedding, **more)
    return Output(embedding.inner or embedding.width, embedding.vocabulary, **more)


def output_settings(model: Any) -> dict[str, Any]:
    """Whether the way out is tied."""
    return {"tie_word_embeddings": isinstance(model.output, TiedOutput)}


def activation_settings(name: str, part: Part) -> dict[str, Any]:
    """The published name of a feed-forward's activation."""
    ours = getattr(part, "activation", None)
    return {name: next(theirs for theirs, own in ACTIVATIONS.items() if own == ours)} if ours else {}


def prefix(config: Config) -> list[int]:
    """What a decoder is made to read after its start token: a forced first token, or a task's tokens."""
    forced = config.get("forced_decoder_ids", default=[])
    if not isinstance(forced, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and pair[0] == place and type(pair[1]) is int
        for place, pair in enumerate(forced, 1)
    ):
        raise config.wrong("forced_decoder_ids", "should list [place, token] from place 1 on")
    tokens = [token for _, token in forced]
    first = config.whole("forced_bos_token_id", default=None, least=0)
    return [*tokens, *([] if first is None or tokens else [first])]


def start_settings(model: Any) -> dict[str, Any]:
    """The start token and what follows it."""
    forced = [[place, token] for place, token in enumerate(model.prefix, 1)]
    named = {"forced_bos_token_id": model.prefix[0]} if len(forced) == 1 else {"forced_decoder_ids": forced}
    return {"decoder_start_token_id": model.start_token, **(named if forced else {})}
