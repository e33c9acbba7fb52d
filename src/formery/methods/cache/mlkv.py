"""MLKV: heads of keys and values that are shared between layers, beyond those that a layer's own heads share.

Zuhri, Adilazuarda, Purwarianti and Aji, "MLKV: Multi-Layer Key-Value Heads for Memory Efficient Transformer Decoding",
2024. Of L layers m own keys and values, of g heads each; layer i attends, with queries of its own, to those of the
nearest owner at or below it,

    softmax(scale · query_i(x_i) · key_o(x_o)ᵀ) · value_o(x_o)        o = owner of i

so that a token takes m · g / (L · h) of what h heads in each layer would take. With m = L it is grouped attention, with
g = 1 too multi-query attention, below which nothing but sharing between layers goes. A multi-head model is converted:
its maps of keys and of values are averaged over neighbouring heads and over the layers of an owner, and it is trained a
little on.

Differences: the authors' script averages layers one after the other, so that later ones weigh more; here it is the mean
of all. They widen the feed-forwards of a converted model by copies of its own units, so that it has as many parameters
as before; here only models that are trained from scratch are widened, by fresh units, and uptrained ones are smaller.
The paper uptrains Pythia-160M of 12 layers with down to 2 owners of one head, a sixth of multi-query attention's cache.
"""

from formery.errors import FormeryError
from formery.evidence.checks import criterion, untestable
from formery.evidence.measured import Budget, Measured
from formery.evidence.paper import Paper, publish
from formery.methods.cache.sharing_models import HALF_AS_DEEP, LAYERS, MORE, MULTI_HEAD, MULTI_QUERY, STEPS, Variant
from formery.methods.cache.sharing_study import MERGED, UPTRAINED, raced, surveyed
from formery.models import Decoder
from formery.models.key_value_sharing import shared, spaced
from formery.parts import Attention

GROUPED = Variant("GQA", 2)
OWNERS = tuple(
    Variant(f"MLKV, {owners} of {LAYERS} layers own one head", 1, tuple(spaced(LAYERS, owners))) for owners in (4, 2, 1)
)
FOUR, TWO, ONE = OWNERS


def mlkv(model: Decoder, owners: int, key_value_heads: int | None = None) -> Decoder:
    """The model with so many layers that own keys and values, of so many heads each (as many as before unless given).

    A rewrite that needs training: all but the merged maps is shared with `model`, so train a `clone()` of it. Raises
    FormeryError where the layers or heads do not go into so many.
    """
    layers = sum(isinstance(part, Attention) for part in model.layers.modules()) if isinstance(model, Decoder) else 0
    if layers == 0:
        raise FormeryError("mlkv needs a decoder with layers of attention.")
    return shared(model, spaced(layers, owners), key_value_heads)


def check(budget: Budget) -> Measured:
    """From scratch and uptrained, against keys and values in each layer, and against half the depth at equal bytes."""
    scratch = [MULTI_HEAD, GROUPED, MULTI_QUERY, *OWNERS, HALF_AS_DEEP]
    found = surveyed(budget, scratch, [MULTI_HEAD, MULTI_QUERY, *OWNERS])
    speeds = raced(budget, [MULTI_HEAD, MULTI_QUERY, *OWNERS])
    two, one, query, whole = (UPTRAINED.format(each.name) for each in (TWO, ONE, MULTI_QUERY, MULTI_HEAD))
    lost = found.more(MERGED.format(TWO.name), whole)
    left = found.more(two, whole)
    rate = next(row.numbers["speedup"] for row in speeds if row.setting == ONE.name)
    return Measured(
        [
            found.bytes_fall(),
            criterion(
                "uptrained",
                "2 owners, a quarter of MQA's bytes, cost at most 0.02 nats a byte more than MQA, uptrained alike",
                found.more(two, query),
                "<=",
                0.02,
                essential=True,
            ),
            criterion(
                "uptrained to the end",
                "1 owner, an eighth of MQA's bytes, costs at most 0.02 nats a byte more than MQA, uptrained alike",
                found.more(one, query),
                "<=",
                0.02,
            ),
            criterion(
                "regained",
                f"{MORE} steps regain at least 0.8 of what merging into 2 owners loses",
                [1 - rest / all_ for rest, all_ in zip(left, lost, strict=True)],
                ">=",
                0.8,
            ),
            criterion(
                "from scratch",
                "2 owners cost at most 0.02 nats a byte more than MQA, both from scratch",
                found.more(TWO.name, MULTI_QUERY.name),
                "<=",
                0.02,
            ),
            criterion(
                "equal bytes",
                "4 owners have a lower loss than MQA with half the layers, whose cache is as large",
                found.more(FOUR.name, HALF_AS_DEEP.name),
                "<",
                0.0,
            ),
            criterion(
                "speed",
                "in batches of 64, with 256 tokens read, 1 owner writes at least as many tokens a second as MHA",
                [rate.low, rate.median, rate.high],
                ">=",
                1.0,
            ),
            untestable(
                "tasks",
                "Pythia-160M, uptrained with a sixth of MQA's cache, answers nearly as well as before",
                "<=",
                0.0,
                "needs Pythia-160M, its training text and days of training",
                essential=True,
            ),
        ],
        [*found.rows(), *speeds],
        baseline="multi-head and multi-query attention in every layer, trained alike",
        notes=[
            f"Models of {LAYERS} layers and 0.42 M parameters, {STEPS} steps of 1,024 bytes of Python from scratch; "
            "losses are nats a byte of held-out text, differences are between models of the same seed. What a model "
            "saves in maps of keys and values it has in wider feed-forwards; the one of half the depth is smaller.",
            f"Uptrained: the multi-head model of that seed, merged and trained for {MORE} steps more; MHA alike.",
            "bytes: of keys and values a token, from storage. state_bytes: with the positions that all layers share.",
            "Times are of wider random models (width 128) by PyTorch alone, over those of MHA; the compiled "
            "kernels know plain attention only, so that MHA and MQA gain more by them (speedup_compiled).",
            "Sharing saves memory and the maps of layers that own nothing; each layer still reads all keys and values.",
        ],
    )


PAPER = publish(
    Paper(
        slug="mlkv",
        title="MLKV: Multi-Layer Key-Value Heads for Memory Efficient Transformer Decoding",
        year=2024,
        part="cache",
        domain="language",
        does="Shrinks the key-value cache beyond one head a layer: only some layers own keys and values, the others "
        "use those of the nearest owner below; a trained model is converted by averaging heads and layers and a little "
        "more training.",
        claims="A cache up to 6 times smaller than that of multi-query attention with little loss, for uptrained "
        "Pythia-160M.",
        needs="A multi-head model such as Pythia-160M and text to go on training.",
        name="MLKV",
        training="added",
        sought="smaller KV cache than multi-query attention; convert an existing model to share KV heads across "
        "layers; serve bigger batches",
        related={
            "cla": "keys and values shared between layers",
            "tova": "smaller cache",
            "optin": "parts of a trained model removed",
            "finercut": "layers of a trained model removed",
        },
        added="2026-11-28",
        check=check,
        works=("code",),
    )
)
