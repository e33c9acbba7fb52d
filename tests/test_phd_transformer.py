"""Copies of tokens: masks against a loop, cached decoding against the pass that trains, and what is remembered."""

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from formery.errors import FormeryError
from formery.evidence.accounting import account
from formery.generate import generate
from formery.models import Decoder, load, save
from formery.models.compose import language_model
from formery.models.repeating import Repeating, repeating_model
from formery.parts import build
from formery.parts.copies import EveryCopy, HiddenDecoding, Repetition

VOCABULARY, TIME = 43, 26
RULES: dict[str, Repetition] = {
    "once": HiddenDecoding(1),
    "twice": HiddenDecoding(2),
    "three times": HiddenDecoding(3),
    "window": HiddenDecoding(3, 2),
    "chunks": HiddenDecoding(2, 4, 5),
    "long window": HiddenDecoding(2, 9, 6),
    "every copy": EveryCopy(3),
}


def model(rule: Repetition, width: int = 16) -> Repeating:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = repeating_model(VOCABULARY, width, 2, 2, 24, 200, rule).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(1.5)
    return made


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (3, TIME))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_says_what_the_paper_says(rule: Repetition) -> None:
    size = torch.arange(rule.repeats * 12)
    found = rule(torch.tensor(0), torch.tensor(0), size[:, None], size)
    for query in size.tolist():
        for key in size.tolist():
            (n, j), (m, i) = divmod(query, rule.repeats), divmod(key, rule.repeats)
            expected = (i == 0 and m < n) or (i <= j and m == n)
            if isinstance(rule, EveryCopy):
                expected = key <= query
            elif i > 0 and j > 0 and 0 < n - m <= rule.window:
                expected = rule.chunk is None or m // rule.chunk == n // rule.chunk
            assert bool(found[query, key]) == expected, (query, key)


def test_originals_compute_what_the_plain_model_does_with_tokens_so_far_apart(tokens: Tensor) -> None:
    once, thrice = model(HiddenDecoding(1)), model(HiddenDecoding(3, 4))
    state = thrice.start(3, TIME)
    with torch.no_grad():
        thrice.read(tokens, state)
        plain = once.start(3, TIME)
        once.read(tokens, plain, 3 * torch.arange(TIME).expand(3, TIME))
    for own, other in zip(plain.layers.values(), list(state.layers.values())[1:], strict=True):
        torch.testing.assert_close(own.keys, other.keys)  # type: ignore[attr-defined]
        torch.testing.assert_close(own.values, other.values)  # type: ignore[attr-defined]


def test_once_is_the_plain_model(tokens: Tensor) -> None:
    once = model(HiddenDecoding(1))
    plain = language_model(VOCABULARY, 16, 2, 2, 2, 24, 200).double().eval()
    plain.load_state_dict(once.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(once(tokens), plain(tokens))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_future_is_not_seen(rule: Repetition, tokens: Tensor) -> None:
    made, other = model(rule), tokens.clone()
    other[:, 12] = (other[:, 12] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = made(tokens), made(other)
    assert torch.equal(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12], after[:, 12])


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_cached_decoding_is_the_pass_from_scratch(rule: Repetition, tokens: Tensor) -> None:
    made = model(rule)
    whole, state = made(tokens), made.start(3, 4)
    pieces = tokens.split([7, 1, 1, 4, 1, 12], 1)
    torch.testing.assert_close(torch.cat([made.step(piece, state) for piece in pieces], 1), whole)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("prompt", [10, 11, 15])
@torch.no_grad()
def test_a_prefill_leaves_out_only_what_is_never_seen(rule: Repetition, prompt: int, tokens: Tensor) -> None:
    made = model(rule)
    whole, state = made(tokens), made.start(3, TIME)
    made.prefill(tokens[:, :prompt], state)
    found = [made.step(piece, state) for piece in tokens[:, prompt:].split([1, 2, TIME - prompt - 3], 1)]
    torch.testing.assert_close(torch.cat(found, 1), whole[:, prompt:])


def test_a_prefill_reads_copies_of_the_last_chunk_only(tokens: Tensor) -> None:
    def entries(rule: Repetition, prompt: int) -> int:
        made = model(rule)
        seen: list[int] = []
        made.layers[0].register_forward_hook(lambda part, given, result: seen.append(result.shape[1]))
        with torch.no_grad():
            made.prefill(tokens[:, :prompt], made.start(3, TIME))
        return seen[0]

    assert entries(HiddenDecoding(2), 22) == 22
    assert entries(HiddenDecoding(2, 4, 5), 22) == 22 + 2
    assert entries(HiddenDecoding(2, 4, 5), 20) == 20
    assert entries(HiddenDecoding(3, 4), 22) == 3 * 22


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_ragged_rows_taken_back_and_chosen(rule: Repetition, tokens: Tensor) -> None:
    made, draw = model(rule), random.Random(5)
    whole, state, read = made(tokens), made.start(3, 8), [0, 0, 0]
    for _ in range(40):
        counts = [min(draw.choice((0, 1, 1, 2, 5)), TIME - one) for one in read]
        if (time := max(counts)) > 0:
            rows, positions = torch.zeros(3, time, dtype=torch.long), torch.full((3, time), -1)
            for row, (begin, count) in enumerate(zip(read, counts, strict=True)):
                rows[row, :count] = tokens[row, begin : begin + count]
                positions[row, :count] = torch.arange(begin, begin + count)
            logits = made.step(rows, state, positions)
            for row, (begin, count) in enumerate(zip(read, counts, strict=True)):
                torch.testing.assert_close(logits[row, :count], whole[row, begin : begin + count])
        before, read = read, [begin + count for begin, count in zip(read, counts, strict=True)]
        if draw.random() < 0.6:  # as the loop does: no further than the latest pass
            read = [draw.randint(*pair) for pair in zip(before, read, strict=True)]
        state.rollback(read)
        if draw.random() < 0.3:
            rows = [draw.randrange(3) for _ in range(3)]
            state.select(rows)
            tokens, whole, read = tokens[rows], whole[rows], [read[row] for row in rows]
        if min(read) == TIME:
            read = [0, 0, 0]
            state.rollback(read)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@torch.no_grad()
def test_a_tree_of_drafts_is_settled(rule: Repetition, tokens: Tensor) -> None:
    made = model(rule)
    whole, state = made(tokens[:1]), made.start(1, TIME)
    made.step(tokens[:1, :8], state)
    #      8 ─┬─ x ── y        the path goes over the places 0, 3, 4
    #         └─ 9 ── 10
    wrong = (tokens[0, 9:11] + 1) % VOCABULARY
    read = torch.cat((tokens[0, 8:9], wrong, tokens[0, 9:11]))[None]
    positions = torch.tensor([[8, 9, 10, 9, 10]])
    visible = torch.zeros(1, 5, 13, dtype=torch.bool)
    visible[:, :, :8] = True
    for place, seen in enumerate(([0], [0, 1], [0, 1, 2], [0, 3], [0, 3, 4])):
        visible[0, place, [8 + one for one in seen]] = True
    logits = made.step(read, state, positions, visible)
    torch.testing.assert_close(logits[:, [0, 3, 4]], whole[:, 8:11])
    state.settle([[0, 3, 4]])
    assert state.lengths == [11]
    torch.testing.assert_close(made.step(tokens[:1, 11:14], state), whole[:, 11:14])


def test_forgotten_copies_take_no_bytes() -> None:
    plain = language_model(VOCABULARY, 16, 2, 2, 2, 24, 200).double()
    for length in (1, 30):
        bare = account(plain, length, 2).total
        assert account(model(HiddenDecoding(3)), length, 2).total == bare
        every = account(model(EveryCopy(3)), length, 2).total
        assert every > 2.9 * bare


def test_a_window_takes_bytes_that_do_not_grow() -> None:
    extra = []
    for length in (257, 1_025):  # the last token is read alone
        plain = language_model(VOCABULARY, 16, 2, 2, 2, 24, 2_000).double()
        windowed = repeating_model(VOCABULARY, 16, 2, 2, 24, 2_000, HiddenDecoding(3, 4)).double()
        extra.append(account(windowed, length).total - account(plain, length).total)
    assert extra == [(4 + 1) * 2 * (2 * 2 * 16 * 8 + 8)] * 2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_generation_does_not_depend_on_method_or_batch(rule: Repetition) -> None:
    made, draft = model(rule), model(HiddenDecoding(1))
    prompts = [[1, 2, 3, 1, 2], [4], [5, 6, 5, 6, 5, 6, 5, 6, 5]]
    alone = [generate(made, [one], max_new_tokens=14)[0].tokens for one in prompts]
    assert [one.tokens for one in generate(made, prompts, max_new_tokens=14)] == alone
    drafted = generate(made, prompts, "speculative-sampling:length=3", draft=draft, max_new_tokens=14)
    assert [one.tokens for one in drafted] == alone
    assert 0 < sum(one.accepted for one in drafted) < sum(one.drafted for one in drafted) or rule.repeats == 1
    guessed = generate(made, prompts, "parallel-jacobi-decoding", max_new_tokens=14)
    assert [one.tokens for one in guessed] == alone


def test_a_checkpoint_comes_back(tmp_path: object, tokens: Tensor) -> None:
    made = model(RULES["chunks"]).float()
    save(made, f"{tmp_path}/model")
    again = load(f"{tmp_path}/model")
    assert again.describe() == made.describe() == build(made.describe()).describe()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens), made(tokens))


def test_gradients_reach_all_weights(tokens: Tensor) -> None:
    made: Decoder = model(RULES["chunks"]).train()
    made(tokens).sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in made.parameters())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "too far back": (lambda: _too_far(HiddenDecoding(2, 3)), "row 0 cannot be taken back to 6 tokens"),
    "dropped": (lambda: _dropped(HiddenDecoding(2, 3)), "none can be dropped"),
    "some layers": (lambda: model(HiddenDecoding(2)).context(1, model(HiddenDecoding(2)).start(1, 4)), "several times"),
    "half a rule": (lambda: build({**model(HiddenDecoding(2)).describe(), "rule": {"part": "EveryCopy", "repeats": 2}}),
                    "must follow the rule"),
    "no repeats": (lambda: build({"part": "HiddenDecoding", "repeats": 0}), "0 repeats"),
}  # fmt: skip


@torch.no_grad()
def _too_far(rule: Repetition) -> None:
    made, state = model(rule), model(rule).start(1, 20)
    state = made.start(1, 20)
    for _ in range(4):
        made.step(torch.ones(1, 4, dtype=torch.long), state)
    state.rollback([14])
    state.rollback([6])


@torch.no_grad()
def _dropped(rule: Repetition) -> None:
    made = model(rule)
    state = made.start(1, 20)
    made.step(torch.ones(1, 4, dtype=torch.long), state)
    state.keep(torch.tensor([[True, False, True, True]]))


@pytest.mark.parametrize(("run", "sentence"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_told(run: Callable[[], object], sentence: str) -> None:
    with pytest.raises(FormeryError, match=sentence):
        run()
