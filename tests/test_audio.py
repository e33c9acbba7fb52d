"""Recordings are read sample for sample, resampled as the continuous signal is, and turned into Whisper's features."""

import importlib.util
import io
import math
import os
import sys
import tarfile
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import WhisperFeatureExtractor
from transformers.audio_utils import mel_filter_bank

from formery.data import sources
from formery.data.audio import LARGEST_SPECTRUM, LogMel, mel_filters, read_audio, resample
from formery.errors import FormeryError

real_data = pytest.mark.skipif(
    not os.environ.get("FORMERY_DATA"), reason="FORMERY_DATA names no folder of real data"
)


def wav(samples: numpy.ndarray, width: int, rate: int = 16_000) -> bytes:
    """A WAV file of integers of `width` bytes; samples: (time, channel), each in the range of that width."""
    if width == 1:
        data = (samples + 128).astype("u1").tobytes()
    else:
        data = b"".join(int(one).to_bytes(width, "little", signed=True) for one in samples.flatten())
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((samples.shape[1], width, rate, 0, "NONE", ""))
        file.writeframes(data)
    return stream.getvalue()


def integers(width: int, count: int = 300, channels: int = 1) -> numpy.ndarray:
    """Random samples of that width with both extremes among them."""
    top = 2 ** (8 * width - 1)
    samples = numpy.random.default_rng(0).integers(-top, top, (count, channels))
    samples[:2] = [[-top], [top - 1]]
    return samples


def tone(frequency: float, rate: int, seconds: float = 1.0, phase: float = 0.3) -> Tensor:
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    return torch.cos(2 * math.pi * frequency * time + phase)


@pytest.fixture
def without_soundfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)


# -------------------------------------------------------------------------------------------------- recordings


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_integer_samples_are_read_as_they_were_written(
    tmp_path: Path, width: int, channels: int, without_soundfile: None
) -> None:
    samples = integers(width, channels=channels)
    (tmp_path / "a.wav").write_bytes(wav(samples, width))
    read = read_audio(tmp_path / "a.wav")
    expected = (samples / 2 ** (8 * width - 1)).mean(1)
    assert read.dtype == torch.float32 and read.abs().max() <= 1
    numpy.testing.assert_allclose(read.numpy(), expected, rtol=0, atol=1e-7)
    assert channels > 1 or width == 4 or numpy.array_equal(read.numpy(), expected)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_both_ways_of_reading_agree(tmp_path: Path, width: int) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    samples = integers(width, channels=2)
    (tmp_path / "a.wav").write_bytes(wav(samples, width))
    other, rate = soundfile.read(tmp_path / "a.wav", dtype="float64", always_2d=True)
    assert rate == 16_000
    numpy.testing.assert_allclose(read_audio(str(tmp_path / "a.wav")).numpy(), other.mean(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "format", "subtype", "error"),
    [
        ("a.flac", "FLAC", "PCM_16", 1e-4),
        ("a.ogg", "OGG", "VORBIS", 0.1),
        ("a.mp3", "MP3", "MPEG_LAYER_III", 0.1),
        ("float.wav", "WAV", "FLOAT", 1e-6),
        ("extensible.wav", "WAVEX", "PCM_24", 1e-6),
        ("flac under another name.raw", "FLAC", "PCM_24", 1e-6),
    ],
)
def test_other_kinds_of_audio(
    tmp_path: Path, name: str, format: str, subtype: str, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    sound = 0.5 * torch.stack([tone(440, 16_000, 3), tone(440, 16_000, 3, phase=1.2)], 1)
    soundfile.write(tmp_path / name, sound.numpy(), 16_000, format=format, subtype=subtype)
    read = read_audio(tmp_path / name)
    assert read.shape == (48_000,)
    assert (read - sound.mean(1))[1000:-1000].abs().max() < error
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormeryError, match="cut off|damaged"):
        read_audio(tmp_path / name)
    monkeypatch.setitem(sys.modules, "soundfile", None)
    if format != "WAVEX" or sys.version_info < (3, 12):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FormeryError, match=r"pip install 'formery\[audio\]'"):
            read_audio(tmp_path / name)


def test_floats_are_clipped_and_must_be_finite(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    path = tmp_path / "a.wav"
    soundfile.write(path, numpy.array([0.5, 1.5, -3.0]), 16_000, subtype="FLOAT")
    assert read_audio(path).tolist() == [0.5, 1, -1]
    for wrong in (math.nan, math.inf):
        soundfile.write(path, numpy.array([0.5, wrong]), 16_000, subtype="FLOAT")
        with pytest.raises(FormeryError, match="not finite"):
            read_audio(path)


def test_a_header_that_promises_too_much_allocates_nothing(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile", reason="the extra `audio` is not installed")
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(440, 16_000).numpy(), 16_000)
    content = bytearray(path.read_bytes())
    content[21] |= 0x0F  # the 36 bits that count the samples
    content[22:26] = b"\xff" * 4
    path.write_bytes(content)
    with pytest.raises(FormeryError, match="cut off|damaged"):
        read_audio(path)


def test_a_cut_wav_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    content = wav(integers(2, count=20), 2)
    for length in range(len(content)):
        (tmp_path / "a.wav").write_bytes(content[:length])
        with pytest.raises(FormeryError):
            read_audio(tmp_path / "a.wav")
    with pytest.raises(FormeryError, match="header promises 40 bytes of samples, 39 are there"):
        read_audio(tmp_path / "a.wav")


@given(st.dictionaries(st.integers(0, 43), st.integers(0, 255), max_size=4), st.booleans())
def test_a_damaged_header_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, changes: dict[int, int], alone: bool
) -> None:
    content = bytearray(wav(integers(2, count=50), 2, 8_000))
    for place, byte in changes.items():
        content[place] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.wav"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        if alone:
            patch.setitem(sys.modules, "soundfile", None)
        try:
            read = read_audio(path)
        except FormeryError:
            return
    assert 0 < len(read) <= 200 * 16 and read.isfinite().all() and read.abs().max() <= 1


def test_what_is_no_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormeryError, match=r"no file .*absent\.wav"):
        read_audio(tmp_path / "absent.wav")
    with pytest.raises(FormeryError, match="no file"):
        read_audio(tmp_path)
    (tmp_path / "empty.wav").write_bytes(wav(integers(2)[:0], 2))
    with pytest.raises(FormeryError, match="empty"):
        read_audio(tmp_path / "empty.wav")
    for rate in (0, 999, 2_000_000_000):
        (tmp_path / "rate.wav").write_bytes(wav(integers(2), 2, max(rate, 1)))
        with pytest.raises(FormeryError, match="must lie between"):
            read_audio(tmp_path / "rate.wav")
        with pytest.raises(FormeryError, match="asked for"):
            read_audio(tmp_path / "rate.wav", rate)
    (tmp_path / "text.wav").write_text("These are words, not sounds.\n" * 20)
    if importlib.util.find_spec("soundfile"):
        with pytest.raises(FormeryError, match=r"text\.wav is no recording"):
            read_audio(tmp_path / "text.wav")
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(FormeryError, match=r"text\.wav is no PCM WAV file.*pip install 'formery\[audio\]'"):
        read_audio(tmp_path / "text.wav")


# -------------------------------------------------------------------------------------------------- resampling

RATES = [8_000, 11_025, 16_000, 22_050, 24_000, 44_100, 48_000]


@given(st.sampled_from(RATES), st.sampled_from(RATES), st.floats(0, 0.9), st.floats(0, 6.3))
def test_a_tone_stays_the_same_tone(before: int, after: int, fraction: float, phase: float) -> None:
    frequency = fraction * min(before, after) / 2
    resampled = resample(tone(frequency, before, 0.25, phase), before, after)
    exact = tone(frequency, after, 0.25, phase)[: len(resampled)]
    inner = slice(after // 12, -after // 12)
    assert len(resampled) == math.ceil(round(before * 0.25) * after / before)
    assert (resampled[: len(exact)] - exact)[inner].abs().max() < 2e-5


@given(st.sampled_from([(44_100, 16_000), (48_000, 16_000), (16_000, 8_000), (44_100, 22_050)]), st.floats(0, 1))
def test_what_the_new_rate_cannot_hold_vanishes(rates: tuple[int, int], fraction: float) -> None:
    before, after = rates
    frequency = (after + fraction * (before - after)) / 2
    resampled = resample(tone(frequency, before, 0.25), before, after)
    assert resampled[after // 12 : -after // 12].abs().max() < 2e-5


def test_440_hertz_through_a_file(tmp_path: Path) -> None:
    for rate in (8_000, 44_100):
        samples = (0.5 * 2**15 * tone(440, rate)).round().numpy().astype(int)[:, None]
        (tmp_path / "a.wav").write_bytes(wav(samples, 2, rate))
        read = read_audio(tmp_path / "a.wav")
        exact = 0.5 * tone(440, 16_000)
        assert read.shape == exact.shape
        both = torch.stack([read.double(), exact])[:, 500:-500]
        assert torch.corrcoef(both)[0, 1] > 0.999999
        assert (both[0] - both[1]).abs().max() < 1e-4


@given(st.integers(1_000, 3_000), st.integers(1_000, 3_000), st.integers(1, 400), st.integers(0, 2**31))
def test_any_two_rates_follow_the_written_sum(before: int, after: int, count: int, seed: int) -> None:
    samples = torch.randn(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cutoff = 0.95 * min(1, after / before)
    resampled = resample(samples, before, after)
    assert len(resampled) == math.ceil(count * after / before) or before == after
    for n in {0, len(resampled) // 2, len(resampled) - 1}:
        offset = torch.arange(count, dtype=torch.float64) - n * before / after
        inside = 1 - (offset * cutoff / 64) ** 2
        window = numpy.i0(10.06 * inside.clamp(min=0).sqrt().numpy()) / numpy.i0(10.06)
        taps = cutoff * numpy.sinc(cutoff * offset.numpy()) * window * (inside.numpy() > 0)
        exact = samples[n].item() if before == after else (samples.numpy() * taps).sum()
        assert resampled[n].item() == pytest.approx(exact, abs=1e-9)


# ---------------------------------------------------------------------------------------------------- features


def reference(samples: Tensor, **settings: int) -> Tensor:
    extractor = WhisperFeatureExtractor(**settings)
    rate = extractor.sampling_rate
    return extractor(samples.numpy(), sampling_rate=rate, return_tensors="pt").input_features[0]


def sounds() -> dict[str, Tensor]:
    noise = 0.1 * torch.randn(31 * 16_000, generator=torch.Generator().manual_seed(0))
    return {
        "noise": noise[: 5 * 16_000],
        "tones": (0.5 * tone(440, 16_000, 2) + 0.1 * tone(5_000, 16_000, 2)).float(),
        "one sample": noise[:1],
        "shorter than the mirror": noise[:150],
        "exact": noise[: 30 * 16_000],
        "too long": noise,
        "silence": torch.zeros(4_000),
        "float64": noise[:50_000].double(),
    }


@pytest.mark.parametrize("name", sounds())
@pytest.mark.parametrize("mels", [80, 128])
def test_features_equal_transformers(name: str, mels: int) -> None:
    samples = sounds()[name]
    features = LogMel(mels=mels).features(samples)
    assert features.shape == (mels, 3000) and features.dtype == torch.float32
    torch.testing.assert_close(features, reference(samples, feature_size=mels), rtol=0, atol=1e-4)


@given(
    st.sampled_from([16_000, 22_050, 24_000, 48_000]),
    st.integers(50, 400).map(lambda half: 2 * half),
    st.integers(50, 400),
    st.integers(2, 60),  # of one band the reference makes a square of samples
    st.integers(1, 40_000),
)
@pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values")
def test_any_settings_equal_transformers(rate: int, fft: int, hop: int, mels: int, count: int) -> None:
    config = {
        "sampling_rate": rate, "n_fft": fft, "hop_length": min(hop, fft), "feature_size": mels, "chunk_length": 1
    }  # fmt: skip
    made = LogMel.from_config(config)
    samples = 0.1 * torch.randn(count, generator=torch.Generator().manual_seed(count))
    features = made.features(samples)
    assert features.shape == (mels, made.frames)
    torch.testing.assert_close(features, reference(samples, **config), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mels", [80, 128])
def test_the_formula_in_float64(mels: int) -> None:
    samples = sounds()["noise"].double().numpy()[:16_000]
    padded = numpy.pad(samples, 200, mode="reflect")
    window = 0.5 - 0.5 * numpy.cos(2 * numpy.pi * numpy.arange(400) / 400)
    frames = [numpy.fft.rfft(window * padded[start : start + 400]) for start in range(0, 16_000, 160)]
    filters = mel_filter_bank(201, mels, 0.0, 8_000.0, 16_000, norm="slaney", mel_scale="slaney")
    logarithm = numpy.log10(numpy.maximum(filters.T @ (numpy.abs(frames) ** 2).T, 1e-10))
    expected = (numpy.maximum(logarithm, logarithm.max() - 8) + 4) / 4
    features = LogMel(mels=mels, seconds=1).features(torch.from_numpy(samples).float())
    numpy.testing.assert_allclose(features.numpy(), expected, rtol=0, atol=3e-5)
    numpy.testing.assert_allclose(mel_filters(16_000, 400, mels).numpy(), filters.T, rtol=1e-4, atol=1e-8)


@given(st.floats(100, 7_500))
def test_a_tone_is_loudest_in_its_own_band(frequency: float) -> None:
    mel = LogMel(seconds=1)
    loudest = mel.features(tone(frequency, 16_000).float()).mean(1).argmax()
    bin_width = mel.rate / mel.fft
    heard = mel_filters(mel.rate, mel.fft, mel.mels)[loudest].nonzero()[:, 0] * bin_width
    assert heard.min() - bin_width <= frequency <= heard.max() + bin_width


def test_a_published_config_is_read() -> None:
    config = WhisperFeatureExtractor(feature_size=128).to_dict()
    assert LogMel.from_config(config) == LogMel(mels=128)
    assert LogMel.from_config({}) == LogMel() and LogMel().frames == 3000


WRONG: list[tuple[str, Any]] = [
    *[(key, value) for key in ("sampling_rate", "n_fft", "hop_length", "feature_size", "chunk_length")
      for value in (0, -1, 10**9, 2.0, "80", None, True, [80] * 1000, math.nan)],
    ("n_fft", 401), ("n_fft", 158), ("hop_length", 402),
    ("padding_value", 1.0), ("padding_value", math.nan), ("dither", 1e-4), ("dither", None),
    ("feature_extractor_type", "Wav2Vec2FeatureExtractor"), ("feature_extractor_type", 3),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_config_names_its_key(key: str, value: object) -> None:
    with pytest.raises(FormeryError, match=key) as caught:
        LogMel.from_config({"feature_size": 80, key: value})
    assert len(str(caught.value)) < 200


def test_settings_that_need_too_much_memory_are_refused() -> None:
    with pytest.raises(FormeryError, match=f"more than {LARGEST_SPECTRUM} numbers"):
        LogMel(hop=1, seconds=30)
    with pytest.raises(FormeryError, match="at most all samples, 1000"):
        LogMel(rate=1000, fft=1002, seconds=1)
    with pytest.raises(FormeryError, match="not keys and values"):
        LogMel.from_config([80])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "samples",
    [
        torch.zeros(0),
        torch.zeros(2, 16_000),
        torch.tensor(0.5),
        torch.zeros(16_000, dtype=torch.int16),
        torch.tensor([0, math.nan]),
        torch.tensor([0, -math.inf]),
        torch.tensor([0, 1e300], dtype=torch.float64),
    ],
)
def test_features_need_a_row_of_finite_samples(samples: Tensor) -> None:
    with pytest.raises(FormeryError, match="finite|one row"):
        LogMel().features(samples)


@real_data
def test_spoken_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(sources.find("speech_fsdd/recordings.tar.xz"), "r|xz") as archive:
        files = (member for member in archive if member.name.endswith(".wav"))
        for index, member in zip(range(8), files, strict=False):
            stream = archive.extractfile(member)
            assert stream is not None
            path = tmp_path / f"{index}.wav"
            path.write_bytes(stream.read())
    for path in sorted(tmp_path.glob("*.wav")):
        narrow, wide = read_audio(path, 8_000), read_audio(path)
        assert len(wide) == 2 * len(narrow) and narrow.abs().max() > 0.01
        # What was below 4 kHz is there as before; nothing was added above.
        before = torch.fft.rfft(narrow.double()).abs()
        after = torch.fft.rfft(wide.double()).abs() / 2
        kept = len(before) * 9 // 10
        assert torch.corrcoef(torch.stack([before[:kept], after[:kept]]))[0, 1] > 0.999
        assert after[len(before) :].square().sum() < 1e-4 * after.square().sum()
        features = LogMel().features(wide)
        assert features.isfinite().all() and features.max() - features.min() <= 2
        torch.testing.assert_close(features, reference(wide), rtol=0, atol=1e-4)
