"""A model that listens: recordings in, text out, as transformers hears and writes it."""

import copy
import tarfile
from pathlib import Path

import numpy
import pytest
import torch
from published import SPECS, randomised
from transformers import GenerationMixin, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import formery
from formery.data.audio import read_audio
from formery.data.sources import find
from formery.errors import FormeryError
from formery.generate.prompts import heard
from formery.models.hub.export import export


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[WhisperForConditionalGeneration, Path]:
    """A small model that hears as the published ones do: 80 bands, 30 seconds; begins with a language and a task."""
    settings = SPECS["whisper"].settings | {"num_mel_bins": 80, "max_source_positions": 1500}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = randomised(WhisperForConditionalGeneration(WhisperConfig(**settings)))
    theirs.generation_config.forced_decoder_ids = [[1, 50], [2, 51]]
    folder = tmp_path_factory.mktemp("whisper")
    theirs.save_pretrained(folder)
    WhisperFeatureExtractor(80).save_pretrained(folder)
    return theirs, folder


def noise(seconds: float) -> torch.Tensor:
    return 0.1 * torch.randn(int(16_000 * seconds), generator=torch.Generator().manual_seed(0))


def test_samples_become_the_same_text(whisper: tuple[WhisperForConditionalGeneration, Path]) -> None:
    theirs, folder = whisper
    model = formery.load(folder)
    assert list(model.prefix) == [50, 51]
    recordings = [noise(0.5), noise(3.0) * 0.3]
    heard_by_them = WhisperFeatureExtractor(80)(
        [one.numpy() for one in recordings], sampling_rate=16_000, return_tensors="pt"
    ).input_features
    plain = copy.deepcopy(theirs)
    plain.generation_config.forced_decoder_ids = None
    begun = torch.tensor([[3, 50, 51]] * 2)
    with torch.no_grad():
        out = GenerationMixin.generate(
            plain, input_features=heard_by_them, decoder_input_ids=begun, max_new_tokens=20, do_sample=False
        )
    ours = formery.generate(model, recordings, max_new_tokens=20)
    assert [one.tokens for one in ours] == [row[3:] for row in out.tolist()]
    drafted = formery.generate(model, recordings, method="parallel-jacobi-decoding", max_new_tokens=20)
    assert [one.tokens for one in drafted] == [one.tokens for one in ours]


def test_a_recording_by_its_path(whisper: tuple[WhisperForConditionalGeneration, Path], tmp_path: Path) -> None:
    try:
        archive = find("speech_fsdd/recordings.tar.xz")
    except FormeryError as error:
        pytest.skip(str(error))
    with tarfile.open(archive, "r|xz") as recordings:
        wave = next(one for one in recordings if one.name.endswith(".wav"))
        path = tmp_path / "digit.wav"
        path.write_bytes(recordings.extractfile(wave).read())  # type: ignore[union-attr]
    model = formery.load(whisper[1])
    samples = read_audio(path)
    features = WhisperFeatureExtractor(80)(samples.numpy(), sampling_rate=16_000, return_tensors="pt").input_features
    torch.testing.assert_close(heard(model.encoder.embedding, str(path), 1, None), features[0], rtol=0, atol=1e-4)
    [by_path], [by_samples] = (formery.generate(model, [one], max_new_tokens=8) for one in (str(path), samples))
    assert by_path.tokens == by_samples.tokens and len(by_path.tokens) > 0


def test_how_it_hears_is_kept(whisper: tuple[WhisperForConditionalGeneration, Path], tmp_path: Path) -> None:
    model = formery.load(whisper[1])
    export(model, tmp_path / "out")
    formery.save(model, tmp_path / "own")
    assert WhisperFeatureExtractor.from_pretrained(tmp_path / "out").feature_size == 80
    assert formery.load(tmp_path / "own").preprocessor == formery.load(tmp_path / "out").preprocessor
    assert formery.load(tmp_path / "own").conventions == model.conventions


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("nowhere.wav", "nowhere.wav"),
        ([1, 2, 3], "this model listens"),
        (torch.zeros(1, 2, 3), "this model listens"),
        (torch.zeros(80, 17), r"\[80, 3000\] \(mel bands, frames\), not \[80, 17\]"),
        (torch.from_numpy(numpy.zeros(0, dtype=numpy.float32)), "empty|no sound|sample"),
    ],
)
def test_what_is_no_recording(
    whisper: tuple[WhisperForConditionalGeneration, Path], prompt: object, says: str
) -> None:
    with pytest.raises(FormeryError, match=says):
        formery.generate(formery.load(whisper[1]), [prompt])  # type: ignore[list-item]
