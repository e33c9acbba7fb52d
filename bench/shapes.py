"""The models that are timed: their shapes, and folders with random weights as `transformers` saves them."""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from formery.files import atomic_folder

SEED = 0
EDITION = 1  # raise it when a shape or its weights change: older folders are then left alone
Kind = Literal["gpt2", "llama", "marian"]
CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "marian": "MarianMTModel"}


@dataclass(frozen=True)
class Shape:
    """How large a model is; `layers` on each side of an encoder-decoder, `hidden` within the feed-forward."""

    name: str
    kind: Kind
    vocabulary: int
    width: int
    layers: int
    heads: int
    key_value_heads: int
    hidden: int
    length: int = 1024
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def head_width(self) -> int:
        """How wide one head is."""
        return self.width // self.heads

    @property
    def attention(self) -> int:
        """Weights of one self-attention's matrices."""
        return 2 * self.width * self.width + 2 * self.width * self.key_value_heads * self.head_width

    @property
    def feedforward(self) -> int:
        """Weights of one feed-forward's matrices."""
        return (3 if self.kind == "llama" else 2) * self.width * self.hidden

    @property
    def stack(self) -> int:
        """Weights that every token passes, in all layers of one side, without cross-attention."""
        return self.layers * (self.attention + self.feedforward)

    @property
    def crossing(self) -> int:
        """Half the weights of all cross-attention: the queries and outputs, or the keys and values."""
        return self.layers * 2 * self.width * self.width

    @property
    def output(self) -> int:
        """Weights of the output matrix."""
        return self.vocabulary * self.width

    @cached_property
    def config(self) -> Any:
        """The configuration as `transformers` knows it; nothing in it ends a text."""
        import transformers

        return getattr(transformers, CLASSES[self.kind]).config_class(**{**_SETTINGS[self.kind](self), **self.settings})

    def folder(self) -> Path:
        """Where the weights are; they are drawn and written there the first time."""
        place = home() / f"{self.name}-{EDITION}"
        if not (place / "config.json").is_file():
            self._write(place)
        return place

    def _write(self, place: Path) -> None:
        import torch
        import transformers

        transformers.logging.disable_progress_bar()
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            model = getattr(transformers, CLASSES[self.kind])(self.config)
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
        with atomic_folder(place) as temporary:
            model.save_pretrained(temporary)


def home() -> Path:
    """The folder of all weights: $FORMERY_BENCH, or one in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FORMERY_BENCH") or Path(cache) / "formery" / "bench")


def _gpt2(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary, "n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads,
        "n_inner": shape.hidden, "n_positions": shape.length, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _llama(shape: Shape) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocabulary, "hidden_size": shape.width, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.key_value_heads,
        "intermediate_size": shape.hidden, "max_position_embeddings": shape.length, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def _marian(shape: Shape) -> dict[str, Any]:
    padding = shape.vocabulary - 1
    return {
        "vocab_size": shape.vocabulary, "d_model": shape.width, "encoder_layers": shape.layers,
        "decoder_layers": shape.layers, "encoder_attention_heads": shape.heads,
        "decoder_attention_heads": shape.heads, "encoder_ffn_dim": shape.hidden, "decoder_ffn_dim": shape.hidden,
        "max_position_embeddings": shape.length, "activation_function": "swish", "scale_embedding": True,
        "pad_token_id": padding, "decoder_start_token_id": padding, "eos_token_id": None,
        "forced_eos_token_id": None,
    }  # fmt: skip


_SETTINGS = {"gpt2": _gpt2, "llama": _llama, "marian": _marian}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gpt2-124m", "gpt2", 50257, 768, 12, 12, 12, 3072),
        Shape("llama-100m", "llama", 32000, 768, 12, 12, 4, 2048),
        Shape("marian-48m", "marian", 8001, 512, 6, 8, 8, 2048, 512),
        Shape("llama-10m", "llama", 4096, 320, 7, 5, 5, 864),
        Shape("gpt2-tiny", "gpt2", 128, 64, 2, 2, 2, 128, 256),
        Shape("llama-tiny", "llama", 128, 64, 2, 2, 1, 128, 256),
        Shape("marian-tiny", "marian", 65, 64, 2, 2, 2, 128, 256),
    )
}
