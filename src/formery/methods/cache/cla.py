"""Cross-layer attention: neighbouring layers attend to the same keys and values.

Brandon, Mishra, Nrusimha, Panda and Ragan-Kelley, "Reducing Transformer Key-Value Cache Size with Cross-Layer
Attention", 2024. With a sharing factor f, of each f layers the first makes keys and values, and the others, which have
no maps of their own for them, attend to these with their own queries. A token then takes 1/f of the cache, whatever the
number and the width of heads are. The last layers are fewer where f does not divide the depth.

The paper trains models of 1 and 3 billion parameters from scratch, with learning rates tuned for each, and finds a
factor of 2 on top of multi-query attention (MQA) to cost next to nothing, and less than narrower heads that save as
much. That is the decisive comparison: a factor of 2 and heads of half the width take the same bytes, and have as many
parameters too. Converting a trained model by merging is MLKV's; it is measured here for comparison.
"""

from formery.errors import FormeryError
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.methods.cache.sharing_models import (
    HALF_AS_DEEP,
    HEADS,
    LAYERS,
    MORE,
    MULTI_HEAD,
    MULTI_QUERY,
    STEPS,
    Variant,
)
from formery.methods.cache.sharing_study import UPTRAINED, raced, surveyed
from formery.models import Decoder
from formery.models.key_value_sharing import shared
from formery.parts import Attention

NARROW = Variant("MQA, heads of half the width", 1, heads=2 * HEADS)


def neighbours(layers: int, factor: int) -> list[int]:
    """The owner of each layer: the first of its `factor` neighbours."""
    if factor < 1:
        raise FormeryError(f"keys and values are shared by at least 1 layer, not by {factor}.")
    return [layer - layer % factor for layer in range(layers)]


def cla(model: Decoder, factor: int = 2, key_value_heads: int | None = None) -> Decoder:
    """The model with keys and values in every `factor`-th layer, merged as `models.key_value_sharing.shared` does.

    It needs training; `build(cla(...).describe())` has weights drawn anew, for training from scratch. Raises
    FormeryError where the layers or heads cannot share.
    """
    layers = sum(isinstance(part, Attention) for part in model.layers.modules()) if isinstance(model, Decoder) else 0
    if layers == 0:
        raise FormeryError("cla needs a decoder with layers of attention.")
    return shared(model, neighbours(layers, factor), key_value_heads)


SHARING = {factor: Variant(f"MQA + CLA{factor}", 1, tuple(neighbours(LAYERS, factor))) for factor in (2, 3, 4)}


def check(budget: Budget) -> Measured:
    """Sharing factors 2, 3 and 4 on top of MQA, against narrower heads and less depth at equal bytes."""
    two = SHARING[2]
    scratch = [MULTI_HEAD, MULTI_QUERY, *SHARING.values(), NARROW, HALF_AS_DEEP]
    found = surveyed(budget, scratch, [MULTI_HEAD, MULTI_QUERY, two, SHARING[4]])
    speeds = raced(budget, [MULTI_QUERY, *SHARING.values()])
    return Measured(
        [
            found.bytes_fall(),
            criterion(
                "equal bytes",
                "a factor of 2 has a lower loss than heads of half the width, which take the same bytes",
                found.more(two.name, NARROW.name),
                "<",
                0.0,
                essential=True,
            ),
            criterion(
                "accuracy",
                "a factor of 2 costs at most 0.01 nats a byte more than MQA",
                found.more(two.name, MULTI_QUERY.name),
                "<=",
                0.01,
            ),
            criterion(
                "depth",
                "a factor of 2 has a lower loss than MQA with half the layers, which takes the same bytes",
                found.more(two.name, HALF_AS_DEEP.name),
                "<",
                0.0,
            ),
            criterion(
                "from scratch",
                f"trained so from the beginning, it has a lower loss than merged and uptrained for {MORE} steps more",
                found.more(two.name, UPTRAINED.format(two.name)),
                "<",
                0.0,
            ),
            untestable(
                "size",
                "at 1 and 3 billion parameters a factor of 2 costs next to nothing",
                "<=",
                0.0,
                "needs training such models from scratch",
                essential=True,
            ),
        ],
        [*found.rows(), *speeds],
        baseline="multi-query attention in every layer, trained alike",
        notes=[
            f"Models of {LAYERS} layers and 0.42 M parameters, {STEPS} steps of 1,024 bytes of Python from scratch, "
            "one learning rate for all (the paper tunes it for each); losses are nats a byte of held-out text, and "
            "differences are between models of the same seed. What a model saves in maps of keys and values it "
            "has in wider feed-forwards; the one of half the depth is smaller.",
            f"With a factor of 3 the owners are {-(-LAYERS // 3)} of {LAYERS} layers.",
            f"Uptrained: the multi-head model of that seed, merged and trained for {MORE} steps more; MHA alike.",
            "bytes: of keys and values a token, from storage. state_bytes: with the positions that all layers share.",
            "Times are of wider random models by PyTorch alone, over those of MQA, in batches of 64 with 256 tokens "
            "read; the compiled kernels know plain attention only, so that MQA gains more by them (speedup_compiled).",
        ],
    )


PAPER = publish(
    Paper(
        slug="cla",
        title="Reducing Transformer Key-Value Cache Size with Cross-Layer Attention",
        year=2024,
        part="cache",
        domain="language",
        does="Halves the key-value cache by sharing across layers: every second layer has no keys and values of its "
        "own and reads those of the layer before. Goes together with grouped heads.",
        claims="Another factor of 2 on top of multi-query attention at nearly the same accuracy, for models of 1 and 3 "
        "billion parameters.",
        needs="Training a language model; 1 to 3 billion parameters for the figures.",
        name="CLA (Cross-Layer Attention)",
        training="whole",
        sought="reduce KV cache memory; share keys and values between adjacent layers; more users per GPU",
        related={
            "mlkv": "keys and values shared between layers",
            "phd-transformer": "cache of the same size for more computation",
            "tova": "smaller cache by dropping tokens",
            "retnet": "no growing cache",
        },
        added="2026-11-28",
        check=check,
        works=("code",),
    )
)
