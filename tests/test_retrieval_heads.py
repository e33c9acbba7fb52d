"""Heads recorded, scored and cut: against formulas, models whose heads are known, and the model without the heads."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from generation import KINDS, decoder, model, translator

from formery.data.long import Long, Question
from formery.data.tokenizer import Tokenizer, train_bpe
from formery.errors import FormeryError
from formery.files import atomic_write
from formery.generate.run import generate
from formery.methods.lens import retrieval_heads
from formery.methods.lens.needles import rows, with_needle
from formery.methods.lens.picture import picture
from formery.methods.lens.retrieval_heads import (
    answered,
    copied,
    likeness,
    ranked,
    scores,
)
from formery.models import Decoder
from formery.models.attention_maps import attending, attention_maps, heads, without
from formery.models.quantise import quantise
from formery.parts import Alibi, Attention, Context, Embedding, Layer, Output, Part, Rotary, build
from formery.parts.native import using

WORDS = "river stone house water light paper music horse garden winter note copy ask again is the old tale goes on"
NEAR = Question("recall", " the old tale note: river is stone. note: house is water. ask: river is", " stone", 9)
LISTED = Question("copy", " copy: river stone house. the old tale copy: light paper. again: river", " stone house", 7)
DECODERS = [kind for kind in KINDS if kind != "translator"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Each word is a token."""
    return train_bpe([f" {WORDS} : . " * 50], 400)


@pytest.fixture
def told(tokenizer: Tokenizer) -> Decoder:
    made = decoder(Rotary(), vocabulary=tokenizer.vocabulary_size).eval()
    made.tokenizer = tokenizer
    return made


class Copier(Part):
    """Two heads: the first looks at the token whose predecessor is this one, the second at itself; it says what the
    first one sees.

    Works on vectors that hold the token's own number, and its predecessor's.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.inner = Attention(2 * width, 2, head_width=width, scale=50.0)
        for one in (self.inner.query, self.inner.key, self.inner.value, self.inner.output):
            torch.nn.init.zeros_(one.weight)
        unit = torch.eye(width)
        with torch.no_grad():
            self.inner.query.weight[:width, :width] = self.inner.query.weight[width:, :width] = unit
            self.inner.key.weight[:width, width:] = self.inner.key.weight[width:, :width] = unit
            self.inner.value.weight[:width, :width] = unit
            self.inner.output.weight[:width, :width] = unit

    def forward(self, hidden: torch.Tensor, context: Context) -> torch.Tensor:
        before = torch.cat((torch.zeros_like(hidden[:, :1]), hidden[:, :-1]), 1)
        return self.inner(torch.cat((hidden, before), -1), context)[..., : self.width]


@torch.no_grad()
def copier(tokenizer: Tokenizer) -> Decoder:
    """A model that writes what followed the same token before, by its very first head."""
    width = tokenizer.vocabulary_size
    embedding, output = Embedding(width, width), Output(width, width)
    embedding.weight.copy_(torch.eye(width))
    output.map.weight.copy_(torch.eye(width))
    made = Decoder(embedding, [Layer([Copier(width)])], None, output).eval()
    made.tokenizer = tokenizer
    return made


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_maps_are_those_of_the_formula(kind: str) -> None:
    own = model(kind).double()
    tokens = torch.randint(97, (2, 11))
    maps, logits = attention_maps(own, tokens)
    torch.testing.assert_close(logits, own(tokens))
    context = Context(torch.arange(11).expand(2, 11), even=True)
    hidden = own.embedding(tokens, context)
    for layer, found in zip(own.layers, maps, strict=True):
        attention = layer.sublayers[0]
        part, normed = attention.inner, attention.norm(hidden)
        query = part.query(normed).view(2, 11, part.heads, part.dim)
        key = part.key(normed).view(2, 11, part.groups, part.dim)
        position, bias = part.position, None
        if position is not None:
            query, key = position.rotate(query, context), position.rotate(key, context)
            bias = position.bias(part.heads, context)
        key = key.repeat_interleave(part.heads // part.groups, 2)
        score = torch.einsum("bqhd,bkhd->bhqk", query, key) * part.dim**-0.5 + (0 if bias is None else bias)
        allowed = context.visibility(part.mask, part.heads).tensor(11, 11, tokens.device)
        torch.testing.assert_close(found, score.masked_fill(~allowed, float("-inf")).softmax(-1))
        hidden = layer(hidden, context)


@torch.no_grad()
def test_places_choose_queries_and_nobody_listens_afterwards() -> None:
    own = model("rotary")
    tokens = torch.randint(97, (1, 9))
    every, logits = attention_maps(own, tokens)
    some, few = attention_maps(own, tokens, [8, 3])
    for one, other in zip(every, some, strict=True):
        assert torch.equal(one[:, :, [8, 3]], other)
    torch.testing.assert_close(few, logits[:, [8, 3]])
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in own.modules())


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_a_cut_is_a_zero_where_the_output_map_reads_the_head(kind: str) -> None:
    own = model(kind)
    cut = [(0, 1), (1, 0), (1, 3)]
    tokens = torch.randint(97, (2, 13))

    def zeroed(layer: int):
        def hook(part, inputs):
            mixed = inputs[0].clone()
            for number, head in cut:
                if number == layer:
                    mixed[..., head * 8 : (head + 1) * 8] = 0
            return (mixed,)

        return hook

    with using(False):
        before = own(tokens)
        found = without(own, cut)(tokens)
        assert torch.equal(own(tokens), before)  # the model itself is as it was
        hooks = [part.output.register_forward_pre_hook(zeroed(i)) for i, part in enumerate(attending(own))]
        wanted = own(tokens)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (found - before).abs().max() > 1e-2


@pytest.mark.parametrize("kind", DECODERS)
@torch.no_grad()
def test_without_heads_it_is_a_model_like_any_other(kind: str) -> None:
    own = without(model(kind, max_length=40), [(0, 0), (1, 2)])
    prompts = [[row + 2, 3 * row + 2, 7, row + 5][: 1 + row % 4] for row in range(5)]
    found = generate(own, prompts, max_new_tokens=12)
    for prompt, one in zip(prompts, found, strict=True):
        assert generate(own, [prompt], max_new_tokens=12)[0].tokens == one.tokens
        tokens = [*prompt, *one.tokens]
        assert own(torch.tensor([tokens]))[0, len(prompt) - 1 : -1].argmax(-1).tolist() == one.tokens
    assert [one.tokens for one in generate(own, prompts, "parallel-jacobi-decoding", max_new_tokens=12)] == [
        one.tokens for one in found
    ]
    twin = build(own.describe())
    twin.load_state_dict(own.state_dict())
    tokens = torch.randint(97, (1, 9))
    torch.testing.assert_close(twin.eval()(tokens), own(tokens))


@torch.no_grad()
def test_all_other_weights_are_shared() -> None:
    own = model("rotary")
    made = without(own, [(1, 0)])
    pairs = [
        name for (name, one), other in zip(own.named_parameters(), made.parameters(), strict=True) if one is not other
    ]
    assert pairs == ["layers.1.sublayers.0.inner.output.weight"]
    assert all(one is other for one, other in zip(own.parameters(), without(own, []).parameters(), strict=True))


@torch.no_grad()
def test_heads_of_a_quantised_model_are_cut() -> None:
    own = model("rotary")
    quantise(own)
    tokens = torch.randint(97, (1, 9))
    part = attending(own)[1]
    wanted = part.output.weight.weights().clone()
    wanted[:, :8] = 0
    made = without(own, [(1, 0)])
    torch.testing.assert_close(attending(made)[1].output.weight, wanted)
    assert made(tokens).isfinite().all()


def test_cutting_every_head_leaves_only_the_feed_forwards() -> None:
    own = model("alibi")
    made = without(own, heads(own))
    tokens = torch.tensor([[5, 9, 7], [8, 3, 7]])
    torch.testing.assert_close(made(tokens)[0, -1], made(tokens)[1, -1])


def test_a_needle_is_found_among_the_tokens(told: Decoder) -> None:
    for question, fact in ((NEAR, " note: river is stone."), (LISTED, " copy: river stone house.")):
        asked = with_needle(told, question)
        tokens, start, needle = asked.tokens, asked.start, asked.needle
        assert told.tokenizer.decode(tokens[needle.start : needle.stop].tolist()) == fact
        assert told.tokenizer.decode(tokens[start:].tolist()) == question.answer


def test_the_head_that_copies_scores_one_and_the_other_none(tokenizer: Tokenizer) -> None:
    own = copier(tokenizer)
    assert answered(own, [LISTED]) == 1
    assert scores(own, [LISTED]) == {(0, 0): 1.0, (0, 1): 0.0}
    assert copied(own, with_needle(own, LISTED)).tolist() == [[True, False], [True, False]]
    assert answered(without(own, [(0, 0)]), [LISTED]) == 0
    assert answered(without(own, [(0, 1)]), [LISTED]) == 1


def test_what_is_copied_from_outside_the_needle_does_not_count(tokenizer: Tokenizer) -> None:
    own = copier(tokenizer)
    # The same words before the needle: the head's strongest attention is split, and the first place wins.
    decoy = replace(LISTED, prompt=" river stone house river stone house" + LISTED.prompt)
    assert answered(own, [decoy]) == 1
    assert scores(own, [decoy])[0, 0] == 0


def test_only_what_the_model_writes_counts(tokenizer: Tokenizer) -> None:
    own = copier(tokenizer)
    wrong = replace(LISTED, prompt=LISTED.prompt.replace("stone house.", "stone water."), answer=" stone water")
    assert copied(own, with_needle(own, wrong)).shape == (2, 2)
    # "house" does not follow "stone" here, so that the model's answer breaks off after one token.
    broken = replace(LISTED, prompt=" stone light stone light stone light" + LISTED.prompt)
    assert len(copied(own, with_needle(own, broken))) == 1


def test_what_is_not_in_the_needle_is_not_due(tokenizer: Tokenizer) -> None:
    own = copier(tokenizer)
    whole = with_needle(own, LISTED)
    part = replace(whole, needle=range(whole.needle.start, whole.needle.stop - 2))  # without "house."
    assert copied(own, part).tolist() == [[True, False]]


def test_scores_are_counted_over_all_tokens(tokenizer: Tokenizer) -> None:
    own = copier(tokenizer)
    decoy = replace(LISTED, prompt=" river stone house river stone house" + LISTED.prompt)
    assert scores(own, [LISTED, decoy, LISTED])[0, 0] == pytest.approx(2 / 3)


def test_ranks_and_likeness() -> None:
    found = {(0, 0): 0.2, (0, 1): 0.9, (1, 0): 0.2, (1, 1): 0.0}
    assert ranked(found) == [(0, 1), (0, 0), (1, 0), (1, 1)]
    same = likeness(found, {head: 2 * value for head, value in found.items()})
    assert same["correlation"] == pytest.approx(1.0)
    assert same["overlap of the best quarter"] == 1
    other = likeness(found, {head: 1 - value for head, value in found.items()})
    assert other["correlation"] == pytest.approx(-1.0)
    assert other["overlap of the best quarter"] == 0


def test_questions_of_the_work_are_laid_out(
    tokenizer: Tokenizer, told: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def texts(self: object, split: str) -> Iterator[str]:
        yield " the old tale goes on" * 200

    monkeypatch.setattr("formery.data.long.WikiText.texts", texts)
    monkeypatch.setattr("formery.data.long._words", lambda split: (" the old tale goes on" * 200).split())
    for question in islice(Long(300, ("recall", "copy"), tokenizer=tokenizer).questions("test"), 6):
        asked = with_needle(told, question)
        tokens, start, needle = asked.tokens, asked.start, asked.needle
        fact = told.tokenizer.decode(tokens[needle.start : needle.stop].tolist())
        assert fact.endswith(f"{question.answer}.")
        assert fact.startswith((" note: ", " copy: "))
        behind = told.tokenizer.decode(tokens[needle.stop : start].tolist())
        assert told.tokenizer.decode(tokens.tolist()).endswith(fact + behind + question.answer)


def test_rows_of_letters_are_needles_as_a_whole() -> None:
    for asked in rows(5, 0, 3):
        assert torch.equal(asked.tokens[asked.needle.start : asked.needle.stop], asked.tokens[asked.start : -1])
        assert len(asked.needle) == 5


def test_mistakes_are_told_in_a_sentence(told: Decoder) -> None:
    with pytest.raises(FormeryError, match=r"no head 9 in part 1"):
        without(told, [(1, 9)])
    with pytest.raises(FormeryError, match="not copied"):
        scores(told, [replace(NEAR, task="count")])
    with pytest.raises(FormeryError, match="does not hold"):
        scores(told, [replace(NEAR, answer=" winter")])
    with pytest.raises(FormeryError, match="writes no token"):
        scores(told, [])
    with pytest.raises(FormeryError, match="decoder"):
        heads(translator())
    told.tokenizer = None
    with pytest.raises(FormeryError, match="no tokenizer"):
        scores(told, [NEAR])


def test_a_part_that_attends_in_its_own_way_is_refused() -> None:
    own = decoder(Alibi())
    part = attending(own)[0]
    part.forward = lambda hidden, context: hidden
    with pytest.raises(FormeryError, match="way of its own"):
        attention_maps(own, torch.tensor([[1, 2, 3]]))


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    figure = picture({(0, 0): 0.1, (0, 1): 0.7, (1, 0): 0.0}, "scores")
    with atomic_write(tmp_path / "scores.png") as path:
        figure.savefig(path, format="png")
    assert (tmp_path / "scores.png").stat().st_size > 1000
    assert figure.axes[0].get_title() == "scores"
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.10", "0.70", "0.00"]
    assert retrieval_heads.PAPER.slug == "retrieval-heads"
