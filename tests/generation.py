"""Models and references for the tests of generation: small random ones, and some that say what they are told to."""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from formery.data.tokenizer import Tokenizer, train_bpe
from formery.generate import Settings
from formery.generate.draft import as_batch
from formery.methods import discover
from formery.models import Conventions, Decoder, Encoder, EncoderDecoder
from formery.parts import (
    MLP,
    Alibi,
    Attention,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Learned,
    Mask,
    Output,
    Part,
    Position,
    PreNorm,
    RMSNorm,
    Rotary,
    State,
    causal,
    everything,
    window,
)
from formery.parts.state import Slots

discover()

TEXT = "the cat sat on the mat and the dog sat on the log; żółta łódź 猫が座る 🐈🐕 then the cat sat on the dog. " * 4
KINDS = ("rotary", "learned", "alibi", "window", "translator")


@cache
def small_tokenizer() -> Tokenizer:
    """A byte-level vocabulary of some 300 tokens; many characters take several tokens."""
    return train_bpe([TEXT], 300)


def decoder(
    position: Position | None = None,
    mask: Mask = causal,
    vocabulary: int = 97,
    width: int = 32,
    layers: int = 2,
    key_value_heads: int | None = None,
    max_length: int | None = None,
    learned: int | None = None,
) -> Decoder:
    """A decoder of random weights whose output varies: what it says depends on all that it has read."""
    embedding = Embedding(vocabulary, width, Learned(learned, width) if learned else None, deviation=0.2)
    stack = [
        Layer(
            [
                PreNorm(RMSNorm(width), Attention(width, 4, key_value_heads, position=position, mask=mask)),
                PreNorm(RMSNorm(width), GatedMLP(width, 2 * width)),
            ]
        )
        for _ in range(layers)
    ]
    return Decoder(embedding, stack, RMSNorm(width), Output(width, vocabulary), max_length)


def translator(vocabulary: int = 97, width: int = 32, max_length: int | None = None, start: int = 1) -> EncoderDecoder:
    """An encoder-decoder of random weights, with LayerNorm and plain feed-forwards."""

    def layer(*inner: Part) -> Layer:
        return Layer([PreNorm(LayerNorm(width), one) for one in (*inner, MLP(width, 2 * width))])

    position = Rotary()
    encoder = Encoder(
        Embedding(vocabulary, width, deviation=0.2),
        [layer(Attention(width, 4, position=position, mask=everything)) for _ in range(2)],
        LayerNorm(width),
        max_length,
    )
    stack = [layer(Attention(width, 4, position=position), CrossAttention(width, 4)) for _ in range(2)]
    embedding = Embedding(vocabulary, width, deviation=0.2)
    return EncoderDecoder(
        encoder, Decoder(embedding, stack, LayerNorm(width), Output(width, vocabulary), max_length), start
    )


def model(kind: str, seed: int = 0, vocabulary: int = 97, max_length: int | None = None) -> Decoder | EncoderDecoder:
    """A random model of that kind, always the same for the same arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "translator":
            made: Decoder | EncoderDecoder = translator(vocabulary, max_length=max_length)
        elif kind == "learned":
            made = decoder(learned=max_length or 64, vocabulary=vocabulary, max_length=max_length or 64)
        elif kind == "alibi":
            made = decoder(Alibi(), vocabulary=vocabulary, max_length=max_length)
        elif kind == "window":
            made = decoder(Rotary(), causal & window(5), vocabulary, max_length=max_length)
        else:
            made = decoder(Rotary(), vocabulary=vocabulary, key_value_heads=2, max_length=max_length)
    return made.eval()


def noisy(model: Decoder | EncoderDecoder, share: float, seed: int = 0) -> Decoder | EncoderDecoder:
    """A copy with noise of `share` times each weight's own spread: a draft that is often right."""
    twin = model.clone()
    twin.tokenizer = model.tokenizer
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            if weight.dim() > 1:
                weight += share * weight.std() * torch.randn(weight.shape, generator=random)
    return twin


class Said:
    """A layer state that holds the tokens themselves."""

    def __init__(self, slots: Slots):
        self.slots, self.tokens = slots, torch.zeros_like(slots.positions)

    def select(self, rows: Int[Tensor, "rows"]) -> None:
        self.tokens = self.tokens[rows]

    def check_rollback(self, lengths: Sequence[int]) -> None:
        pass

    def check_keep(self, counts: Sequence[int]) -> None:
        pass

    def rollback(self, lengths: Sequence[int]) -> None:
        pass

    def check_settle(self, paths: Sequence[Sequence[int]]) -> None:
        pass

    def settle(self, paths: Sequence[Sequence[int]]) -> None:
        for row, (start, path) in enumerate(zip(self.slots.start, paths, strict=True)):
            self.tokens[row, start : start + len(path)] = self.tokens[row, [start + place for place in path]]

    def gather(self, slots: Int[Tensor, "batch slot"]) -> None:
        raise NotImplementedError

    def grow(self, capacity: int) -> None:
        larger = self.tokens.new_zeros(len(self.tokens), capacity)
        larger[:, : self.tokens.shape[1]] = self.tokens
        self.tokens = larger

    def tensors(self) -> list[Tensor]:
        return [self.tokens]


class Told(nn.Module):
    """A model whose logits after a text are `says(text)`: for every question whose answer must be known exactly."""

    reads_apart = False
    compiled = False

    def __init__(self, vocabulary: int, says: Callable[[tuple[int, ...]], Tensor], max_length: int | None = None):
        super().__init__()
        self.vocabulary, self.says, self.max_length = vocabulary, says, max_length
        self.tokenizer: Tokenizer | None = None
        self.conventions = Conventions()
        self.nothing = nn.Parameter(torch.zeros(1))

    def begin(
        self, prompts: Sequence[Sequence[int]], capacity: int, keep: bool = False
    ) -> tuple[State, list[list[int]]]:
        state = State(len(prompts), capacity)
        state.layers[self] = Said(state.slots)  # type: ignore[index]
        return state, [list(prompt) for prompt in prompts]

    def read(
        self, tokens: Tensor, state: State, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        state.reserve(tokens.shape[1])
        own = state.layers[self]  # type: ignore[index]
        assert isinstance(own, Said)
        at = state.slots.extend(positions, tokens.shape[1]).tolist()
        state.slots.write(own.tokens, tokens)
        slots = state.slots.positions.tolist()
        rows = []
        for row, text in enumerate(own.tokens.tolist()):
            rows.append([])
            for query, position in enumerate(at[row]):
                seen = range(len(text)) if visible is None else visible[row, query].nonzero().flatten().tolist()
                read = sorted((slots[row][slot], text[slot]) for slot in seen if 0 <= slots[row][slot] <= position)
                rows[-1].append(self.says(tuple(token for _, token in read)))
        return torch.stack([torch.stack(row) for row in rows])

    def step(
        self, tokens: Tensor, state: State, positions: Tensor | None = None, visible: Tensor | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        return self.read(tokens, state, positions, visible)

    def logits(self, hidden: Tensor, state: State | None = None) -> Tensor:
        return hidden

    def parameter_count(self) -> int:
        return 1


def random_told(vocabulary: int, seed: int, spread: float = 1.5) -> Told:
    """A model of independent random logits for every text."""

    @cache
    def says(text: tuple[int, ...]) -> Tensor:
        random = torch.Generator().manual_seed(hash((seed, text)) % 2**62)
        return spread * torch.randn(vocabulary, generator=random, dtype=torch.float64)

    return Told(vocabulary, says)


def recital(text: Sequence[int], vocabulary: int, prompt: int = 1) -> Told:
    """A model that says `text` after a prompt of that length, whatever else it has read, then token 0 for ever."""

    def says(read: tuple[int, ...]) -> Tensor:
        at = len(read) - prompt
        return nn.functional.one_hot(torch.tensor(text[at] if 0 <= at < len(text) else 0), vocabulary).double()

    return Told(vocabulary, says)


_scratch: dict[tuple[object, ...], tuple[list[int], str]] = {}


def from_scratch(model: Decoder | EncoderDecoder, prompt: list[int], settings: Settings) -> tuple[list[int], str]:
    """The plain meaning of greedy decoding, no state, no loop of ours: (tokens, why it stopped).

    Many tests ask the same of models of the same weights, which are written once.
    """
    weights = hashlib.sha256(repr((model.describe(), model.max_length, getattr(model, "start_token", 0))).encode())
    for one in model.parameters():
        weights.update(one.detach().numpy().tobytes())
    key = (weights.digest(), id(model.tokenizer), tuple(prompt), settings)
    if key not in _scratch:
        _scratch[key] = _from_scratch(model, prompt, settings)
    tokens, stop = _scratch[key]
    return list(tokens), stop


@torch.inference_mode()
def _from_scratch(model: Decoder | EncoderDecoder, prompt: list[int], settings: Settings) -> tuple[list[int], str]:
    apart = model.reads_apart
    start = [model.start_token] if apart else list(prompt)
    ends = settings.stop_tokens or frozenset()
    tokens: list[int] = []
    while True:
        read = torch.tensor([start + tokens])
        logits = (model(torch.tensor([prompt]), read) if apart else model(read))[0, -1].double()
        if settings.repetition_penalty != 1:
            for token in set(start + tokens):
                logits[token] *= settings.repetition_penalty ** (-1 if logits[token] > 0 else 1)
        token = int(logits.argmax())
        if token in ends:
            return tokens, "end"
        tokens.append(token)
        if model.tokenizer is not None and any(one in model.tokenizer.decode(tokens) for one in settings.stop):
            return tokens, "stop"
        if len(tokens) == settings.max_new_tokens or len(start) + len(tokens) == (model.max_length or 10**9) + 1:
            return tokens, "length"


def llama(seed: int = 0, vocabulary: int = 61) -> tuple[Decoder, LlamaForCausalLM]:
    """A small Llama of random weights, and ours with the very same ones."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    theirs = LlamaForCausalLM(config).eval()
    ours = decoder(
        Rotary(config.rope_parameters["rope_theta"]), vocabulary=vocabulary, key_value_heads=2, max_length=128
    )
    names = {
        "embedding.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.map.weight": "lm_head.weight",
    }
    inner = {
        "0.norm": "input_layernorm",
        "1.norm": "post_attention_layernorm",
        **{f"0.inner.{one}": f"self_attn.{one[0]}_proj" for one in ("query", "key", "value", "output")},
        **{f"1.inner.{one}": f"mlp.{one}_proj" for one in ("gate", "up", "down")},
    }
    for layer in range(2):
        for own, other in inner.items():
            names[f"layers.{layer}.sublayers.{own}.weight"] = f"model.layers.{layer}.{other}.weight"
    weights = theirs.state_dict()
    ours.load_state_dict({own: weights[other] for own, other in names.items()})
    return ours.eval(), theirs


def feed(
    model: Decoder | EncoderDecoder, state: State, rows: Sequence[Sequence[int]]
) -> Float[Tensor, "batch width vocabulary"]:
    """Reads more tokens of each row into the state; roll it back afterwards where widths differ."""
    tokens, positions = as_batch(rows, state.slots.lengths, next(model.parameters()).device)
    return model.step(tokens, state, positions)


def padded_left(prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """Prompts as transformers wants them for generation."""
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(seen)}


def until_end(tokens: list[int], ends: Sequence[int] = (2,)) -> list[int]:
    """The tokens before the first end token."""
    return tokens[: next((place for place, token in enumerate(tokens) if token in ends), None)]
