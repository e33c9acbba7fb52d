"""x-transformers, with the stored weights put into its modules."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

from bench.cases import Case
from bench.shapes import Shape
from bench.systems.system import System, everything
from bench.training.step import Training
from bench.weights import interleaved, stored


class XTransformer(System):
    """It has no biases in attention and norms; those of a GPT-2 that was never trained are zero, so nothing is lost."""

    does = {**everything("float32", "bfloat16"), "train": ("float32", "bfloat16")}
    kinds = ("gpt2", "llama")

    def __init__(self, case: Case):
        super().__init__(case)
        self.net = {"gpt2": gpt2, "llama": llama}[case.shape.kind](case.shape).eval()
        if case.work == "train":
            self.training = Training(self.net, self.prompts, case.dtype, self.net)
            return
        self.net.to(getattr(torch, case.dtype))
        self.writer = AutoregressiveWrapper(self.net)
        self.tokens = torch.tensor(self.prompts)
        if case.work == "verify":
            with torch.inference_mode():
                _, self.cache = self.net(self.tokens, return_intermediates=True)

    @torch.inference_mode()
    def write(self) -> list[list[int]]:
        found: list[list[int]] = self.writer.generate(self.tokens, self.case.new, temperature=0.0).tolist()
        return found

    @torch.inference_mode()
    def read(self) -> list[list[int]]:
        hidden = self.net(self.tokens, return_embeddings=True)[:, -1:]
        found: list[list[int]] = self.net.to_logits(hidden).argmax(-1).tolist()
        return found

    @torch.inference_mode()
    def extend(self, tokens: list[int]) -> list[list[int]]:
        given = torch.cat((self.tokens, torch.tensor([tokens] * self.case.batch)), 1)
        logits = self.net(given, cache=self.cache, cache_age=len(tokens))
        found: list[list[int]] = logits[:, -len(tokens) :].argmax(-1).tolist()
        return found

    def step(self) -> float:
        return self.training.step()


def gpt2(shape: Shape) -> Any:
    """Its decoder as a GPT-2."""
    net = _net(shape, ff_custom_activation=nn.GELU("tanh"))
    found = {name.removeprefix("transformer."): value for name, value in stored(shape).items()}
    with torch.no_grad():
        net.token_emb.emb.weight.copy_(found["wte.weight"])
        net.pos_emb.emb.weight.copy_(found["wpe.weight"] / net.pos_emb.scale)
        net.attn_layers.final_norm.gamma.copy_(found["ln_f.weight"] - 1)
        for number in range(shape.layers):
            layer = _layer(found, f"h.{number}.")
            attention, feedforward = _sublayers(net, number)
            attention[0][0].gamma.copy_(layer["ln_1.weight"] - 1)
            feedforward[0][0].gamma.copy_(layer["ln_2.weight"] - 1)
            query, key, value = layer["attn.c_attn.weight"].T.chunk(3)
            _attend(attention[1], query, key, value, layer["attn.c_proj.weight"].T)
            up, down = _ends(feedforward[1])
            up.weight.copy_(layer["mlp.c_fc.weight"].T)
            up.bias.copy_(layer["mlp.c_fc.bias"])
            down.weight.copy_(layer["mlp.c_proj.weight"].T)
            down.bias.copy_(layer["mlp.c_proj.bias"])
    return net


def llama(shape: Shape) -> Any:
    """Its decoder as a Llama."""
    net = _net(
        shape, use_rmsnorm=True, rotary_pos_emb=True, rotary_emb_dim=shape.head_width, ff_glu=True, ff_swish=True,
        ff_no_bias=True,
    )  # fmt: skip
    found = {name.removeprefix("model."): value for name, value in stored(shape).items()}
    with torch.no_grad():
        net.token_emb.emb.weight.copy_(found["embed_tokens.weight"])
        net.attn_layers.final_norm.g.copy_(found["norm.weight"] - 1)
        for number in range(shape.layers):
            layer = _layer(found, f"layers.{number}.")
            attention, feedforward = _sublayers(net, number)
            attention[0][0].g.copy_(layer["input_layernorm.weight"] - 1)
            feedforward[0][0].g.copy_(layer["post_attention_layernorm.weight"] - 1)
            query, key, value, output = (layer[f"self_attn.{name}_proj.weight"] for name in "qkvo")
            query, key = interleaved(query, shape.heads), interleaved(key, shape.key_value_heads)
            query, output = dealt(query, shape), dealt(output.T, shape).T
            _attend(attention[1], query, key, value, output)
            up, down = _ends(feedforward[1])
            up.proj.weight.copy_(torch.cat([layer[f"mlp.{name}_proj.weight"] for name in ("up", "gate")]))
            up.proj.bias.zero_()
            down.weight.copy_(layer["mlp.down_proj.weight"])
    return net


def dealt(weight: Tensor, shape: Shape) -> Tensor:
    """Rows by query head, dealt out to the keys' heads in turn: here neighbours do not share a head of the keys."""
    grouped = weight.view(shape.key_value_heads, -1, shape.head_width, weight.shape[1])
    return grouped.transpose(0, 1).reshape(weight.shape)


def _net(shape: Shape, **options: Any) -> Any:
    layers = Decoder(
        dim=shape.width, depth=shape.layers, heads=shape.heads, attn_dim_head=shape.head_width, attn_flash=True,
        attn_kv_heads=shape.key_value_heads, ff_mult=shape.hidden / shape.width, **options,
    )  # fmt: skip
    return TransformerWrapper(
        num_tokens=shape.vocabulary,
        max_seq_len=shape.length,
        attn_layers=layers,
        tie_embedding=True,
        tie_embedding_scale=1.0,
    )


def _layer(found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def _sublayers(net: Any, number: int) -> tuple[Any, Any]:
    return net.attn_layers.layers[2 * number], net.attn_layers.layers[2 * number + 1]


def _ends(feedforward: Any) -> tuple[Any, Any]:
    """The map up (with its activation where it is gated) and the map down."""
    first = feedforward.ff[0]
    up = first[0] if isinstance(first, nn.Sequential) else first
    return up, [one for one in feedforward.ff if isinstance(one, nn.Linear)][-1]


def _attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
    for part, weight in (("to_q", query), ("to_k", key), ("to_v", value), ("to_out", output)):
        getattr(attention, part).weight.copy_(weight)
