"""FocusLLM against its definition, token by token and chunk by chunk; what it is trained on."""

import pytest
import torch
from beyond import WINDOW, base, focus
from jaxtyping import Float
from torch import Tensor, nn

from formery.errors import FormeryError
from formery.methods.cache.focusllm import FocusLLM, continuation_and_repetition, focused
from formery.methods.cache.short_window import repeated
from formery.parts import Attention, Context
from formery.parts.steered import placed, projected, through


def attended(query: Tensor, keys: Tensor, values: Tensor) -> Float[Tensor, "heads dim"]:
    """One query [head, dim] over keys and values [slot, group, dim]."""
    times = query.shape[0] // keys.shape[1]
    keys, values = keys.repeat_interleave(times, 1), values.repeat_interleave(times, 1)
    weights = (torch.einsum("hd,shd->hs", query, keys) * query.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, values)


def candidate(model: FocusLLM, chunk: Tensor, near: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each layer the key (not turned) and value of the last token of `chunk` and `near`, read as one text."""
    own, said = dict(zip(model.attentions, model.candidates, strict=True)), []
    at = torch.arange(len(chunk) + len(near))[None]

    def mix(attention: Attention, hidden: Tensor) -> Tensor:
        last = own[attention]
        assert isinstance(last, Attention)
        parts = zip(projected(attention, hidden[:, :-1]), projected(last, hidden[:, -1:]), strict=True)
        query, key, value = (torch.cat(pair, 1) for pair in parts)
        said.append((key[0, -1], value[0, -1]))
        query, key = placed(attention, query, at), placed(attention, key, at)
        mixed = [attended(query[0, i], key[0, : i + 1], value[0, : i + 1]) for i in range(at.shape[1])]
        rows = torch.stack(mixed).flatten(-2)
        return torch.cat((attention.output(rows[:-1]), last.output(rows[-1:])))[None]

    model_of = model.embedding(torch.cat((chunk, near))[None], Context(at))
    for layer in model.decoder.layers:
        model_of = through(layer, model_of, Context(at), mix)
    return said


def definition(model: FocusLLM, tokens: Tensor) -> Tensor:
    """The logits after the last token."""
    start = model.chunks.start(len(tokens) - 1)
    chunks, near = tokens[:start].split(model.chunk), tokens[start:]
    said = [[candidate(model, chunk, near[: i + 1]) for chunk in chunks] for i in range(len(near))]
    at, places = len(chunks) + torch.arange(len(near))[None], torch.arange(len(chunks))[None]
    depth = 0

    def mix(attention: Attention, hidden: Tensor) -> Tensor:
        nonlocal depth
        query, key, value = projected(attention, hidden)
        query, key = placed(attention, query, at), placed(attention, key, at)
        mixed = []
        for i in range(len(near)):
            keys = placed(attention, torch.stack([one[depth][0] for one in said[i]])[None], places)[0]
            values = torch.stack([one[depth][1] for one in said[i]])
            mixed.append(
                attended(query[0, i], torch.cat((keys, key[0, : i + 1])), torch.cat((values, value[0, : i + 1])))
            )
        depth += 1
        return attention.output(torch.stack(mixed).flatten(-2))[None]

    hidden = model.embedding(near[None], Context(at))
    for layer in model.decoder.layers:
        hidden = through(layer, hidden, Context(at), mix)
    assert model.norm is not None
    return model.output(model.norm(hidden))[0, -1]


@pytest.mark.parametrize("key_value_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [WINDOW + 1, 29, 32])
def test_it_is_its_definition(key_value_heads: int, length: int) -> None:
    model = focus(key_value_heads).double()
    tokens = torch.randint(97, (length,))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[None])[0, -1], definition(model, tokens), atol=1e-9, rtol=1e-9)


def test_candidates_begin_as_copies() -> None:
    """Then a candidate is what the decoder itself makes of the last token behind the chunk."""
    model = focused(base(), WINDOW, 4)
    for attention, candidate_ in zip(model.attentions, model.candidates, strict=True):
        for own, copied in zip(attention.parameters(), candidate_.parameters(), strict=True):
            assert torch.equal(own, copied) and own is not copied and copied.requires_grad and not own.requires_grad


def test_pieces_that_are_repeated_are_of_the_past() -> None:
    tokens = torch.arange(60).reshape(2, 30)
    again = repeated(tokens, 16, 12, step=3)
    assert again.shape == (2, 29) and torch.equal(again[:, :16], tokens[:, :16])
    for row in range(2):
        first = int(again[row, 16]) - 30 * row
        assert first >= 0 and torch.equal(again[row, 16:], tokens[row, first : first + 13]) and first + 13 <= 17
    assert not torch.equal(again, repeated(tokens, 16, 12, step=4))


def test_training_teaches_the_candidates() -> None:
    model, draw = focus(), torch.Generator().manual_seed(2)
    tokens = torch.randint(97, (4, 33), generator=draw)
    answers = torch.zeros_like(tokens, dtype=torch.bool)
    answers[2:, -4:] = True
    batch = {"tokens": tokens, "answers": answers, "step": torch.tensor(0)}
    before = [one.clone() for one in model.decoder.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    costs = []
    for _ in range(12):
        cost = continuation_and_repetition(model, batch)
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        costs.append(cost.item())
    assert costs[-1] < costs[0] - 0.1
    assert all(torch.equal(own, old) for own, old in zip(model.decoder.parameters(), before, strict=True))


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(FormeryError, match="two more behind it"):
        focused(base(), WINDOW, 8)
    inner = base()
    with pytest.raises(FormeryError, match="do not fit 3 layers"):
        FocusLLM(inner, WINDOW, 4, [nn.Module()])  # type: ignore[list-item]
