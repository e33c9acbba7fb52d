"""Audio in, log-mel features out: recordings as samples at one rate, and the spectrogram that speech models read."""

import importlib
import io
import math
import wave
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from formery.errors import FormeryError

LOWEST_RATE, HIGHEST_RATE = 1_000, 384_000
# The low-pass filter of `resample`: flat to 0.9 of the lower Nyquist frequency, 100 dB down from it on.
ZERO_CROSSINGS = 64
CUTOFF = 0.95
KAISER_BETA = 10.06
# Each setting's key in a preprocessor_config.json, and its bounds.
SETTINGS = {
    "rate": ("sampling_rate", LOWEST_RATE, HIGHEST_RATE),
    "fft": ("n_fft", 2, 2**14),
    "hop": ("hop_length", 1, 2**14),
    "mels": ("feature_size", 1, 1024),
    "seconds": ("chunk_length", 1, 3600),
}
LARGEST_SPECTRUM = 2**25


# -------------------------------------------------------------------------------------------------- recordings


def read_audio(path: str | Path, rate: int = 16_000) -> Float[Tensor, " sample"]:
    """The recording at `path`: its channels averaged, resampled to `rate` samples a second, clipped to [-1, 1].

    WAV of 8, 16, 24 or 32 bits is always read; FLAC, Ogg, MP3 and other WAV with the extra `formery[audio]`.
    Raises FormeryError for a file that is absent, no audio, cut off, empty, or holds numbers that are not finite.
    """
    _check_rate(rate, "the rate that was asked for")
    path = Path(path)
    if not path.is_file():
        raise FormeryError(f"there is no file {path} to hear; check the path.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FormeryError(f"cannot read the recording {path}: {error.strerror or error}.") from error
    samples, own_rate = _read_wave(content, path) or _read_soundfile(content, path)
    if not len(samples):
        raise FormeryError(f"the recording {path} holds no samples; it is empty or cut off.")
    if not samples.isfinite().all():
        raise FormeryError(f"the recording {path} holds samples that are not finite numbers; export it anew.")
    _check_rate(own_rate, f"the rate of the recording {path}")
    return resample(samples, own_rate, rate).clamp(-1, 1)


def _check_rate(rate: int, whose: str) -> None:
    if not LOWEST_RATE <= rate <= HIGHEST_RATE:
        raise FormeryError(f"{whose} is {rate} Hz; it must lie between {LOWEST_RATE} and {HIGHEST_RATE}.")


def _check_whole(path: Path, found: int, promised: int, what: str) -> None:
    if found < promised:
        raise FormeryError(
            f"the recording {path} is cut off: its header promises {promised} {what}, {found} are there; get it anew."
        )


def _read_wave(content: bytes, path: Path) -> tuple[Float[Tensor, " sample"], int] | None:
    """Samples and rate of an integer PCM WAV file; None where it is of another kind."""
    try:
        with wave.open(io.BytesIO(content)) as file:
            channels, width, rate, frames = file.getparams()[:4]
            data = file.readframes(frames)
    except (wave.Error, EOFError, RuntimeError):  # the last for chunks longer than the file says it is
        return None
    if width > 4:
        return None
    _check_whole(path, len(data), frames * channels * width, "bytes of samples")
    # Widened from the top, so that one scale fits every width; 8 bits alone are stored without a sign.
    wide = numpy.zeros((frames, channels, 4), dtype=numpy.uint8)
    wide[..., 4 - width :] = numpy.frombuffer(data, dtype=numpy.uint8).reshape(frames, channels, width)
    if width == 1:
        wide[..., 3] ^= 0x80
    return torch.from_numpy(wide.view("<i4")[..., 0]).float().mean(1) / 2**31, rate


def _read_soundfile(content: bytes, path: Path) -> tuple[Float[Tensor, " sample"], int]:
    """Samples and rate of whatever `soundfile` decodes, block by block: what a header promises is not allocated."""
    soundfile = _soundfile(path)
    if content[:4] == b"RIFF":  # libsndfile takes what is left of a cut WAV file; a byte of padding may be absent
        _check_whole(path, len(content) + 1, int.from_bytes(content[4:8], "little") + 8, "bytes")
    try:
        # Not by its path: the ending of a name says nothing about the content.
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            promised, rate, size = file.frames, file.samplerate, 2**20 // file.channels
            blocks = []
            while len(block := file.read(size, dtype="float32", always_2d=True)):
                blocks.append(torch.from_numpy(block).mean(1))
    except soundfile.SoundFileError as error:
        reason = str(getattr(error, "error_string", error)).rstrip(".")
        raise FormeryError(f"{path} is no recording that can be read, or a damaged one ({reason}).") from error
    samples = torch.cat([torch.empty(0), *blocks])
    _check_whole(path, len(samples), promised, "samples")
    return samples, rate


def _soundfile(path: Path) -> ModuleType:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError) as error:  # OSError: it is installed, but its C library isn't
        raise FormeryError(
            f"{path} is no PCM WAV file that can be read; other audio needs `pip install 'formery[audio]'`."
        ) from error


# -------------------------------------------------------------------------------------------------- resampling


def resample(samples: Float[Tensor, " sample"], before: int, after: int) -> Float[Tensor, " resampled"]:
    """The band-limited signal of `samples`, taken `before` times a second, at `after` times a second.

    There are ceil(samples * after / before) of them, without delay; beyond both ends lies silence. Frequencies up
    to 0.9 of the lower Nyquist frequency stay as they are, those above it vanish (-100 dB). Source: Smith and
    Gossett, 1984, A Flexible Sampling-Rate Conversion Method; a sinc under a Kaiser window, in polyphase form.
    """
    if before == after:
        return samples
    common = math.gcd(before, after)
    up, down = after // common, before // common
    cutoff = CUTOFF * min(1, after / before)
    reach = math.ceil(ZERO_CROSSINGS / cutoff)
    blocks = -(-len(samples) // down)
    padded = F.pad(samples, (reach, reach + 2 * down + 2))[None, None]
    result = samples.new_empty(blocks, up)
    # Every `up` outputs lie `down` inputs later; the places within one such block are a convolution's channels.
    for first in range(0, up, 64):
        phases = torch.arange(first, min(first + 64, up))
        start = first * down // up
        places = (phases * down - start * up).double() / up
        offsets = torch.arange(-reach, reach + math.ceil(places[-1]) + 1) - places[:, None]
        kernels = _windowed_sinc(offsets, cutoff).to(samples)
        found = F.conv1d(padded[..., start:], kernels[:, None], stride=down)
        result[:, first : first + 64] = found[0, :, :blocks].T
    return result.flatten()[: -(-len(samples) * up // down)]


def _windowed_sinc(offsets: Float[Tensor, "*shape"], cutoff: float) -> Float[Tensor, "*shape"]:
    """A low-pass filter's response at `offsets` in samples; `cutoff` is a fraction of the Nyquist frequency."""
    inside = 1 - (offsets * cutoff / ZERO_CROSSINGS) ** 2
    window = torch.i0(KAISER_BETA * inside.clamp(min=0).sqrt()) / torch.i0(offsets.new_tensor(KAISER_BETA))
    return cutoff * torch.sinc(cutoff * offsets) * window * (inside > 0)


# ---------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class LogMel:
    """The log-mel spectrogram that Whisper reads, of exactly `seconds` of sound.

    rate: samples a second; fft: samples in a window, even; hop: samples from one window to the next; mels: bands
    between 0 and 8000 Hz. Raises FormeryError for a setting out of bounds, named here and as in a
    preprocessor_config.json. Source: Radford et al. 2022, Robust Speech Recognition via Large-Scale Weak
    Supervision, section 2.2, and the code published with it.
    """

    rate: int = 16_000
    fft: int = 400
    hop: int = 160
    mels: int = 80
    seconds: int = 30

    def __post_init__(self) -> None:
        for name, (key, low, high) in SETTINGS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise FormeryError(
                    f"{name} ({key}) must be a whole number from {low} to {high}; it is {value!r:.40}."
                )
        if self.fft % 2 or not self.hop <= self.fft <= self.seconds * self.rate:
            raise FormeryError(
                f"fft (n_fft) must be even, at least hop (hop_length), {self.hop}, and at most all samples, "
                f"{self.seconds * self.rate}; it is {self.fft}."
            )
        if self.frames * (self.fft // 2 + 1) > LARGEST_SPECTRUM:
            raise FormeryError(
                f"{self.frames} frames of {self.fft // 2 + 1} frequencies are more than {LARGEST_SPECTRUM} numbers; "
                "raise hop (hop_length) or lower fft (n_fft), rate (sampling_rate) or seconds (chunk_length)."
            )

    @classmethod
    def from_config(cls, data: dict[str, Any]) -> "LogMel":
        """The settings in a `preprocessor_config.json`; an absent key has Whisper's value.

        Raises FormeryError, naming the key, for values out of bounds and for features of another kind.
        """
        if not isinstance(data, dict):
            raise FormeryError(f"the settings of the audio features are {type(data).__name__}, not keys and values.")
        kind = data.get("feature_extractor_type", "WhisperFeatureExtractor")
        if kind != "WhisperFeatureExtractor":
            raise FormeryError(f"feature_extractor_type is {kind!r:.40}; only WhisperFeatureExtractor is known.")
        for key in ("padding_value", "dither"):
            if data.get(key, 0) != 0:
                raise FormeryError(f"{key} is {data[key]!r:.40}; only 0 is known.")
        return cls(**{name: data[key] for name, (key, _, _) in SETTINGS.items() if key in data})

    @property
    def frames(self) -> int:
        """How many frames the features have."""
        return self.seconds * self.rate // self.hop

    def features(self, samples: Float[Tensor, " sample"]) -> Float[Tensor, "mel frame"]:
        """The features of `samples`, in [-1, 1] at `rate`; silence follows a short one, a long one is cut.

        They are float32, (log10 of the mel bands' power, at least 1e-10 and at most 8 below its largest, + 4) / 4,
        on the samples' device. Raises FormeryError for samples that are not a row of finite numbers.
        """
        if samples.dim() != 1 or not len(samples) or not samples.is_floating_point():
            raise FormeryError(
                f"features are made of one row of floating-point samples, not of {samples.dtype} in the shape "
                f"{tuple(samples.shape)}."
            )
        length = self.seconds * self.rate
        heard = samples[:length].float()
        if not heard.isfinite().all():
            raise FormeryError("features cannot be made of samples that are not finite numbers.")
        padded = F.pad(heard, (0, length - len(heard)))
        window = torch.hann_window(self.fft, device=samples.device)
        # Windows are centred on multiples of the hop, the signal mirrored at its ends; the last one is one too many.
        spectrum = torch.stft(padded, self.fft, self.hop, window=window, pad_mode="reflect", return_complex=True)
        power = spectrum[:, :-1].abs().square()
        bands = mel_filters(self.rate, self.fft, self.mels).to(samples.device) @ power
        logarithm = bands.clamp(min=1e-10).log10()
        return (logarithm.maximum(logarithm.max() - 8) + 4) / 4


@lru_cache(maxsize=8)
def mel_filters(rate: int, fft: int, mels: int) -> Float[Tensor, "mel frequency"]:
    """Overlapping triangles between 0 and 8000 Hz, evenly spaced in mel, each of area 1 over the frequencies in Hz.

    A mel is 200/3 Hz up to 1000 Hz; above, 27 of them multiply the frequency by 6.4. Source: Slaney, 1998,
    Auditory Toolbox.
    """
    top = 15 + 27 * math.log(8) / math.log(6.4)
    mel = torch.linspace(0, top, mels + 2, dtype=torch.float64)
    corners = torch.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    frequency = torch.arange(fft // 2 + 1, dtype=torch.float64) * rate / fft
    rising, falling = (frequency - left) / (middle - left), (right - frequency) / (right - middle)
    return (rising.minimum(falling).clamp(min=0) * 2 / (right - left)).float()
