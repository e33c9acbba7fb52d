"""Models that read beyond their window, small and random, for the tests of the papers that make them."""

from generation import decoder
from torch import nn

from formery.methods.cache.focusllm import FocusLLM, focused
from formery.methods.cache.sharedllm import SharedLLM, shared
from formery.models import Decoder
from formery.parts import Rotary
from formery.parts.grain import Grain, Tree

WINDOW = 16


def base(key_value_heads: int = 2, layers: int = 3) -> Decoder:
    """The decoder below."""
    return decoder(Rotary(), layers=layers, key_value_heads=key_value_heads).eval()


def focus(key_value_heads: int = 2) -> FocusLLM:
    """Chunks of 4 tokens, candidates that are not the decoder's own."""
    model = focused(base(key_value_heads), WINDOW, 4).eval()
    for parameter in model.candidates.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def share(grain: Grain | None = None, depth: int = 2) -> SharedLLM:
    """Chunks of 8 tokens, cross-attention that says something."""
    model = shared(base(), WINDOW, 8, depth, Tree(2, 2) if grain is None else grain).eval()
    for crossing in model.crossings:
        nn.init.normal_(crossing.output.weight, std=0.3)
    return model
