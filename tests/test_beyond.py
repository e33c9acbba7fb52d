"""What models that read beyond a window hold to: the decoder's own logits within it; one text, however it is read."""

from collections.abc import Callable
from pathlib import Path

import beyond
import pytest
import torch
from beyond import WINDOW
from generation import decoder, from_scratch

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.generate import Settings, generate
from formery.models import load, save
from formery.models.beyond import Beyond
from formery.parts import Alibi, Rotary, build
from formery.parts.chunks import Chunks

MAKERS: dict[str, Callable[[], Beyond]] = {"focusllm": beyond.focus, "sharedllm": beyond.share}
TEXT = torch.randint(97, (3, 37), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=list(MAKERS))
def model(request: pytest.FixtureRequest) -> Beyond:
    torch.manual_seed(1)
    return MAKERS[request.param]()


@pytest.mark.parametrize("length", [1, 7, WINDOW])
@pytest.mark.parametrize("inference", [True, False])
def test_within_the_window_it_is_the_decoder_bit_for_bit(model: Beyond, length: int, inference: bool) -> None:
    with torch.inference_mode(inference):
        assert torch.equal(model(TEXT[:, :length]), model.decoder(TEXT[:, :length]))
    read = model.step(TEXT[:, :length], model.start(3, length))
    torch.testing.assert_close(read, model.decoder(TEXT[:, :length]))


def test_behind_it_the_past_counts(model: Beyond) -> None:
    other = TEXT.clone()
    other[:, 0] = (other[:, 0] + 1) % 97
    with torch.no_grad():
        assert (model(TEXT)[:, -1] - model(other)[:, -1]).abs().max() > 1e-4


def test_no_token_sees_what_comes_after_it(model: Beyond) -> None:
    other = TEXT.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 97
    with torch.no_grad():
        torch.testing.assert_close(model(other)[:, :30], model(TEXT)[:, :30])


@pytest.mark.parametrize("pieces", [[37], [1] * 37, [3, 14, 2, 1, 10, 7]])
def test_a_state_gives_what_a_pass_from_scratch_gives(model: Beyond, pieces: list[int]) -> None:
    with torch.inference_mode():
        state = model.start(3, 5)
        found = torch.cat([model.step(piece, state) for piece in TEXT.split(pieces, 1)], 1)
        torch.testing.assert_close(found, model(TEXT), atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model.logits(model.stretch(TEXT, 29)), model(TEXT)[:, 29:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("back", [35, 26, 9])
def test_what_is_taken_back_leaves_no_trace(model: Beyond, back: int) -> None:
    """Also where the new text has other chunks, or fewer of them, than what was taken back."""
    other = (TEXT + 13) % 97
    with torch.inference_mode():
        state = model.start(3, 37)
        model.step(TEXT, state)
        state.rollback([back] * 3)
        found = model.step(other[:, : 37 - back], state)
        wanted = model(torch.cat((TEXT[:, :back], other[:, : 37 - back]), 1))[:, back:]
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_rows_of_unequal_length_are_taken_back_and_chosen_apart(model: Beyond) -> None:
    lengths = [37, 12, 30]
    positions = torch.full((3, 37), -1)
    for row, length in enumerate(lengths):
        positions[row, :length] = torch.arange(length)
    with torch.inference_mode():
        state = model.start(3, 37)
        model.step(TEXT, state, positions)
        state.rollback(lengths)
        state.settle([list(range(33)), list(range(12)), list(range(25))])
        state.select([2, 0, 0])
        assert state.lengths == [25, 33, 33]
        found = model.step(TEXT[:, :3], state)
        for row, (old, length) in enumerate([(2, 25), (0, 33), (0, 33)]):
            whole = torch.cat((TEXT[old, :length], TEXT[row, :3]))[None]
            torch.testing.assert_close(found[row], model(whole)[0, -3:], atol=2e-5, rtol=1e-4)
        left = positions.flip(1).sort(1).values
        tokens = torch.stack([row.roll(37 - length) for row, length in zip(TEXT, lengths, strict=True)])
        padded = model(tokens, left)
        torch.testing.assert_close(padded[1, -12:], model(TEXT[1:2, :12])[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["greedy", "aggressive-decoding"])
def test_generating_in_batches_writes_what_each_prompt_gets_alone(model: Beyond, name: str) -> None:
    prompts = [TEXT[0, :21].tolist(), TEXT[1, :5].tolist(), TEXT[2, :15].tolist()]
    asked = Settings(max_new_tokens=12)
    wanted = [from_scratch(model, prompt, asked)[0] for prompt in prompts]
    assert [one.tokens for one in generate(model, prompts, name, max_new_tokens=12)] == wanted


def test_it_is_what_it_describes(model: Beyond, tmp_path: Path) -> None:
    twin = build(model.describe())
    assert isinstance(twin, Beyond) and twin.describe() == model.describe()
    save(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(TEXT), model(TEXT))


def test_its_state_holds_what_it_says(model: Beyond) -> None:
    found = account(model, 37)
    assert found.total > found.layers[0] > 37 * 8
    shorter = account(model, 31)
    assert found.total > shorter.total


def test_the_decoder_does_not_learn(model: Beyond) -> None:
    model.logits(model.behind(TEXT, 24)).square().mean().backward()
    assert all(one.grad is None for one in model.decoder.parameters())
    unmoved = {name for name, one in model.named_parameters() if one.grad is None and not name.startswith("decoder.")}
    # What comes behind the keys and values of the highest of these layers is read by nobody.
    assert all(name.startswith(("candidates.2.", "lower.layers.1.")) for name in unmoved)
    assert not any(".key." in name or ".value." in name for name in unmoved)


def test_what_it_cannot_do_it_says(model: Beyond) -> None:
    state = model.start(1, 8)
    with pytest.raises(FormeryError, match="chains, not trees"):
        model.step(TEXT[:1, :2], state, visible=torch.ones(1, 2, 2, dtype=torch.bool))
    with pytest.raises(FormeryError, match="does not go on"):
        model.step(TEXT[:1, :2], state, torch.tensor([[4, 5]]))
    with pytest.raises(FormeryError, match="packed segments"):
        model(TEXT, segments=torch.zeros_like(TEXT))
    with pytest.raises(FormeryError, match="lends its layers"):
        _ = model.layers
    state = model.start(1, 8)
    model.step(TEXT[:1, :5], state)
    with pytest.raises(FormeryError, match="cannot lose single tokens"):
        state.keep(torch.tensor([[True, False, True, True, True]]))
    with pytest.raises(FormeryError, match="only its beginning"):
        state.settle([[0, 2]])


@pytest.mark.parametrize("inner", [decoder(), decoder(Alibi()), decoder(Rotary(), max_length=8)])
def test_decoders_of_another_kind_are_refused(inner: object) -> None:
    with pytest.raises(FormeryError, match="rotary|fewer than the window"):
        Beyond(inner, WINDOW, 4, 2)  # type: ignore[arg-type,abstract]


@pytest.mark.parametrize("sizes", [(16, 5, 1), (16, 0, 1), (16, 4, 5), (16, 4, 0)])
def test_chunks_must_fit_the_window(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(FormeryError, match="chunks of"):
        Chunks(*sizes)


def test_a_text_is_cut_where_what_is_near_changes() -> None:
    chunks = Chunks(16, 4, 3)
    assert list(chunks.stretches(0, 30)) == [(0, 16), (16, 20), (20, 24), (24, 28), (28, 30)]
    assert [chunks.start(at) for at in (0, 15, 16, 19, 20, 29)] == [0, 0, 8, 8, 12, 20]
    assert all(at - chunks.start(at) < 12 for at in range(16, 99))
