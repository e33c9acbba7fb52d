"""Prompts as a model takes them: tokens, or what is heard in a recording."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formery.errors import FormeryError
from formery.models import EncoderDecoder, Model, Source
from formery.parts import Embedding, SpeechStem

Prompt = str | Sequence[int] | Tensor


def encoded(model: Model, prompt: Prompt, number: int) -> Source:
    """A prompt as the model takes it; `number` is its place in the list, for the sentence when it is no good.

    A text becomes tokens, with those around it that the model was trained with. A model that listens takes a path of
    a recording, its samples [sample] at 16 kHz, or its features [mel, frame].
    """
    stem = model.encoder.embedding if isinstance(model, EncoderDecoder) else None
    if isinstance(stem, SpeechStem):
        return heard(stem, prompt, number, getattr(model, "preprocessor", None))
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise FormeryError("this model has no tokenizer: give prompts as token ids.")
        tokens = model.tokenizer.prompt(prompt)
        if model.reads_apart and not model.tokenizer.wraps and model.tokenizer.eos is not None:
            tokens = [*tokens, model.tokenizer.eos]
    else:
        tokens = [*map(int, prompt)]
    if not tokens or (isinstance(prompt, str) and not prompt.strip()):
        raise FormeryError(f"prompt {number} is empty: give the model something to read.")
    known = stem.vocabulary if isinstance(stem, Embedding) else model.vocabulary
    if wrong := [token for token in tokens if not 0 <= token < known]:
        raise FormeryError(f"prompt {number} has token {wrong[0]}; this model knows 0 to {known - 1}.")
    return tokens


def asked(model: Model, text: str, name: str) -> list[int]:
    """The tokens of a chat that opens with this text; raises FormeryError for a model that is not made for chats."""
    if model.tokenizer is None or model.tokenizer.chat_template is None:
        raise FormeryError(f"{name} has no chat template: it is not made for chats; give the prompt without one.")
    return model.tokenizer.chat([{"role": "user", "content": text}])


def heard(stem: SpeechStem, prompt: Prompt, number: int, preprocessor: dict[str, Any] | None) -> Tensor:
    """What the model hears in a recording: log-mel features, padded or cut to its length."""
    from formery.data.audio import LogMel, read_audio

    usual = LogMel()
    # The stem halves the number of frames.
    seconds = max(1, 2 * stem.length * usual.hop // usual.rate)
    told = LogMel(mels=stem.mels, seconds=seconds) if preprocessor is None else LogMel.from_config(preprocessor)
    if isinstance(prompt, str):
        prompt = read_audio(prompt, told.rate)
    if not isinstance(prompt, Tensor) or prompt.ndim not in (1, 2):
        raise FormeryError(f"prompt {number}: this model listens; give the path of a recording, or its samples.")
    if prompt.ndim == 2:
        return prompt
    return told.features(prompt.to(torch.float32))
