"""Cross-layer attention: which layers share, and the comparison at equal bytes."""

import pytest
import torch
from generation import decoder, translator

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.evidence.measured import Budget
from formery.generate import generate
from formery.methods.cache.cla import NARROW, SHARING, cla, neighbours
from formery.methods.cache.sharing_models import HALF_AS_DEEP, MULTI_HEAD, MULTI_QUERY, made
from formery.methods.cache.sharing_study import raced
from formery.models import Decoder
from formery.parts import Rotary, build
from formery.parts.shared_attention import SharedAttention


def whole(layers: int = 6) -> Decoder:
    return decoder(Rotary(), layers=layers).eval()


def test_neighbours_share_from_the_first_layer_on() -> None:
    assert neighbours(6, 1) == [0, 1, 2, 3, 4, 5] and neighbours(6, 2) == [0, 0, 2, 2, 4, 4]
    assert neighbours(8, 3) == [0, 0, 0, 3, 3, 3, 6, 6] and neighbours(3, 5) == [0, 0, 0]


def test_a_factor_of_one_is_the_model_itself() -> None:
    plain, tokens = whole(), torch.arange(12)[None]
    with torch.inference_mode():
        assert torch.equal(cla(plain, 1)(tokens), plain(tokens))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_the_cache_falls_by_the_factor_and_decoding_goes_on(factor: int) -> None:
    plain = whole(12)
    made = cla(plain, factor, 2)
    assert sum(account(made, 16).layers) * factor * 2 == sum(account(plain, 16).layers)
    prompts = [[5, 6, 7], [8]]
    wanted = [one.tokens for one in generate(made, prompts, max_new_tokens=8)]
    found = generate(made, prompts, "parallel-jacobi-decoding", max_new_tokens=8)
    assert [one.tokens for one in found] == wanted


def test_from_scratch_it_is_the_same_model_with_other_weights() -> None:
    made = cla(whole(), 2)
    fresh = build(made.describe())
    assert isinstance(fresh, Decoder) and sum(isinstance(one, SharedAttention) for one in fresh.modules()) == 3
    assert fresh.parameter_count() == made.parameter_count() == whole().parameter_count() - 3 * 2 * 32 * 32


def test_a_factor_below_one_and_other_models_are_refused() -> None:
    with pytest.raises(FormeryError, match="by at least 1 layer, not by 0"):
        cla(whole(), 0)
    with pytest.raises(FormeryError, match="cla needs a decoder"):
        cla(translator())  # type: ignore[arg-type]


def test_what_is_compared_at_equal_bytes_has_equal_bytes_and_as_many_parameters() -> None:
    two, narrow = made(SHARING[2]), made(NARROW)
    assert SHARING[2].share == NARROW.share == HALF_AS_DEEP.share == MULTI_QUERY.share / 2
    assert sum(account(two, 8).layers) == sum(account(narrow, 8).layers) == sum(account(made(HALF_AS_DEEP), 8).layers)
    assert two.parameter_count() == narrow.parameter_count()
    for variant in SHARING.values():
        assert sum(account(made(variant), 8).layers) == sum(account(made(MULTI_HEAD), 8).layers) * variant.share


def test_the_race_gives_a_ratio_for_each_model_and_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FAST_WIDTH": 64, "FAST_ROWS": 2, "FAST_LENGTH": 8, "FAST_STEPS": 2}.items():
        monkeypatch.setattr(f"formery.methods.cache.sharing_study.{name}", value)
    rows = raced(Budget(rounds=2), [MULTI_QUERY, SHARING[2]])
    assert [row.setting for row in rows] == [MULTI_QUERY.name, SHARING[2].name]
    for row in rows:
        assert row.numbers.keys() == {"speedup", "speedup_compiled"}
        assert all(one.count == 2 and one.low > 0 for one in row.numbers.values())
    assert all(one.low == one.high == 1 for one in rows[0].numbers.values())
