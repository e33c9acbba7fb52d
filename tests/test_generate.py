"""`generate` and `stream`: against transformers, as text, and with bad input."""

from typing import Any

import pytest
import torch
from generation import (
    TEXT,
    decoder,
    from_scratch,
    llama,
    model,
    noisy,
    padded_left,
    recital,
    small_tokenizer,
    translator,
    until_end,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from formery.data.tokenizer import train_bpe
from formery.errors import FormeryError
from formery.generate import METHODS, Method, Settings, drafting, register
from formery.generate.method import find
from formery.generate.run import generate, stream

REPLACEMENT = "\ufffd"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_is_that_of_transformers(penalty: float) -> None:
    ours, theirs = llama()
    prompts = [[5, 7, 9], [4], [11, 3, 8, 6, 5], list(range(20, 40)), [12, 12]]
    given = {"max_new_tokens": 32, "repetition_penalty": penalty}
    if penalty != 1.0:  # transformers counts the padding of a batch as a token that was read
        answers = [theirs.generate(torch.tensor([one]), do_sample=False, **given)[0, len(one) :] for one in prompts]
    else:
        answers = list(theirs.generate(**padded_left(prompts), do_sample=False, **given)[:, 20:])
    wanted = [until_end(one.tolist()) for one in answers]
    found = generate(ours, prompts, stop_tokens=[2], **given)
    assert [one.tokens for one in found] == wanted
    assert max(len(set(one)) for one in wanted) > 8
    assert all(sum(map(len, wanted)) > 100 for _ in wanted)


def texts_of(target: Any, prompt: list[int], **options: Any) -> tuple[str, list[str]]:
    """The whole text, and the pieces in which it is shown."""
    whole = generate(target, [prompt], **options)[0]
    events = list(stream(target, prompt, **options))
    assert [event.emitted for event in events] == [event.emitted for event in whole.trace]
    assert events[-1].stop == whole.stop
    return whole.text, [event.text for event in events]


@settings(max_examples=60)
@given(
    text=st.text(st.sampled_from("the cat żółć猫🐈🐕\n."), min_size=1, max_size=14).filter(str.strip),
    stop=st.lists(st.text(st.sampled_from("theca t猫🐈."), min_size=1, max_size=4), max_size=2),
    length=st.integers(1, 6),
)
def test_what_is_streamed_is_the_text_and_never_half_a_character(text: str, stop: list[str], length: int) -> None:
    tokenizer = small_tokenizer()
    tokens = tokenizer.encode(text)
    target = recital([*tokens, tokenizer.eos or 0], tokenizer.vocabulary_size)
    target.tokenizer = tokenizer
    first = min((text.index(one) for one in stop if one in text), default=None)
    for options in ({}, {"method": "speculative-sampling", "draft": target, "length": length}):
        whole, pieces = texts_of(target, [9], stop=stop, max_new_tokens=99, **options)
        assert "".join(pieces) == whole == text[:first]
        assert REPLACEMENT not in whole
        # No piece shows what has to be taken back, so each beginning is a beginning of the text.
        assert all(text.startswith("".join(pieces[:n])) for n in range(len(pieces)))


@settings(max_examples=40)
@given(
    tokens=st.lists(st.integers(3, 299), min_size=1, max_size=16),
    stop=st.lists(st.sampled_from("ab €"), max_size=2),
)
def test_any_bytes_can_be_streamed(tokens: list[int], stop: list[str]) -> None:
    """Bytes that are no UTF-8 are shown as the decoder shows them."""
    target = recital(tokens, small_tokenizer().vocabulary_size)
    target.tokenizer = small_tokenizer()
    whole, pieces = texts_of(target, [9], stop=stop, max_new_tokens=len(tokens))
    plain = small_tokenizer().decode(tokens)
    first = min((plain.index(one) for one in stop if one in plain), default=None)
    assert "".join(pieces) == whole == plain[:first]


def test_a_stop_string_over_several_tokens_is_never_shown() -> None:
    tokenizer = small_tokenizer()
    tokens = [token for letter in "one stone; two" for token in tokenizer.encode(letter)]
    target = recital(tokens, tokenizer.vocabulary_size)
    target.tokenizer = tokenizer
    whole, pieces = texts_of(target, [9], stop=["stop", "e; t"], max_new_tokens=20)
    assert whole == "one ston"
    assert pieces[:5] == ["o", "n", "", "e ", ""]  # "e" and "s" could begin a stop string
    assert generate(target, [[9]], stop=["stop"], max_new_tokens=5)[0].text == "one s"  # it did not


def test_texts_go_in_and_come_out() -> None:
    tokenizer = small_tokenizer()
    target = model("rotary", vocabulary=tokenizer.vocabulary_size)
    target.tokenizer = tokenizer
    by_text, by_tokens = generate(target, ["the cat", tokenizer.encode("the cat")], max_new_tokens=8)
    assert by_text.tokens == by_tokens.tokens
    assert by_text.text == by_tokens.text == tokenizer.decode(by_text.tokens)
    assert by_text.prompt == "the cat"
    assert generate(target, "the cat", max_new_tokens=8)[0].tokens == by_text.tokens
    numbers = torch.tensor(tokenizer.encode("the cat"))
    assert generate(target, [numbers], "aggressive-decoding", max_new_tokens=8)[0].tokens == by_text.tokens


def test_a_text_read_apart_ends_with_the_end_token() -> None:
    tokenizer = small_tokenizer()
    target = translator(tokenizer.vocabulary_size).eval()
    target.tokenizer = tokenizer
    tokens = [*tokenizer.encode("the cat"), tokenizer.eos]
    found = generate(target, ["the cat"], max_new_tokens=8)[0]
    wanted = from_scratch(target, tokens, Settings(max_new_tokens=8, stop_tokens=frozenset([tokenizer.eos or 0])))
    assert (found.tokens, found.stop) == wanted


def test_the_tokenizers_end_token_ends_unless_told_otherwise() -> None:
    tokenizer = small_tokenizer()
    assert tokenizer.eos is not None
    target = recital([50, 51, tokenizer.eos, 52], tokenizer.vocabulary_size)
    target.tokenizer = tokenizer
    ended = generate(target, [[9]], max_new_tokens=4)[0]
    assert (ended.tokens, ended.stop) == ([50, 51], "end")
    assert generate(target, [[9]], max_new_tokens=4, stop_tokens=[])[0].tokens == [50, 51, tokenizer.eos, 52]


def other_vocabulary() -> Any:
    other = model("rotary", vocabulary=small_tokenizer().vocabulary_size)
    other.tokenizer = train_bpe([TEXT.upper()], 300)
    return other


def texts() -> Any:
    target = model("rotary", vocabulary=small_tokenizer().vocabulary_size)
    target.tokenizer = small_tokenizer()
    return target


BAD: list[tuple[str, dict[str, Any]]] = [
    ("no method named 'gredy'; did you mean greedy", {"method": "gredy"}),
    ("known: ", {"method": "qqqqqq"}),
    ("no option of greedy named 'max_new_token'; did you mean max_new_tokens", {"max_new_token": 3}),
    (
        "no option of speculative-sampling named 'lenght'; did you mean length",
        {"method": "speculative-sampling:lenght=3"},
    ),
    ("'x' should read option=value", {"method": "greedy:x"}),
    ("needs the option 'draft'", {"method": "speculative-sampling"}),
    (
        "option 'draft' of speculative-sampling must be of kind",
        {"method": "speculative-sampling", "draft": "code"},
    ),
    ("option 'length' .* kind int, not 'long'", {"method": "aggressive-decoding:length=long"}),
    ("option 'length' .* kind int, not 2.5", {"method": "aggressive-decoding:length=2.5"}),
    ("option 'unique' .* kind bool", {"method": "aggressive-decoding:unique=maybe"}),
    (
        "form of Jacobi decoding named 'blok'; did you mean block",
        {"method": "parallel-jacobi-decoding:form=blok"},
    ),
    ("option 'form' .* kind str, not 3", {"method": "parallel-jacobi-decoding:form=3"}),
    ("block >= 2", {"method": "parallel-jacobi-decoding:block=1"}),
    ("at least 1 token long", {"method": "speculative-sampling", "draft": model("rotary"), "length": 0}),
    (
        "draft has another vocabulary",
        {"method": "speculative-sampling", "draft": model("rotary", vocabulary=5)},
    ),
    ("different kinds", {"method": "speculative-sampling", "draft": model("translator")}),
    ("batch must hold at least 1", {"batch": 0}),
    ("max_new_tokens must be at least 1", {"max_new_tokens": 0}),
    ("max_new_tokens must be a whole number", {"max_new_tokens": 2.5}),
    ("temperature must be between 0 and 100", {"temperature": -1.0}),
    ("temperature must be between", {"temperature": float("nan")}),
    ("temperature must be between", {"temperature": "hot"}),
    ("top_k must be at least 1", {"top_k": 0}),
    ("top_k must be a whole number", {"top_k": "many"}),
    ("top_p must be between", {"top_p": 0.0}),
    ("min_p must be between", {"min_p": 1.5}),
    ("repetition_penalty must be between", {"repetition_penalty": 0.0}),
    ("stop must be a list of strings", {"stop": "end"}),
    ("stop must be a list of strings", {"stop": [""]}),
    ("stop must be a list of strings", {"stop": 5}),
    ("has no tokenizer, so it cannot stop at a string", {"stop": ["end"]}),
    ("prompt 2 is empty", {"prompts": [[5], []]}),
    ("prompt 1 has token 97; this model knows 0 to 96", {"prompts": [[5, 97]]}),
    ("prompt 1 has token -1", {"prompts": [[-1]]}),
    ("no tokenizer: give prompts as token ids", {"prompts": ["the cat"]}),
    ("list of texts, or of lists of token ids", {"prompts": [5, 6]}),
    (
        "11 tokens are more than this model takes",
        {"model": model("rotary", max_length=10), "prompts": [list(range(11))]},
    ),
    (
        "prompt of 11 tokens is longer",
        {"model": model("translator", max_length=10), "prompts": [list(range(11))]},
    ),
    ("prompt 1 is empty", {"model": texts(), "prompts": [" \n"]}),
    (
        "draft has another vocabulary",
        {"model": texts(), "method": "speculative-sampling", "draft": other_vocabulary()},
    ),
]


@pytest.mark.parametrize(("sentence", "given"), BAD, ids=[sentence for sentence, _ in BAD])
def test_bad_input_gets_one_clear_sentence(sentence: str, given: dict[str, Any]) -> None:
    options = {"model": model("rotary"), "prompts": [[5, 6]], **given}
    with pytest.raises(FormeryError, match=sentence) as error:
        generate(options.pop("model"), options.pop("prompts"), **options)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith((".", "?"))


def test_nothing_is_generated_before_all_prompts_are_known_to_be_good() -> None:
    with pytest.raises(FormeryError, match="prompt 3 is empty"):
        next(iter(stream_of_many([[5], [6], []])))


def stream_of_many(prompts: list[list[int]]) -> Any:
    from formery.generate.run import events

    return events(model("rotary"), prompts, "greedy", 1, {})


def test_method_texts_carry_options() -> None:
    method, options = find("aggressive-decoding:length=3:unique=true")
    assert (method.name, options) == ("aggressive-decoding", {"length": 3, "unique": True})
    assert find("beam:length_penalty=0.5")[1] == {"length_penalty": 0.5}
    assert find("beam:length_penalty=2")[1] == {"length_penalty": 2}
    generate(model("rotary"), [[5]], "beam:length_penalty=2", max_new_tokens=2)
    with_text = generate(model("rotary"), [[5]], "aggressive-decoding:length=1", max_new_tokens=9)
    overruled = generate(model("rotary"), [[5]], "aggressive-decoding:length=7", length=1, max_new_tokens=9)
    assert [event.drafted for event in with_text[0].trace] == [event.drafted for event in overruled[0].trace]


def test_every_method_says_what_it_is() -> None:
    assert {
        "greedy",
        "sampling",
        "beam",
        "speculative-sampling",
        "aggressive-decoding",
        "parallel-jacobi-decoding",
    } <= {*METHODS}
    for name, method in METHODS.items():
        assert method.name == name
        assert method.summary
        assert not method.guided or method.takes_draft
        for variant in method.variants:
            assert find(f"{name}:{variant}")[0] is method


def test_a_name_belongs_to_one_method() -> None:
    greedy = METHODS["greedy"]
    assert register(greedy) is greedy
    with pytest.raises(ValueError, match="two methods"):
        register(Method("greedy", "another", lossless=True, make=drafting(lambda: None)))  # type: ignore[arg-type,return-value]


def test_the_state_is_as_large_as_it_must_be() -> None:
    """Keys and values of all rows and layers, and no more slots than the model has positions for (and a few)."""
    target = decoder(vocabulary=97, max_length=40).eval()
    found = generate(target, [[5, 6]], max_new_tokens=10**6)[0]
    assert len(found.tokens) == 39
    slot = 2 * 2 * 32 * 4 + 8  # layers, keys and values, width, bytes; and its position
    assert 40 * slot <= found.state_bytes <= 60 * slot


def test_a_draft_of_lower_precision_is_welcome() -> None:
    target = model("rotary")
    draft = noisy(target, 0.0).to(torch.bfloat16)
    found = generate(target, [[5, 6]], "speculative-sampling", draft=draft, max_new_tokens=20)[0]
    assert found.tokens == from_scratch(target, [5, 6], Settings(max_new_tokens=20))[0]
    assert found.accepted > 0
