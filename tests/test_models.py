"""Whole models: the same logits as transformers' with the same weights, and their errors."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from formery.errors import FormeryError
from formery.models import Decoder, Encoder, EncoderDecoder
from formery.models.compose import language_model, translator
from formery.parts import (
    MLP,
    Attention,
    CrossAttention,
    Embedding,
    GatedMLP,
    Layer,
    LayerNorm,
    Learned,
    Linear,
    Llama3Scaling,
    Output,
    Parallel,
    Part,
    PostNorm,
    PreNorm,
    RelativeBuckets,
    RMSNorm,
    Rotary,
    TiedOutput,
    everything,
)

TOKENS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
SOURCE = torch.randint(40, (3, 7), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([7, 3, 5])


def random(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, float(parameter.ndim == 1), 0.2)
    return model.eval()


@torch.no_grad()
def put(part: Any, weight: Tensor, bias: Tensor | None = None) -> None:
    """Copies weights into a part; both sides must have a bias or neither."""
    assert part.weight.shape == weight.shape and (getattr(part, "shift", None) is None) == (bias is None)
    part.weight.copy_(weight)
    if bias is not None:
        part.shift.copy_(bias)


def put_map(part: Linear | LayerNorm | RMSNorm, module: Any) -> None:
    put(part, module.weight, getattr(module, "bias", None))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("scaled", [False, True])
def test_llama(scaled: bool) -> None:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
    if scaled:
        rope |= {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope["original_max_position_embeddings"] = 16
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, **heads, rope_parameters=rope, tie_word_embeddings=False)
    theirs = random(LlamaForCausalLM(config))
    scaling = Llama3Scaling(4.0, 1.0, 4.0, 16) if scaled else None
    attentions = [Attention(32, 4, 2, position=Rotary(500.0, scaling=scaling)) for _ in range(2)]
    layers = [
        Layer([PreNorm(RMSNorm(32), attention), PreNorm(RMSNorm(32), GatedMLP(32, 48))]) for attention in attentions
    ]
    ours: Any = Decoder(Embedding(40, 32), layers, RMSNorm(32), Output(32, 40)).eval()
    put(ours.embedding, theirs.model.embed_tokens.weight)
    put_map(ours.norm, theirs.model.norm)
    put_map(ours.output.map, theirs.lm_head)
    for layer, other in zip(ours.layers, theirs.model.layers, strict=True):
        first, second = layer.sublayers
        put_map(first.norm, other.input_layernorm)
        put_map(second.norm, other.post_attention_layernorm)
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            put_map(getattr(first.inner, name), getattr(other.self_attn, f"{letter}_proj"))
        for name in ("gate", "up", "down"):
            put_map(getattr(second.inner, name), getattr(other.mlp, f"{name}_proj"))
    close(ours(TOKENS), theirs(TOKENS).logits)


@torch.no_grad()
def test_gpt2() -> None:
    config = GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    theirs = random(GPT2LMHeadModel(config))
    embedding = Embedding(40, 32, Learned(16, 32))
    layers = [
        Layer(
            [
                PreNorm(LayerNorm(32), Attention(32, 4, bias=True)),
                PreNorm(LayerNorm(32), MLP(32, 128, "gelu_tanh", bias=True)),
            ]
        )
        for _ in range(2)
    ]
    ours: Any = Decoder(embedding, layers, LayerNorm(32), TiedOutput(embedding), 16).eval()
    put(ours.embedding, theirs.transformer.wte.weight)
    put(ours.embedding.position, theirs.transformer.wpe.weight)
    put_map(ours.norm, theirs.transformer.ln_f)
    for layer, other in zip(ours.layers, theirs.transformer.h, strict=True):
        first, second = layer.sublayers
        put_map(first.norm, other.ln_1)
        put_map(second.norm, other.ln_2)
        weights, biases = other.attn.c_attn.weight.chunk(3, 1), other.attn.c_attn.bias.chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            put(getattr(first.inner, name), weight.T, bias)
        put(first.inner.output, other.attn.c_proj.weight.T, other.attn.c_proj.bias)
        put(second.inner.up, other.mlp.c_fc.weight.T, other.mlp.c_fc.bias)
        put(second.inner.down, other.mlp.c_proj.weight.T, other.mlp.c_proj.bias)
    close(ours(TOKENS), theirs(TOKENS).logits)


@torch.no_grad()
def test_gpt_neox() -> None:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = GPTNeoXConfig(**sizes, num_attention_heads=4, rope_parameters=rope, use_parallel_residual=True)
    theirs = random(GPTNeoXForCausalLM(config))
    layers = [
        Parallel(
            [LayerNorm(32), LayerNorm(32)],
            [Attention(32, 4, position=Rotary(fraction=0.5), bias=True), MLP(32, 48, bias=True)],
        )
        for _ in range(2)
    ]
    ours: Any = Decoder(Embedding(40, 32), layers, LayerNorm(32), Output(32, 40)).eval()
    put(ours.embedding, theirs.gpt_neox.embed_in.weight)
    put_map(ours.norm, theirs.gpt_neox.final_layer_norm)
    put(ours.output.map, next(theirs.get_output_embeddings().parameters()))
    for layer, other in zip(ours.layers, theirs.gpt_neox.layers, strict=True):
        attention, mlp = layer.inners
        put_map(layer.norms[0], other.input_layernorm)
        put_map(layer.norms[1], other.post_attention_layernorm)
        fused = other.attention.query_key_value
        weights, biases = fused.weight.view(4, 3, 8, 32), fused.bias.view(4, 3, 8)
        for index, name in enumerate(("query", "key", "value")):
            put(getattr(attention, name), weights[:, index].reshape(32, 32), biases[:, index].reshape(32))
        put_map(attention.output, other.attention.dense)
        put_map(mlp.up, other.mlp.dense_h_to_4h)
        put_map(mlp.down, other.mlp.dense_4h_to_h)
    close(ours(TOKENS), theirs(TOKENS).logits)


def source_places() -> tuple[Tensor, Tensor]:
    """Positions and attention mask of a source whose rows end at LENGTHS."""
    place = torch.arange(7).expand(3, 7)
    real = place < LENGTHS[:, None]
    return torch.where(real, place, -1), real.long()


@torch.no_grad()
@pytest.mark.parametrize("ragged", [False, True])
def test_t5(ragged: bool) -> None:
    config = T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=6,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        decoder_start_token_id=0,
    )
    theirs = random(T5ForConditionalGeneration(config))
    theirs.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    embedding = Embedding(40, 32)

    def stack(decoding: bool) -> list[Layer]:
        position = RelativeBuckets(4, 8, 10, bidirectional=not decoding)
        mask = {} if decoding else {"mask": everything}
        layers = []
        for _ in range(2):
            inner: list[Part] = [Attention(32, 4, head_width=6, position=position, scale=1.0, **mask)]
            inner += [CrossAttention(32, 4, head_width=6, scale=1.0)] if decoding else []
            layers.append(Layer([PreNorm(RMSNorm(32), one) for one in (*inner, MLP(32, 48, "relu"))]))
        return layers

    scale = 32**-0.5 if config.scale_decoder_outputs else 1.0
    decoder = Decoder(embedding, stack(True), RMSNorm(32), TiedOutput(embedding, scale))
    ours: Any = EncoderDecoder(Encoder(embedding, stack(False), RMSNorm(32)), decoder, 0).eval()
    put(embedding, theirs.shared.weight)
    for half, other in ((ours.encoder, theirs.encoder), (ours.decoder, theirs.decoder)):
        put_map(half.norm, other.final_layer_norm)
        table = other.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        put(half.layers[1].sublayers[0].inner.position, table)
        for layer, block in zip(half.layers, other.block, strict=True):
            for sublayer, one in zip(layer.sublayers, block.layer, strict=True):
                put_map(sublayer.norm, one.layer_norm)
                if isinstance(sublayer.inner, MLP):
                    put_map(sublayer.inner.up, one.DenseReluDense.wi)
                    put_map(sublayer.inner.down, one.DenseReluDense.wo)
                    continue
                attention = getattr(one, "SelfAttention", None) or one.EncDecAttention
                for name in ("query", "key", "value", "output"):
                    put_map(getattr(sublayer.inner, name), getattr(attention, name[0]))
    places, real = source_places() if ragged else (None, None)
    close(
        ours(SOURCE, TOKENS, source_positions=places),
        theirs(input_ids=SOURCE, attention_mask=real, decoder_input_ids=TOKENS).logits,
    )


@torch.no_grad()
@pytest.mark.parametrize("ragged", [False, True])
def test_bart(ragged: bool) -> None:
    config = BartConfig(
        vocab_size=40,
        max_position_embeddings=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        dropout=0.0,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
    )
    theirs = random(BartForConditionalGeneration(config))
    table = Embedding(40, 32, Learned(16, 32, 2), LayerNorm(32))
    decoder_table = Embedding(40, 32, Learned(16, 32, 2), LayerNorm(32))
    decoder_table.weight = table.weight

    def stack(decoding: bool) -> list[Layer]:
        layers = []
        for _ in range(2):
            inner: list[Part] = [Attention(32, 4, bias=True, **({} if decoding else {"mask": everything}))]
            inner += [CrossAttention(32, 4, bias=True)] if decoding else []
            layers.append(Layer([PostNorm(LayerNorm(32), one) for one in (*inner, MLP(32, 48, bias=True))]))
        return layers

    decoder = Decoder(decoder_table, stack(True), None, TiedOutput(decoder_table))
    ours: Any = EncoderDecoder(Encoder(table, stack(False)), decoder, 2).eval()
    put(table, theirs.model.shared.weight)
    for half, other in ((ours.encoder, theirs.model.encoder), (ours.decoder, theirs.model.decoder)):
        put(half.embedding.position, other.embed_positions.weight)
        put_map(half.embedding.norm, other.layernorm_embedding)
        for layer, block in zip(half.layers, other.layers, strict=True):
            own, *cross, mlp = layer.sublayers
            pairs = [(own, block.self_attn, block.self_attn_layer_norm)]
            pairs += [(one, block.encoder_attn, block.encoder_attn_layer_norm) for one in cross]
            for sublayer, attention, norm in pairs:
                put_map(sublayer.norm, norm)
                for name in ("query", "key", "value", "output"):
                    put_map(
                        getattr(sublayer.inner, name),
                        getattr(attention, "out_proj" if name == "output" else f"{name[0]}_proj"),
                    )
            put_map(mlp.norm, block.final_layer_norm)
            put_map(mlp.inner.up, block.fc1)
            put_map(mlp.inner.down, block.fc2)
    places, real = source_places() if ragged else (None, None)
    logits = theirs(input_ids=SOURCE, attention_mask=real, decoder_input_ids=TOKENS).logits
    close(ours(SOURCE, TOKENS, source_positions=places), logits - theirs.final_logits_bias)


def small(max_length: int | None = 6) -> Decoder:
    embedding = Embedding(11, 8, Learned(max_length or 50, 8))
    layer = Layer([PreNorm(RMSNorm(8), Attention(8, 2)), PreNorm(RMSNorm(8), MLP(8, 9))])
    return random(Decoder(embedding, [layer], RMSNorm(8), TiedOutput(embedding), max_length))


def test_too_long_and_empty() -> None:
    model = small()
    tokens = torch.zeros(2, 7, dtype=torch.long)
    assert model(tokens[:, :6]).shape == (2, 6, 11)
    with pytest.raises(FormeryError, match="7 tokens are more than this model takes \\(6\\)"):
        model(tokens)
    padded = torch.tensor([[-1, 0, 1, 2, 3, 4, 5]])
    assert model(tokens[:1], padded).shape == (1, 7, 11)
    with pytest.raises(FormeryError, match="7 tokens"):
        model(tokens[:1], padded + 1)
    segments = torch.tensor([[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]])
    assert model(tokens, segments=segments).shape == (2, 7, 11)
    with pytest.raises(FormeryError, match="7 tokens"):
        model.begin([[1], [1] * 7], 10)
    with pytest.raises(FormeryError, match="empty"):
        model.begin([[1], []], 10)


def test_a_step_that_is_too_long_leaves_the_state_as_it_was() -> None:
    model = small()
    state, _ = model.begin([[1, 2], [3, 4]], 4)
    model.step(torch.tensor([[1, 2], [3, 4]]), state)
    for positions in (None, torch.tensor([[2, 3, 4, 5, 6], [2, -1, -1, -1, -1]])):
        with pytest.raises(FormeryError, match="7 tokens"):
            model.step(torch.zeros(2, 5, dtype=torch.long), state, positions)
        assert state.lengths == [2, 2] and state.slots.filled == 2
    expected = model(torch.tensor([[1, 2, 5], [3, 4, 6]]))[:, -1:]
    torch.testing.assert_close(model.step(torch.tensor([[5], [6]]), state), expected)


def test_translator_too_long_and_empty() -> None:
    model = translator(11, 8, 1, 1, 2, 12, 6, 1)
    with pytest.raises(FormeryError, match="empty"):
        model.begin([[1], []], 10)
    with pytest.raises(FormeryError, match="7 tokens is longer than this model takes \\(6\\)"):
        model.begin([[1] * 7], 10)
    source = torch.zeros(1, 7, dtype=torch.long)
    with pytest.raises(FormeryError, match="7 tokens"):
        model(source[:, :6], source)
    with pytest.raises(FormeryError, match="7 tokens"):
        model(source, source[:, :6])
    assert model.begin([[3, 4]], 5)[1] == [[1]]
    assert model.max_length == 6 and model.vocabulary == 11


def test_dropout_reaches_every_residual_and_stops_in_evaluation() -> None:
    for model, inputs in (
        (language_model(11, 8, 2, 2, 1, 12, 20, 0.5), (TOKENS % 11,)),
        (translator(11, 8, 1, 1, 2, 12, 20, 1, 0.5), (SOURCE % 11, TOKENS % 11)),
    ):
        assert not torch.equal(model.train()(*inputs), model(*inputs))
        assert torch.equal(model.eval()(*inputs), model(*inputs))
        dropouts = [part.dropout for part in model.modules() if isinstance(part, PreNorm)]
        assert dropouts and all(dropout == 0.5 for dropout in dropouts)


def test_a_fresh_language_model_is_nearly_uniform() -> None:
    model = language_model(200, 64, 4, 4, 2, 128, 20).eval()
    loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())
    assert float(loss.detach()) == pytest.approx(math.log(200), rel=0.1)


def test_every_weight_learns() -> None:
    for model, inputs in (
        (language_model(11, 8, 2, 2, 1, 12, 20), (TOKENS % 11,)),
        (translator(11, 8, 1, 1, 2, 12, 20, 1), (SOURCE % 11, TOKENS % 11)),
    ):
        random(model)(*inputs).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
