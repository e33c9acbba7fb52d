"""The stored weights as a file for llama.cpp."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from bench.shapes import Shape
from bench.weights import interleaved, stored
from formery.files import atomic_write

TYPES = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
GPT2 = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
LLAMA = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
OUTSIDE = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
}  # fmt: skip


def written(shape: Shape, dtype: str) -> Path:
    """The file with all matrices in llama.cpp's type for that dtype."""
    place = shape.folder().with_name(f"{shape.folder().name}-{TYPES[dtype]}.gguf")
    if not place.is_file():
        with atomic_write(place) as temporary:
            _write(shape, getattr(gguf.GGMLQuantizationType, TYPES[dtype]), temporary)
    return place


def _write(shape: Shape, kind: Any, place: Path) -> None:
    writer = gguf.GGUFWriter(place, shape.kind)
    writer.add_context_length(shape.length)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.key_value_heads)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    if shape.kind == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_dimension_count(shape.head_width)
    for name, weight in tensors(shape):
        array = np.ascontiguousarray(weight.float().numpy())
        if weight.ndim == 2 and not name.startswith("position") and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(shape: Shape) -> Iterator[tuple[str, Tensor]]:
    """Each weight under llama.cpp's name and in its layout."""
    for full, weight in stored(shape).items():
        bare, ending = full.rsplit(".", 1)
        if bare in OUTSIDE:
            yield f"{OUTSIDE[bare]}.{ending}", weight
        elif bare.startswith("transformer.h."):
            number, inner = bare.removeprefix("transformer.h.").split(".", 1)
            yield f"blk.{number}.{GPT2[inner]}.{ending}", weight.T if weight.ndim == 2 else weight
        elif bare.startswith("model.layers."):
            number, inner = bare.removeprefix("model.layers.").split(".", 1)
            heads = {"self_attn.q_proj": shape.heads, "self_attn.k_proj": shape.key_value_heads}.get(inner)
            yield f"blk.{number}.{LLAMA[inner]}.{ending}", interleaved(weight, heads) if heads else weight
