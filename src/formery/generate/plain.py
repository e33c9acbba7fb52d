"""The methods that are nobody's paper here: token by token, greedy or sampled, and beam search."""

from formery.generate.beam import beam_search
from formery.generate.draft import NoDraft
from formery.generate.method import Method, drafting, register

GREEDY = register(Method("greedy", "the likeliest token, one after the other", lossless=True, make=drafting(NoDraft)))
SAMPLING = register(
    Method(
        "sampling",
        "a token drawn from the model's distribution, one after the other",
        lossless=True,
        make=drafting(NoDraft),
        defaults={"temperature": 1.0},
    )
)
BEAM = register(
    Method("beam", "the likeliest of several texts that grow side by side", lossless=False, make=beam_search)
)
