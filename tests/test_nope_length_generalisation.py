"""Positions without being told any: the construction counts; divergences, tasks and ranks are what they say."""

import random
from itertools import product

import pytest
import torch

from formery.data.sequences import MAKERS, SYMBOLS, TOKENS, Sequences, carries, steps
from formery.errors import FormeryError
from formery.generate.run import generate
from formery.methods.position.counting import counting
from formery.methods.position.nope_length_generalisation import Outcome, between_heads, divergence, ranks
from formery.methods.position.schemes import SCHEMES, SCRATCHPADS, TRAINED, model
from formery.models.attention_maps import attention_maps
from formery.parts import Alibi, Context, build


@torch.no_grad()
def test_the_first_layer_counts_whatever_the_tokens_are() -> None:
    own = counting(20, 0, 64).double()
    tokens = torch.cat((torch.zeros(3, 1, dtype=torch.long), torch.randint(1, 20, (3, 63))), 1)
    found = own.hidden(tokens)[..., 3]
    torch.testing.assert_close(found, torch.arange(1, 65).double().expand(3, -1), rtol=0, atol=1e-12)


@torch.no_grad()
def test_without_a_sign_at_the_beginning_there_is_nothing_to_count() -> None:
    own = counting(20, 0, 16).double()
    tokens = torch.randint(1, 20, (1, 16))
    assert own.hidden(tokens)[0, :, 3].std() == 0


@torch.no_grad()
def test_the_second_layer_attends_as_alibi_does() -> None:
    slope = 2**-8  # of a single head
    own = counting(20, 0, 12, slope).double()
    tokens = torch.tensor([[0, *range(1, 12)]])
    bias = Alibi().bias(1, Context(torch.arange(12)[None], even=True))[0, 0].double()
    wanted = bias.masked_fill(~torch.ones(12, 12, dtype=torch.bool).tril(), float("-inf")).softmax(-1)
    maps, _ = attention_maps(own, tokens)
    torch.testing.assert_close(maps[1][0, 0], wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(own(tokens)[0, :, 4], wanted[:, 0], rtol=0, atol=1e-12)


def test_a_count_below_two_is_refused() -> None:
    with pytest.raises(FormeryError, match="at least 2"):
        counting(5, 0, 1)


def test_divergence_is_that_of_the_formula() -> None:
    p, q = (torch.rand(4, 6, dtype=torch.float64).softmax(-1) for _ in range(2))
    m = (p + q) / 2
    wanted = ((p * (p / m).log2()).sum(-1) + (q * (q / m).log2()).sum(-1)) / 2
    torch.testing.assert_close(divergence(p, q), wanted)
    torch.testing.assert_close(divergence(p, q), divergence(q, p))
    one, other = torch.eye(3, dtype=torch.float64)[:2]
    assert divergence(one, one) == 0
    assert divergence(one, other) == 1  # nothing in common


def test_every_pair_of_heads_is_compared() -> None:
    first, second = ([torch.rand(2, heads, 5, 5).softmax(-1) for _ in range(2)] for heads in (3, 4))
    found = between_heads(first, second)
    assert found.shape == (2, 3, 4)
    for layer, one, other in product(range(2), range(3), range(4)):
        wanted = divergence(first[layer][:, one], second[layer][:, other]).mean()
        torch.testing.assert_close(found[layer, one, other], wanted)
    same = between_heads(first, first)
    assert same.diagonal(dim1=1, dim2=2).abs().max() < 1e-6


@pytest.mark.parametrize("task", MAKERS)
def test_answers_are_right(task: str) -> None:
    draw = random.Random(1)
    for length in (1, 2, 7, 12):
        asked, answer = MAKERS[task](length, draw)
        if task == "copy":
            assert answer == asked
        elif task == "reverse":
            assert answer[::-1] == asked
        elif task == "sort":
            assert answer == sorted(asked)
        else:
            first, second = "".join(asked).split("+")
            assert len(first) == len(second) == length
            total = answer[len(answer) - 1 - answer[::-1].index("=") + 1 :] if "=" in answer else answer
            assert int("".join(total), 2) == int(first, 2) + int(second, 2)
            assert len(total) == length + 1


def test_scratchpads_note_each_digit_from_the_last() -> None:
    asked = list("01+11")  # 1 + 3 = 4
    assert " ".join(carries(asked)) == "0 1 ; 0 1 ;"
    assert " ".join(steps(asked)) == "1 1 0 > 0 1 ; 0 1 1 > 0 1 ;"


def test_rows_are_framed_and_what_is_due_is_marked() -> None:
    batch = Sequences("copy", 1, 5, 16, seed=3).batch(7)
    again = Sequences("copy", 1, 5, 16, seed=3).batch(7)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["tokens"], Sequences("copy", 1, 5, 16, seed=4).batch(7)["tokens"])
    lengths = set()
    for tokens, due in zip(batch["tokens"], batch["answers"], strict=True):
        row = [SYMBOLS[token] for token in tokens]
        asked = row[2 : row.index("=")]
        lengths.add(len(asked))
        assert row[:2] == ["<bos>", "copy"]
        assert [SYMBOLS[token] for token in tokens[due]] == [*asked, "<eos>"]
        assert all(symbol == "<eos>" for symbol in row[2 * len(asked) + 3 :])
    assert lengths == {1, 2, 3, 4, 5}


def test_bad_tasks_and_lengths_are_refused() -> None:
    with pytest.raises(FormeryError, match="copy"):
        Sequences("copi", 1, 5, 4)
    for shortest, longest, rows in ((0, 5, 4), (3, 2, 4), (1, 5, 0)):
        with pytest.raises(FormeryError, match="cannot be made"):
            Sequences("copy", shortest, longest, rows)
    with pytest.raises(FormeryError, match="nope"):
        model("nop")


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_every_scheme_decodes_as_from_scratch(scheme: str) -> None:
    own = model(scheme).eval()
    prompts = [[TOKENS["<bos>"], 7 + row, 9, 12][: 2 + row % 3] for row in range(4)]
    found = generate(own, prompts, max_new_tokens=8, stop_tokens=[])
    for prompt, one in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(own(torch.tensor([tokens]))[0, -1].argmax()))
        assert one.tokens == tokens[len(prompt) :]
    twin = build(own.describe())
    assert twin.describe() == own.describe()


def test_only_nope_is_told_no_position() -> None:
    """Without the first token's sign and with one layer's view, order of what came before makes no difference."""
    tokens = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 8, 6, 9]])
    for scheme in SCHEMES:
        torch.manual_seed(1)
        own = model(scheme).double()
        own.layers = own.layers[:1]
        first, second = own(tokens)[:, -1]
        assert torch.allclose(first, second) == (scheme == "nope"), scheme


def test_ranks_share_places() -> None:
    assert ranks([0.5, 0.9, 0.5, 0.1]) == [2.5, 1.0, 2.5, 4.0]
    assert ranks([0.0, 0.0, 0.0]) == [2.0, 2.0, 2.0]


def outcome(best: str) -> Outcome:
    def answers(scheme: str, task: str) -> dict[str, float]:
        return {"exact, longer": {best: 0.9, "t5": 0.5}.get(scheme, 0.1) + (task == "add-steps") * 0.2}

    tasks = (*TRAINED, *SCRATCHPADS)
    return Outcome(
        (0, 1),
        {(scheme, task, seed): answers(scheme, task) for scheme in SCHEMES for task in tasks for seed in (0, 1)},
        {
            (task, seed): {f"nearest, {one}": 0.1 if one == "t5" else 0.3 for one in SCHEMES[1:]}
            for task in TRAINED
            for seed in (0, 1)
        },
    )


def test_an_outcome_tells_who_is_ahead() -> None:
    found = outcome("nope")
    assert found.rank("nope") == [1.0, 1.0]
    assert found.ahead("nope", ["t5"]) == [1.0, 1.0]
    assert found.ahead("t5", ["rotary", "alibi"]) == [2.5, 2.5]
    assert outcome("rotary").ahead("nope", ["t5", "rotary"]) == [-3.5, -3.5]
    assert found.nearer() == pytest.approx([0.2, 0.2])
    assert found.gain("nope", "add-steps") == pytest.approx([0.2, 0.2])
    assert found.gain("t5", "add-carries") == [0.0, 0.0]
