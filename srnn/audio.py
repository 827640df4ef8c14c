"""Audio: reading files, resampling, and the features that networks read. No Lightning here: the runtime uses it.

Shapes: N samples, T frames, I bands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.errors import UserError

RATE = 16_000  # samples a second, of all that is computed here
WINDOW_SAMPLES, HOP_SAMPLES = 320, 160  # samples: 20 ms and 10 ms
FLOOR = 1e-6  # added to powers before their logarithm; samples lie in -1 .. 1
BANDS = {"spectrogram": WINDOW_SAMPLES // 2 + 1, "mel": 40}
_MEL_FFT = 512  # a transform of the window alone is too coarse for the lowest mel bands
_LOUDEST = 1e10  # of samples: some write whole numbers of 32 bits as floats; the squares of far larger ones overflow
_RATES = (1_000, 1_000_000)  # Hz, of files
_LARGEST_TABLE = 1 << 22  # numbers, of filters for resampling
_CROSSINGS = 24  # of the sinc on either side of its peak, for resampling

FeatureKind = Literal["spectrogram", "mel"]
Normalising = Literal["utterance", "running"]


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: of its library, libsndfile
        raise UserError("reading audio needs soundfile: pip install 'srnn[speech]'.") from None
    return soundfile


def audio_seconds(source: str | Path | BinaryIO, name: str = "") -> float:
    """The length of an audio file, from its header alone.

    Args:
        source: a WAV, FLAC or OGG file, or the open bytes of one.
        name: what it is called in messages; empty takes ``source``.

    Raises:
        UserError: it is no audio, or soundfile is not installed.
    """
    info = _read(_soundfile().info, source, name)
    _check_rate(info.samplerate, name or source)
    return float(info.frames / info.samplerate)


def read_audio(source: str | Path | BinaryIO, name: str = "") -> Tensor:
    """An audio file as samples of 16 kHz, one channel (the mean of all), fp32 in -1 .. 1.

    Args:
        source: a WAV, FLAC or OGG file, or the open bytes of one.
        name: what it is called in messages; empty takes ``source``.

    Raises:
        UserError: it is no audio, or soundfile is not installed.
    """

    def read(file: Any) -> Any:
        return _soundfile().read(file, dtype="float32", always_2d=True)

    samples, rate = _read(read, source, name)
    _check_rate(rate, name or source)
    # As files of floats can have; frames of NaN would be padding.
    if not (np.abs(samples) < _LOUDEST).all():
        raise UserError(
            f"{name or source} is no audio that can be read: it has samples that are not finite, or beyond "
            f"{_LOUDEST:g}; they lie in -1 .. 1."
        )
    return resample(torch.from_numpy(samples.mean(axis=1)), rate)


def _read(read: Callable[[Any], Any], source: str | Path | BinaryIO, name: str) -> Any:
    error = _soundfile().SoundFileError
    try:
        return read(str(source) if isinstance(source, Path) else source)
    except (error, OSError, RuntimeError, MemoryError, ValueError) as why:  # a damaged header may say any length
        told = f"{why}".rstrip(".").rpartition(": ")[2] or "there is not enough memory for it"
        raise UserError(f"{name or source} is no audio that can be read: {told}.") from None


def _check_rate(rate: int, name: object) -> None:
    # A damaged header may say anything, and a second of it would become hours, or nothing.
    least, most = _RATES
    if not least <= rate <= most:
        raise UserError(
            f"{name} is no audio that can be read: its header says {rate:,} samples a second, and recordings have "
            f"{least:,} to {most:,}."
        )


def resample(x_N: Tensor, rate: int, to: int = RATE) -> Tensor:
    """Change the sampling rate, by a windowed sinc that keeps all below 90 % of the lower Nyquist frequency.

    Args:
        x_N: samples.
        rate: their rate, in Hz.
        to: the rate wanted, in Hz.

    Example:
        >>> import torch
        >>> resample(torch.zeros(800), 8000).shape
        torch.Size([1600])
    """
    if rate == to or not len(x_N):
        return x_N
    divisor = math.gcd(rate, to)
    down, up = rate // divisor, to // divisor
    if up * down > _LARGEST_TABLE:
        return _resample_one_by_one(x_N, down, up)
    kernel_UK, half = _sinc(down, up)
    # Each group of ``down`` samples becomes ``up`` new ones: one filter for each of these, moved on by ``down``.
    padded = F.pad(x_N[None, None], (half, half + down))
    y_UM = F.conv1d(padded, kernel_UK[:, None].to(x_N), stride=down)[0]
    return y_UM.T.reshape(-1)[: -(-len(x_N) * up // down)].contiguous()


@functools.lru_cache(maxsize=8)
def _sinc(down: int, up: int) -> tuple[Tensor, int]:
    """The filters [up, 2 half + down], and the samples that they look back."""
    cutoff, half = _cutoff(down, up)
    places = torch.arange(-half, half + down, dtype=torch.float64)
    distance = places[None] - torch.arange(up, dtype=torch.float64)[:, None] * down / up
    return _weights(distance, cutoff, half).float(), half


def _resample_one_by_one(x_N: Tensor, down: int, up: int) -> Tensor:
    """For odd rates, such as 11,127 Hz: filters made for each new sample would be gigabytes as a table of all."""
    cutoff, half = _cutoff(down, up)
    rows = F.pad(x_N, (half, half)).unfold(0, 2 * half + 1, 1)
    places, pieces = torch.arange(-half, half + 1, dtype=torch.float64), []
    for numbers in torch.arange(-(-len(x_N) * up // down)).split(max(1, _LARGEST_TABLE // len(places))):
        distance = places - (numbers * down % up).double()[:, None] / up
        pieces.append((rows[numbers * down // up] * _weights(distance, cutoff, half)).sum(1).to(x_N))
    return torch.cat(pieces)


def _cutoff(down: int, up: int) -> tuple[float, int]:
    """What is kept, as a share of the old Nyquist frequency, and the samples that a filter looks back."""
    cutoff = 0.97 * min(1.0, up / down)
    return cutoff, math.ceil(_CROSSINGS / cutoff)


def _weights(distance: Tensor, cutoff: float, half: int) -> Tensor:
    window = torch.cos(math.pi / 2 * (distance / half).clamp(-1, 1)) ** 2
    return cutoff * torch.sinc(cutoff * distance) * window


def frames_of(samples: int) -> int:
    """Frames of so many samples at 16 kHz: whole windows only."""
    return 0 if samples < WINDOW_SAMPLES else 1 + (samples - WINDOW_SAMPLES) // HOP_SAMPLES


@functools.cache
def _window() -> Tensor:
    return torch.hann_window(WINDOW_SAMPLES)


@functools.cache
def mel_filters(bands: int = BANDS["mel"], size: int = _MEL_FFT) -> Tensor:
    """Triangles between frequencies equally spaced on the mel scale, 2595 log10(1 + f / 700), from 0 to 8 kHz.

    Returns:
        [bands, size / 2 + 1]; each triangle's peak is 1.
    """
    top = 2595 * math.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (torch.linspace(0, top, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, RATE / 2, size // 2 + 1, dtype=torch.float64)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()


@dataclass(frozen=True)
class Features:
    """Samples -> what a network reads: logarithms of the powers of bands, normalised.

    A frame is a Hann window of 20 ms, one each 10 ms; its powers are those of its Fourier transform, and its values
    ``log(power + 1e-6)``.

    Example:
        >>> import torch
        >>> Features()(torch.randn(16_000)).shape
        torch.Size([99, 161])

    Attributes:
        kind: ``spectrogram``, the 161 powers of a window; ``mel``, 40 bands of triangles on the mel scale.
        normalise: ``utterance``: mean 0 and standard deviation 1 over all of an utterance; ``running``: by the mean
            and deviation of what was heard so far, which a stream knows too.
    """

    kind: FeatureKind = "spectrogram"
    normalise: Normalising = "utterance"

    @classmethod
    def of(cls, dataset: object) -> Features | None:
        """The features of a data set's config, which may come out of anybody's file; None where it says none."""
        options = dataset if isinstance(dataset, Mapping) else {}
        kind: Any = options.get("features")
        normalise: Any = options.get("normalise")
        if kind not in get_args(FeatureKind) or normalise not in get_args(Normalising):
            return None
        return cls(kind, normalise)

    @property
    def bands(self) -> int:
        """I."""
        return BANDS[self.kind]

    def __call__(self, x_N: Tensor) -> Tensor:
        """x_TI of the samples of an utterance at 16 kHz; T is 0 where they are less than a window."""
        x_TI = self.logarithms(x_N)
        if not len(x_TI):
            return x_TI
        if self.normalise == "running":
            return Running()(x_TI)
        return (x_TI - x_TI.mean()) / (x_TI.std(correction=0) + 1e-5)

    def logarithms(self, x_N: Tensor) -> Tensor:
        """x_TI, not normalised."""
        if len(x_N) < WINDOW_SAMPLES:
            return x_N.new_zeros(0, self.bands)
        windows_TN = x_N.unfold(0, WINDOW_SAMPLES, HOP_SAMPLES) * _window()
        powers = torch.fft.rfft(windows_TN, WINDOW_SAMPLES if self.kind == "spectrogram" else _MEL_FFT).abs().square()
        return torch.log((powers if self.kind == "spectrogram" else powers @ mel_filters().T) + FLOOR)


class Running:
    """Normalises frames by what came before and with them: the same for a whole utterance and for pieces of it.

    It starts as if half a second of quiet speech had been heard, so that first frames are not divided by nearly zero.
    """

    FRAMES, MEAN, DEVIATION = 50, -9.0, 4.0  # of log-powers of the quiet speech

    def __init__(self) -> None:
        self.frames = float(self.FRAMES)
        self.sum = self.FRAMES * self.MEAN
        self.squares = self.FRAMES * (self.MEAN**2 + self.DEVIATION**2)

    def __call__(self, x_TI: Tensor) -> Tensor:
        """The next frames, normalised."""
        x = x_TI.double()
        count_T = self.frames + torch.arange(1, len(x) + 1, dtype=torch.float64)
        sum_T, squares_T = self.sum + x.mean(1).cumsum(0), self.squares + x.square().mean(1).cumsum(0)
        if len(x):
            self.frames, self.sum, self.squares = float(count_T[-1]), float(sum_T[-1]), float(squares_T[-1])
        mean_T = sum_T / count_T
        deviation_T = (squares_T / count_T - mean_T.square()).clamp(min=1e-4).sqrt()
        return ((x - mean_T[:, None]) / deviation_T[:, None]).float()
