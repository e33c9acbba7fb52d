"""Bytes of decode states: what is held, counted once, by layer and by token."""

import pytest
import torch
from generation import decoder, model

from formery.evidence.accounting import account, layer_bytes, per_layer_and_token
from formery.evidence.compare import compare
from formery.generate import generate
from formery.parts import Rotary


def test_an_account_is_the_arithmetic_of_keys_and_values() -> None:
    target = decoder(Rotary(), width=32, layers=3, key_value_heads=2)
    found = account(target, 100, batch=3)
    assert found.layers == (3 * 100 * 2 * 2 * 8 * 4,) * 3  # rows, tokens, keys and values, heads, width, bytes
    assert found.total == sum(found.layers) + 3 * 100 * 8  # and the positions
    assert found.per_token == found.total / 300


def test_a_storage_that_two_layers_hold_counts_once() -> None:
    target = decoder(Rotary(), layers=2)
    state = target.start(1, 10)
    one, other = state.layers.values()
    once = layer_bytes(state)
    other.keys = one.keys  # type: ignore[attr-defined]
    assert layer_bytes(state) == (once[0], once[1] // 2)
    assert sum(layer_bytes(state)) < sum(once)


@pytest.mark.parametrize("kind", ["rotary", "translator"])
def test_bytes_of_what_was_written(kind: str) -> None:
    target = model(kind)
    prompts = [[3, 4, 5], [6, 7, 8, 9]]
    outputs = generate(target, prompts, max_new_tokens=5)
    found = per_layer_and_token(target, prompts, outputs, batch=2)
    layers = len(target.begin([prompts[0]], 1)[0].layers)
    longest = max(len(p) + len(o.tokens) for p, o in zip(prompts, outputs, strict=True))
    assert found == max(one.state_bytes for one in outputs) / (2 * longest * layers)


def test_comparisons_tell_it() -> None:
    from formery.data.base import Example

    torch.manual_seed(1)
    examples = [Example("the cat sat", " on the mat", "a"), Example("the dog", " sat", "b")]
    target = model("rotary", vocabulary=300)
    from generation import small_tokenizer

    target.tokenizer = small_tokenizer()
    found = compare(target, examples, ["cache-window:budget=4"], max_new_tokens=12, rounds=1)
    whole, window = found.rows
    assert 0 < window.state_per_layer_token < whole.state_per_layer_token
    assert found.to_json()["rows"][0]["state_per_layer_token"] == whole.state_per_layer_token
