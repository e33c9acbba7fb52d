"""MLKV: how many layers own keys and values, and the check's models."""

from pathlib import Path

import pytest
import torch
from generation import decoder, model, translator

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.generate import generate
from formery.methods.cache.mlkv import FOUR, GROUPED, ONE, OWNERS, TWO, mlkv
from formery.methods.cache.sharing_models import HALF_AS_DEEP, LAYERS, MULTI_HEAD, MULTI_QUERY, Variant, made
from formery.methods.cache.sharing_study import Found
from formery.models import load, save
from formery.parts import Rotary

VARIANTS = [MULTI_HEAD, GROUPED, MULTI_QUERY, *OWNERS, HALF_AS_DEEP]


def test_all_layers_owning_all_heads_is_the_model_itself() -> None:
    plain = decoder(Rotary(), layers=4).eval()
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(mlkv(plain, 4)(tokens), plain(tokens))
    assert mlkv(plain, 4).describe() == plain.describe()


@pytest.mark.parametrize(("owners", "heads"), [(4, 2), (2, 4), (2, 1), (1, 1)])
def test_the_cache_is_owners_times_heads(owners: int, heads: int) -> None:
    plain = decoder(Rotary(), layers=4).eval()
    full, taken = account(plain, 16), account(mlkv(plain, owners, heads), 16)
    assert len(taken.layers) == owners
    assert sum(taken.layers) * 4 * 4 == sum(full.layers) * owners * heads


def test_a_trained_model_is_rewritten_saved_and_goes_on_writing(tmp_path: Path) -> None:
    code = load("code")
    made = mlkv(code, 2, 1)
    made.tokenizer = code.tokenizer
    save(made, tmp_path / "smaller")
    again = load(tmp_path / "smaller")
    prompts = ["def add(a, b):\n", "import os"]
    wanted = [one.tokens for one in generate(made, prompts, max_new_tokens=8)]
    assert [one.tokens for one in generate(again, prompts, "aggressive-decoding", max_new_tokens=8)] == wanted
    assert sum(account(made, 8).layers) < sum(account(code, 8).layers) / 2


def test_what_has_no_layers_of_attention_is_refused() -> None:
    for wrong in (translator(), "code"):
        with pytest.raises(FormeryError, match="mlkv needs a decoder with layers of attention"):
            mlkv(wrong, 1)  # type: ignore[arg-type]
    with pytest.raises(FormeryError, match="of 2 layers 1 to 2 can own"):
        mlkv(model("rotary"), 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda one: one.name)
def test_the_models_of_the_check_take_what_is_predicted(variant: Variant) -> None:
    small, whole = account(made(variant), 8), account(made(MULTI_HEAD), 8)
    assert sum(small.layers) == sum(whole.layers) * variant.share
    if variant != HALF_AS_DEEP:
        ratio = made(variant).parameter_count() / made(MULTI_HEAD).parameter_count()
        assert abs(ratio - 1) < 0.005


def test_models_are_drawn_at_their_own_size() -> None:
    """Weights that are drawn anew are no means of others, which would be smaller."""
    torch.manual_seed(0)
    shared, plain = made(ONE), made(MULTI_QUERY)
    key, other = (one.layers[0].sublayers[0].inner.key.weight for one in (shared, plain))
    assert abs(float(key.detach().std() / other.detach().std()) - 1) < 0.1


def test_variants_that_are_equal_are_trained_once() -> None:
    assert Variant("other", 1, TWO.owners).key == TWO.key
    assert len({one.key for one in VARIANTS}) == len(VARIANTS)
    assert FOUR.owners == (0, 0, 2, 2, 4, 4, 6, 6) and len(FOUR.owners) == LAYERS


def test_bytes_that_are_not_what_was_predicted_are_seen() -> None:
    found = Found(sizes={"MHA": [64.0], "MQA": [16.0]}, predicted={"MHA": MULTI_HEAD.share, "MQA": MULTI_QUERY.share})
    assert found.bytes_fall().holds
    found.sizes["MQA"] = [17.0]
    assert not found.bytes_fall().holds
