"""TidalDecode: full attention where the budget holds all, reading the chosen alone, which layers choose."""

import pytest
import torch
from generation import decoder, model
from test_selection import POSITIONS, PROMPTS
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.recalling import Due, answers, carried, continued, read
from formery.generate import generate
from formery.methods.attention.comparing import common, whole
from formery.methods.attention.tidaldecode import Choosing, Following, reads, tidal
from formery.models import Decoder
from formery.parts import Attention, KeyValues, Position, Rotary, build


def made(position: Position | None = None, layers: int = 6) -> Decoder:
    one = decoder(position or Rotary(), layers=layers, key_value_heads=2).eval()
    one.compiled = False
    return one


@pytest.mark.parametrize("position", POSITIONS)
def test_a_budget_for_everything_writes_the_tokens_of_full_attention(position: type[Position]) -> None:
    full = made(position())
    expected = [one.tokens for one in generate(full, PROMPTS, max_new_tokens=8)]
    assert [one.tokens for one in generate(full, PROMPTS, "tidaldecode:budget=64", max_new_tokens=8)] == expected
    small = [one.tokens for one in generate(full, PROMPTS, "tidaldecode", budget=2, max_new_tokens=8)]
    assert small != expected
    alone = [generate(full, [one], "tidaldecode:budget=2", max_new_tokens=8)[0].tokens for one in PROMPTS]
    assert small == alone


def test_prompts_are_read_with_full_attention() -> None:
    full = made()
    sparse, tokens = tidal(full, 1), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        own = sparse.read(tokens[:, :-1], sparse.begin([PROMPTS[0]], 40)[0])
        assert torch.equal(own, full.read(tokens[:, :-1], full.begin([PROMPTS[0]], 40)[0]))


def test_layers_by_their_number() -> None:
    kinds = [type(part) for part in tidal(made(), 4).modules() if isinstance(part, Attention | Choosing | Following)]
    assert [kind.__name__ for kind in kinds if kind is not Attention] == [
        "Choosing",
        "Following",
        "Choosing",
        "Following",
    ]
    last = [type(part) for part in tidal(made(), 4, 2).modules() if isinstance(part, Choosing | Following)]
    assert last == [Choosing, Following, Following, Following]


def test_a_token_is_what_the_formula_says() -> None:
    """Written out layer by layer with masks of what was chosen."""
    full = made().double()
    sparse, prompt = tidal(full, 3, again=4), PROMPTS[0]
    with torch.no_grad():
        state, _ = sparse.begin([prompt], 40)
        sparse.read(torch.tensor([prompt[:-1]]), state)
        logits = sparse.step(torch.tensor([prompt[-1:]]), state)[0, 0]

        plain = full.start(1, 40)
        full.read(torch.tensor([prompt[:-1]]), plain)
        known = [plain.of(part) for part in full.modules() if isinstance(part, Attention)]
        context = full.context(1, plain)
        hidden = full.embedding(torch.tensor([prompt[-1:]]), context)
        seen = [list(range(len(prompt)))] * 2
        for number, (layer, memory) in enumerate(zip(full.layers, known, strict=True)):
            attention, feedforward = layer.sublayers  # type: ignore[union-attr, misc]
            normed, part = attention.norm(hidden), attention.inner

            def turned(vectors: Tensor, heads: int) -> Tensor:
                return full_rotary(part, vectors.view(1, 1, heads, -1), context)[0, 0]  # noqa: B023

            assert isinstance(memory, KeyValues)
            memory.keys[0, len(prompt) - 1] = turned(part.key(normed), 2)
            memory.values[0, len(prompt) - 1] = part.value(normed).view(2, -1)
            query, mixed, chosen = turned(part.query(normed), 4), [], []
            for group in range(2):
                keys, values = memory.keys[0, : len(prompt), group], memory.values[0, : len(prompt), group]
                scores = query[2 * group : 2 * group + 2] @ keys.T * part.dim**-0.5
                chosen.append(scores.softmax(-1).sum(0).topk(3).indices.tolist())
                places = seen[group] if number in (3, 5) else range(len(prompt))
                mixed.append(scores[:, [*places]].softmax(-1) @ values[[*places]])
            seen = chosen if number in (2, 4) else seen
            hidden = hidden + part.output(torch.cat(mixed).view(1, 1, -1))
            hidden = feedforward(hidden, context)
        assert full.norm is not None
        assert torch.allclose(full.logits(full.norm(hidden))[0, 0], logits, atol=1e-9)


def full_rotary(part: Attention, vectors: Tensor, context: object) -> Tensor:
    assert part.position is not None
    return part.position.rotate(vectors, context)  # type: ignore[arg-type]


def test_what_is_not_chosen_is_not_read() -> None:
    sparse, prompt = tidal(made(), 3, again=2), PROMPTS[0]
    with torch.no_grad():
        state, _ = sparse.begin([prompt], 40)
        sparse.read(torch.tensor([prompt[:-1]]), state)
        expected = sparse.step(torch.tensor([prompt[-1:]]), state)
        state.rollback([len(prompt) - 1])
        follower = next(part for part in sparse.modules() if isinstance(part, Following))
        memory = state.of(follower.attention)
        assert isinstance(memory, KeyValues)
        kept = 0
        for slot in range(len(prompt) - 1):
            for group in range(2):
                before = memory.keys[0, slot, group].clone()
                memory.keys[0, slot, group] = float("nan")
                found = sparse.step(torch.tensor([prompt[-1:]]), state)
                state.rollback([len(prompt) - 1])
                if bool(found.isnan().any()):
                    memory.keys[0, slot, group] = before
                    kept += 1
        assert torch.equal(sparse.step(torch.tensor([prompt[-1:]]), state), expected)
        assert kept <= 2 * 3


def test_a_pass_over_several_tokens_and_taking_them_back() -> None:
    sparse, prompt = tidal(made(), 4), PROMPTS[1]
    written = generate(made(), [prompt], "tidaldecode:budget=4", max_new_tokens=6)[0].tokens
    row = torch.tensor([prompt + written])
    with torch.no_grad():
        once = sparse.step(row, sparse.begin([prompt], 64)[0])[:, len(prompt) - 1 :]
        state, _ = sparse.begin([prompt], 4)
        sparse.read(row[:, : len(prompt) - 1], state)
        assert torch.allclose(sparse.step(row[:, len(prompt) - 1 :], state), once, atol=1e-5)
        state.rollback([len(prompt) + 1])
        state.select([0, 0])
        assert torch.allclose(sparse.step(row[:, len(prompt) + 1 :].expand(2, -1), state)[1:], once[:, 2:], atol=1e-5)


def test_described_and_built_again() -> None:
    sparse = tidal(made(), 5)
    assert build(sparse.describe()).describe() == sparse.describe()


def test_what_it_refuses() -> None:
    with pytest.raises(FormeryError, match="at least 1 token"):
        generate(made(), [[1, 2]], "tidaldecode:budget=0")
    with pytest.raises(FormeryError, match="go from 2 to 5"):
        generate(made(), [[1, 2]], "tidaldecode:again=6")
    with pytest.raises(FormeryError, match="for decoders"):
        generate(model("translator"), [[1, 2]], "tidaldecode")
    shared = made(layers=4)
    shared.layers[3] = shared.layers[2]
    with pytest.raises(FormeryError, match="runs the same attention"):
        generate(shared, [[1, 2]], "tidaldecode")


def test_a_model_of_few_layers_is_left_as_it_is() -> None:
    few = made(layers=2)
    expected = generate(few, PROMPTS, max_new_tokens=5)
    assert [one.tokens for one in generate(few, PROMPTS, "tidaldecode:budget=1", max_new_tokens=5)] == [
        one.tokens for one in expected
    ]


def test_variants_share_what_was_read_once() -> None:
    full, due = made(), Due("text", PROMPTS[0], PROMPTS[1][:5])
    reader, sparse = whole(full), tidal(full, 3)
    shared = list(answers(reader, [reader, sparse, reader], due))
    own = continued(sparse, read(sparse, due), due)
    assert shared[1].losses == pytest.approx(own.losses) and shared[0] == shared[2] != shared[1]
    state = read(reader, due)
    assert carried(state, reader, sparse).slots is state.slots
    found = common(full, reader, due, 30, 2)
    assert set(found.values()) == {1.0} and len(found) == 8


def test_what_is_read() -> None:
    assert reads("full attention", 512, 6) == 1
    assert reads("tidaldecode, 64", 512, 6) == pytest.approx((4 + 2 / 8) / 6)
    assert reads("pages, 64", 512, 6) == pytest.approx((2 + 4 * (1 / 8 + 1 / 16)) / 6)
