"""The lossless methods hold on other people's models: greedy's very tokens, in any batch, whatever is drafted."""

from typing import Any

import pytest
import torch
from generation import noisy, padded_left, until_end
from published import saved, sources, tokens

import formery
from formery.generate import Settings
from formery.generate.sampler import probabilities
from formery.models import EncoderDecoder

MODELS = (
    "gpt2", "gpt-neox", "llama3", "qwen3", "gemma2", "bloom", "opt", "mistral", "mixtral", "olmoe", "mamba2",
    "t5", "bart", "marian", "whisper",
)  # fmt: skip
METHODS = (
    "aggressive-decoding",
    "parallel-jacobi-decoding",
    "parallel-jacobi-decoding:form=plain",
    "speculative-sampling:length=2",
    "speculative-sampling:length=6",
)
LENGTHS = (5, 11, 8)


def run(model: Any, prompts: list[Any], method: str, draft: Any, **options: Any) -> list[Any]:
    more = {"draft": draft} if method.startswith("speculative") else {}
    return formery.generate(model, prompts, method=method, max_new_tokens=40, **more, **options)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str) -> None:
    model = formery.load(saved(name)[1])
    draft = noisy(model, 0.1)
    draft.conventions = model.conventions
    prompts = sources(name, LENGTHS)
    plain = formery.generate(model, prompts, max_new_tokens=40)
    alone = [formery.generate(model, [one], max_new_tokens=40)[0] for one in prompts]
    assert [one.tokens for one in alone] == [one.tokens for one in plain]
    drafted = accepted = 0
    for method in METHODS:
        together = run(model, prompts, method, draft)
        assert [one.tokens for one in together] == [one.tokens for one in plain], method
        one = run(model, prompts[1:2], method, draft)[0]
        assert one.tokens == plain[1].tokens, method
        drafted += sum(one.drafted for one in together)
        accepted += sum(one.accepted for one in together)
    assert 0 < accepted < drafted


@pytest.mark.parametrize("name", ["llama3", "mamba2", "t5", "whisper"])
def test_a_seed_gives_the_same_text_in_any_batch(name: str) -> None:
    model = formery.load(saved(name)[1])
    prompts = sources(name, LENGTHS)
    options = {"method": "sampling", "seed": 3, "max_new_tokens": 20}
    together = [one.tokens for one in formery.generate(model, prompts, **options)]
    assert [one.tokens for one in formery.generate(model, prompts, batch=1, **options)] == together
    assert len({tuple(one) for one in together}) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2", "t5", "bart"])
@torch.no_grad()
def test_beams_are_those_of_transformers(name: str) -> None:
    theirs, folder = saved(name)
    model = formery.load(folder)
    prompts = sources(name, (7, 4))
    options = {"num_beams": 4, "max_new_tokens": 12, "do_sample": False, "early_stopping": False}
    end = theirs.generation_config.eos_token_id
    for prompt in prompts:
        batch = {"input_ids": torch.tensor([prompt])} if model.reads_apart else padded_left([prompt])
        [row] = theirs.generate(**batch, **options).tolist()
        written = row[1:] if model.reads_apart else row[len(prompt) :]
        [ours] = formery.generate(model, [prompt], method="beam", beams=4, max_new_tokens=12)
        assert ours.tokens == until_end(written, [end])


@pytest.mark.parametrize("method", ["greedy", "sampling", "beam", *METHODS])
def test_what_is_suppressed_is_never_written(method: str) -> None:
    model = formery.load(saved("whisper")[1])
    draft = noisy(model, 0.3)
    draft.conventions = model.conventions
    prompts = sources("whisper", LENGTHS)
    usual = run(model, prompts, method, draft, suppressed=(), suppressed_first=())
    banned = tuple({one.tokens[0] for one in usual if one.tokens} | {usual[0].tokens[1]})
    never = run(model, prompts, method, draft, suppressed=banned)
    assert all(not set(one.tokens) & set(banned) for one in never) and any(one.tokens for one in never)
    first = run(model, prompts, method, draft, suppressed=(), suppressed_first=banned)
    assert all(one.tokens[0] not in banned for one in first if one.tokens)
    if method not in ("sampling", "beam"):
        expected = run(model, prompts, "greedy", draft, suppressed_first=banned, suppressed=())
        assert [one.tokens for one in first] == [one.tokens for one in expected]
        assert any(set(one.tokens) & set(banned) for one in first), "what is only suppressed at first comes later"


def test_the_models_own_suppressed_tokens_count() -> None:
    model = formery.load(saved("whisper")[1])
    assert model.conventions.suppressed == (5, 6) and model.conventions.suppressed_first == (7, 2)
    logits = torch.zeros(64)
    settings = Settings(temperature=1.0, suppressed=frozenset((5, 6)), suppressed_first=frozenset((7, 2)))
    at_first, later = (probabilities(logits, [3], settings, first=first) for first in (True, False))
    assert at_first[[5, 6, 7, 2]].tolist() == [0] * 4 and float(at_first.sum()) == pytest.approx(1)
    assert later[[5, 6]].tolist() == [0] * 2 and bool((later[[7, 2]] > 0).all())


def test_several_end_tokens(tmp_path: Any) -> None:
    theirs, folder = saved("llama")
    theirs.save_pretrained(tmp_path)
    text = (tmp_path / "generation_config.json").read_text()
    prompts = [tokens(1, 6)[0].tolist()]
    [plain] = formery.generate(formery.load(folder), prompts, max_new_tokens=12)
    end = plain.tokens[5]
    (tmp_path / "generation_config.json").write_text(text.replace('"eos_token_id": 2', f'"eos_token_id": [2, {end}]'))
    model = formery.load(tmp_path)
    assert model.conventions.stop == (2, end)
    [ended] = formery.generate(model, prompts, max_new_tokens=12)
    assert ended.stop == "end" and ended.tokens == plain.tokens[: plain.tokens.index(end)]


def test_an_encoder_decoder_reads_its_forced_tokens_first() -> None:
    model = formery.load(saved("bart-forced")[1])
    assert isinstance(model, EncoderDecoder) and (model.start_token, model.prefix) == (2, (0,))
