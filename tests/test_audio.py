"""Samples and features, against what is written down here."""

import math

import numpy as np
import pytest
import soundfile
import torch

from srnn import audio
from srnn.audio import RATE, Features, Running, frames_of, mel_filters, read_audio, resample
from srnn.errors import UserError


def reference_logarithms(x_N, size):
    """The definition in float64: Hann windows of 320 samples, 160 apart, and a Fourier transform as a matrix."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(320) / 320)
    angles = 2 * np.pi * np.outer(np.arange(320), np.arange(size // 2 + 1)) / size
    frames = np.stack([x_N[start : start + 320] * window for start in range(0, len(x_N) - 319, 160)])
    return (frames @ np.cos(angles)) ** 2 + (frames @ np.sin(angles)) ** 2


def reference_mel(powers, bands=40):
    """Triangles on the mel scale, one after the other."""
    top = 2595 * math.log10(1 + 8000 / 700)
    edges = [700 * (10 ** (top * k / (bands + 1) / 2595) - 1) for k in range(bands + 2)]
    weights = np.zeros((bands, powers.shape[1]))
    for band, (low, middle, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for place in range(powers.shape[1]):
            f = 8000 * place / (powers.shape[1] - 1)
            rise, fall = (f - low) / (middle - low), (high - f) / (high - middle)
            weights[band, place] = max(0.0, min(rise, fall))
    return powers @ weights.T


@pytest.mark.parametrize("kind", ["spectrogram", "mel"])
def test_features_are_those_written_down(kind):
    x_N = (0.1 * np.random.default_rng(0).standard_normal(3300)).astype(np.float32)
    powers = reference_logarithms(x_N.astype(np.float64), 320 if kind == "spectrogram" else 512)
    wanted = np.log((powers if kind == "spectrogram" else reference_mel(powers)) + 1e-6)
    features = Features(kind)
    got = features.logarithms(torch.from_numpy(x_N))
    assert got.shape == wanted.shape == (frames_of(3300), features.bands)
    assert np.abs(got.numpy() - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
    normalised = features(torch.from_numpy(x_N))
    assert normalised.mean().abs() < 1e-5
    assert normalised.std() == pytest.approx(1, abs=1e-3)


def test_every_mel_band_has_a_peak_near_one():
    assert mel_filters().max(1).values.min() > 0.5


def test_running_normalisation_is_the_same_in_pieces():
    x_TI = torch.randn(50, 4) * 3 - 9
    whole, running = Running()(x_TI), Running()
    pieces = torch.cat([running(piece) for piece in x_TI.split([1, 0, 20, 29])])
    assert torch.allclose(whole, pieces, atol=1e-6)
    assert whole[-10:].std() < 1.5


def test_less_than_a_window_has_no_frames():
    for kind in ("utterance", "running"):
        assert Features(normalise=kind)(torch.zeros(319)).shape == (0, 161)
    assert [frames_of(n) for n in (0, 319, 320, 479, 480)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("rate", [8000, 44_100, 22_050, 11_127, 44_099])  # the last two without a common ratio
def test_resampling_keeps_tones_and_drops_what_is_too_high(rate):
    time, inside = torch.arange(rate) / rate, slice(2000, -2000)
    for pitch in (100, 1000, 3400):
        got = resample(torch.sin(2 * math.pi * pitch * time), rate)
        wanted = torch.sin(2 * math.pi * pitch * torch.arange(RATE) / RATE)
        assert len(got) == RATE
        assert (got - wanted)[inside].abs().max() < 0.005
    if rate > 16_000:
        assert resample(torch.sin(2 * math.pi * 9500 * time), rate)[inside].abs().max() < 0.005


@pytest.mark.parametrize("rate", [8000, 44_100, 14_400])
def test_filters_made_one_by_one_are_those_of_the_table(rate, monkeypatch):
    samples = torch.randn(rate // 7)
    table = resample(samples, rate)
    monkeypatch.setattr(audio, "_LARGEST_TABLE", 1000)
    torch.testing.assert_close(resample(samples, rate), table, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rate", [1, 999, 1_000_001])
def test_a_header_with_an_absurd_rate_is_refused(rate, tmp_path):
    """A few kilobytes at 1 Hz would become hours."""
    soundfile.write(tmp_path / "a.wav", torch.zeros(1000).numpy(), rate)
    for read in (audio.audio_seconds, read_audio):
        with pytest.raises(
            UserError, match=r"a\.wav is no audio that can be read: its header says .* samples a second"
        ):
            read(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_files_are_read_as_one_channel_of_16_khz(suffix, tmp_path):
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 500 * time)
    soundfile.write(tmp_path / f"a.{suffix}", np.stack([tone, 0 * tone], axis=1), 8000)
    x_N = read_audio(tmp_path / f"a.{suffix}")
    assert len(x_N) == 16_000
    assert x_N[4000:12000].abs().max() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    "error", [MemoryError("Unable to allocate 240. GiB"), MemoryError(), ValueError("array is too big")]
)
def test_a_header_with_an_absurd_length_is_refused(error, tmp_path, monkeypatch):
    """Where there is no such memory; else what the file holds is read."""

    def asks_for_it(*_, **__):
        raise error

    monkeypatch.setattr(soundfile, "read", asks_for_it)
    with pytest.raises(
        UserError, match=rf"a\.flac is no audio that can be read: {str(error) or 'there is not enough memory'}"
    ):
        read_audio(tmp_path / "a.flac")


def test_what_is_no_audio_is_named(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFFnothing")
    for path in (tmp_path / "a.wav", tmp_path / "missing.wav"):
        with pytest.raises(UserError, match=f"{path.name} is no audio that can be read"):
            read_audio(path)
    for bad in (float("nan"), float("inf"), -1e30):  # whose square is infinite
        soundfile.write(tmp_path / "b.wav", [0.1, bad], 16_000, subtype="FLOAT")
        with pytest.raises(UserError, match=r"b.wav is no audio that can be read: it has samples that are not finite"):
            read_audio(tmp_path / "b.wav")
    soundfile.write(tmp_path / "loud.wav", np.full(1000, 2.0**31), 16_000, subtype="FLOAT")
    assert Features()(read_audio(tmp_path / "loud.wav")).isfinite().all()
