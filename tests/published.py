"""Small models of random weights as transformers saves them: one or more for each family that is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationMixin

transformers.logging.set_verbosity_error()

_FOLDERS = TemporaryDirectory(prefix="published-")  # gone when the process ends
VOCABULARY = 64
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PAIR = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
PAIR |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
GATED = SIZES | {"intermediate_size": 48, "max_position_embeddings": 160, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 160}
OPT = SIZES | {"ffn_dim": 48, "max_position_embeddings": 160}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"num_decoder_layers": 1, "decoder_start_token_id": 0}
BERT = SIZES | {"intermediate_size": 48, "max_position_embeddings": 100}
VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIT |= {"image_size": 16, "patch_size": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}


@dataclass(frozen=True)
class Spec:
    """How to make a model: its class, its configuration's settings, whether it writes text.

    seed: of its weights. generation: settings of generation besides.
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    writes: bool = True
    seed: int = 0
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Any:
        cls = getattr(transformers, self.kind)
        return cls.config_class(**self.settings)


SPECS: dict[str, Spec] = {
    "gpt2": Spec("GPT2LMHeadModel", GPT2 | ENDS),
    "gpt2-scaled": Spec("GPT2LMHeadModel", GPT2 | ENDS | {"scale_attn_by_inverse_layer_idx": True, "n_inner": 40}),
    "gpt-neox": Spec("GPTNeoXForCausalLM", GATED | ENDS),
    "gpt-neox-in-turn": Spec(
        "GPTNeoXForCausalLM", GATED | ENDS | {"use_parallel_residual": False, "rotary_pct": 0.5}
    ),
    "llama": Spec("LlamaForCausalLM", GATED | ENDS),
    "llama3": Spec("LlamaForCausalLM", GATED | ENDS | {"rope_parameters": LLAMA3}),
    "llama-linear": Spec(
        "LlamaForCausalLM",
        GATED | ENDS | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0}},
    ),
    "llama-tied-biased": Spec(
        "LlamaForCausalLM",
        GATED | ENDS | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 10},
    ),
    "mistral": Spec("MistralForCausalLM", GATED | ENDS | {"sliding_window": 7}),
    "mistral-full": Spec("MistralForCausalLM", GATED | ENDS | {"sliding_window": None}),
    "qwen2": Spec("Qwen2ForCausalLM", GATED | ENDS | {"tie_word_embeddings": True}),
    "qwen2-windows": Spec(
        "Qwen2ForCausalLM", GATED | ENDS | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "qwen3": Spec("Qwen3ForCausalLM", GATED | ENDS | {"head_dim": 12}),
    "qwen3-yarn": Spec("Qwen3ForCausalLM", GATED | ENDS | {"head_dim": 16, "rope_parameters": YARN}),
    "gemma2": Spec(
        "Gemma2ForCausalLM",
        GATED | ENDS | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 20}
        | {"attn_logit_softcapping": 3.0},
    ),
    "opt": Spec("OPTForCausalLM", OPT | ENDS),
    "opt-350m": Spec("OPTForCausalLM", OPT | ENDS | {"word_embed_proj_dim": 20, "do_layer_norm_before": False}),
    "bloom": Spec("BloomForCausalLM", {"vocab_size": VOCABULARY, "hidden_size": 36, "n_layer": 2, "n_head": 6} | ENDS),
    "mixtral": Spec("MixtralForCausalLM", GATED | ENDS | EXPERTS | {"sliding_window": 9}),
    "olmoe": Spec("OlmoeForCausalLM", GATED | ENDS | {"num_experts": 4, "num_experts_per_tok": 2}),
    "mamba2": Spec(
        "Mamba2ForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16}
        | {"state_size": 8, "n_groups": 2} | ENDS,
    ),
    "t5": Spec("T5ForConditionalGeneration", T5 | {"eos_token_id": 1, "pad_token_id": 0}, seed=1),
    "t5-v1.1": Spec(
        "T5ForConditionalGeneration",
        T5 | {"eos_token_id": 1, "pad_token_id": 0, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bart": Spec("BartForConditionalGeneration", PAIR | {"max_position_embeddings": 160, "forced_eos_token_id": None}),
    "bart-forced": Spec(
        "BartForConditionalGeneration",
        PAIR | {"max_position_embeddings": 160, "forced_eos_token_id": None, "scale_embedding": True},
        generation={"forced_bos_token_id": 0},
    ),
    "marian": Spec(
        "MarianMTModel",
        PAIR | {"max_position_embeddings": 160, "forced_eos_token_id": None, "pad_token_id": 63, "eos_token_id": 0}
        | {"decoder_start_token_id": 63, "activation_function": "swish", "scale_embedding": True},
    ),
    "marian-apart": Spec(
        "MarianMTModel",
        PAIR | {"max_position_embeddings": 160, "forced_eos_token_id": None, "pad_token_id": 59, "eos_token_id": 0}
        | {"decoder_start_token_id": 59, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 60},
    ),
    "whisper": Spec(
        "WhisperForConditionalGeneration",
        PAIR | {"num_mel_bins": 8, "max_source_positions": 30, "max_target_positions": 160, "pad_token_id": 1}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "suppress_tokens": [5, 6]}
        | {"begin_suppress_tokens": [7, 2]},
    ),
    "bert": Spec("BertModel", BERT, writes=False),
    "bert-words": Spec("BertForMaskedLM", BERT, writes=False),
    "bert-classes": Spec("BertForSequenceClassification", BERT | {"num_labels": 3}, writes=False),
    "roberta": Spec("RobertaModel", BERT, writes=False),
    "roberta-words": Spec("RobertaForMaskedLM", BERT | {"type_vocab_size": 1}, writes=False),
    "roberta-classes": Spec("RobertaForSequenceClassification", BERT | {"num_labels": 3}, writes=False),
    "vit": Spec("ViTModel", VIT, writes=False),
    "vit-classes": Spec("ViTForImageClassification", VIT | {"image_size": [16, 20], "num_labels": 3}, writes=False),
}
WRITERS = sorted(name for name, spec in SPECS.items() if spec.writes)
READERS = sorted(name for name, spec in SPECS.items() if not spec.writes)
DECODERS = sorted(name for name in WRITERS if not SPECS[name].config.is_encoder_decoder)


@torch.no_grad()
def randomised(model: Any, seed: int = 0) -> Any:
    """The model with weights that make its text vary; tables that are computed, and what is stored as powers, stay."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        computed = "embed_positions" in name and "Marian" in type(model).__name__
        if computed or name.endswith(("A_log", "dt_bias", ".D")):
            continue
        noise = torch.randn(parameter.shape, generator=random)
        norm = parameter.ndim == 1 and "norm" in name.lower() and not name.endswith("bias")
        # Small embeddings and biases, large maps: otherwise every token repeats itself, or the biases speak alone.
        table = any(part in name for part in ("shared", "wte", "embed_tokens", "word_embeddings", "embeddings.weight"))
        scale = 0.1 if table else 0.05 if name.endswith("bias") else 0.5
        parameter.copy_(1 + 0.2 * noise if norm and "Gemma" not in type(model).__name__ else scale * noise)
    for name, buffer in model.named_buffers():
        if name == "final_logits_bias":
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=random))
    return model.eval()


@cache
def saved(name: str) -> tuple[Any, Path]:
    """The model of that name by transformers, and the folder in which it is saved."""
    spec = SPECS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = randomised(getattr(transformers, spec.kind)(spec.config), spec.seed)
    folder = Path(_FOLDERS.name) / name
    if spec.generation:
        theirs.generation_config.update(**spec.generation)
    theirs.save_pretrained(folder)
    return theirs, folder


def tokens(rows: int, time: int, seed: int = 0) -> Tensor:
    """Random tokens that are no special ones."""
    return torch.randint(8, 58, (rows, time), generator=torch.Generator().manual_seed(seed))


def sources(name: str, lengths: Sequence[int]) -> list[Any]:
    """Prompts of a model: token ids, or features of recordings (all of one length)."""
    if name.startswith("whisper"):
        random = torch.Generator().manual_seed(3)
        return [torch.randn(8, 60, generator=random) for _ in lengths]
    return [tokens(1, length, seed)[0].tolist() for seed, length in enumerate(lengths)]


def is_pair(name: str) -> bool:
    """Whether the model has an encoder and a decoder."""
    return name in WRITERS and name not in DECODERS


@torch.no_grad()
def their_logits(theirs: Any, source: Tensor, target: Tensor | None = None) -> Tensor:
    """What transformers' model makes of a batch without padding."""
    kind = type(theirs).__name__
    if kind.startswith("ViT"):
        out = theirs(pixel_values=source)
    elif kind.startswith("Whisper"):
        out = theirs(input_features=source, decoder_input_ids=target)
    elif target is not None:
        out = theirs(input_ids=source, decoder_input_ids=target)
    else:
        out = theirs(input_ids=source)
    return out.logits if hasattr(out, "logits") else out.pooler_output


@torch.no_grad()
def their_text(theirs: Any, prompts: list[Any], length: int, pad: int, **more: Any) -> list[list[int]]:
    """What transformers writes, greedily unless told otherwise, after prompts of unequal lengths, up to its end."""
    options: dict[str, Any] = {"max_new_tokens": length, "do_sample": False, **more}
    pair = theirs.config.is_encoder_decoder
    if isinstance(prompts[0], Tensor):
        out = GenerationMixin.generate(theirs, input_features=torch.stack(prompts), **options)
    else:
        longest = max(map(len, prompts))
        empty = [[pad] * (longest - len(one)) for one in prompts]
        rows = [[*one, *gap] if pair else [*gap, *one] for one, gap in zip(prompts, empty, strict=True)]
        seen = [[1] * len(one) + [0] * len(gap) for one, gap in zip(prompts, empty, strict=True)]
        seen = seen if pair else [one[::-1] for one in seen]
        out = theirs.generate(input_ids=torch.tensor(rows), attention_mask=torch.tensor(seen), **options)
        out = out if pair else out[:, longest:]
    given = theirs.generation_config.eos_token_id
    ends = given if isinstance(given, list) else [given]
    written = [row[1:] if pair else row for row in out.tolist()]
    return [row[: min([row.index(end) for end in ends if end in row], default=None)] for row in written]

