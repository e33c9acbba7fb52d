"""RetNet."""

from formery.models import Decoder
from formery.parts import Embedding, GatedMLP, Layer, PreNorm, RMSNorm, Rotary, TiedOutput
from formery.parts.mixers.retention import Retention


def retnet(
    vocabulary: int, width: int, layers: int, heads: int, hidden: int, max_length: int | None = None, reach: int = 64
) -> Decoder:
    """A decoder with retention in the place of attention, otherwise as `language_model`."""
    embedding = Embedding(vocabulary, width)
    position = Rotary()

    def layer() -> Layer:
        retention = Retention(width, heads, position=position, reach=reach)
        return Layer([PreNorm(RMSNorm(width), retention), PreNorm(RMSNorm(width), GatedMLP(width, hidden))])

    return Decoder(embedding, [layer() for _ in range(layers)], RMSNorm(width), TiedOutput(embedding), max_length)
