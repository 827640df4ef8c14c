"""Speech with its transcripts: utterances of different lengths in padded batches.

Shapes: B batch, T frames, I bands, U characters. Frames that pad x_BTI are NaN, and characters that pad a transcript
are ``IGNORED``, so that a batch is two tensors and says itself how long each utterance is.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import zlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from srnn.audio import RATE, FeatureKind, Features, Normalising, audio_seconds, frames_of, read_audio, resample
from srnn.datasets.base import SPLITS, Batch, Batches, DataModule, Split
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from srnn.registry import Range
from srnn.registry.option_types import Count
from srnn.terminal import console
from srnn.vocabulary import Vocabulary

Unusable = Literal["refuse", "skip"]
Masks = Annotated[int, Range(ge=0, le=100)]
KEPT_BYTES = 2 << 30  # of features, so that later passes need not read and transform the audio again
WIDEST_BANDS, WIDEST_FRAMES = 0.15, 0.05  # of a mask of SpecAugment, as shares of all
_NAMED = 5  # utterances in a message


class Utterance:
    """A recording and what is said in it; a subclass says where its samples come from.

    Args:
        name: in messages.
        text: the transcript.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def seconds(self) -> float:
        """Its length, without reading all of it. Raises UserError for what is no audio."""
        raise NotImplementedError

    def samples(self) -> Tensor:
        """x_N at 16 kHz. Raises UserError for what is no audio."""
        raise NotImplementedError


class _Played(Utterance):
    """An utterance at another speed, to a hundredth: its pitch changes too."""

    def __init__(self, of: Utterance, speed: float) -> None:
        super().__init__(f"{of.name} at speed {speed:g}", of.text)
        self.of, self.rate = of, round(100 * speed) * RATE // 100  # of its samples, were they played so

    def seconds(self) -> float:
        return math.ceil(round(self.of.seconds() * RATE) * RATE / self.rate) / RATE

    def samples(self) -> Tensor:
        return resample(self.of.samples(), self.rate)


class AudioFile(Utterance):
    """A recording in a file of its own.

    Args:
        path: a WAV, FLAC or OGG file.
        text: the transcript.
    """

    def __init__(self, path: Path, text: str) -> None:
        super().__init__(str(path), text)
        self.path = path

    def seconds(self) -> float:
        """From the file's header."""
        return audio_seconds(self.path)

    def samples(self) -> Tensor:
        """All of the file."""
        return read_audio(self.path)


@dataclass(frozen=True)
class _Part:
    """A split, the shortest utterance first: a batch of neighbours has little padding."""

    utterances: list[Utterance]
    frames: list[int]
    targets: list[Tensor]

    @classmethod
    def of(cls, frames: dict[Utterance, int], vocabulary: Vocabulary) -> _Part:
        """Of utterances and their frames."""
        ordered = sorted(frames, key=lambda u: frames[u])
        return cls(
            ordered, [frames[u] for u in ordered], [torch.from_numpy(vocabulary.encode(u.text)) for u in ordered]
        )


@dataclass(eq=False, repr=False)
class SpeechData(DataModule):
    """Base of the data sets of speech: a subclass says which utterances there are.

    It is a dataclass, whose fields are the options that all of them have; a subclass may be one too, and add its own.

    Training batches hold utterances of about the same length, others in each pass, and come in a random order. The
    other splits are read from their shortest utterance to their longest.

    Example:
        >>> class Tones(SpeechData):
        ...     "Noise, and how loud it is."
        ...     def utterances(self):
        ...         return {split: [Noise(word) for word in ("low", "high") * 4] for split in SPLITS}
        >>> class Noise(Utterance):
        ...     def __init__(self, word):
        ...         super().__init__(word, word)
        ...     def seconds(self):
        ...         return 0.5
        ...     def samples(self):
        ...         return torch.randn(8000) * {"low": 0.01, "high": 0.5}[self.text]
        >>> data = Tones(batch_size=4)
        >>> data.setup()
        >>> x_BTI, targets_BU = next(iter(data.train_dataloader()))
        >>> x_BTI.shape, targets_BU.shape, data.sizes
        (torch.Size([4, 49, 161]), torch.Size([4, 4]), {'input_size': 161, 'output_size': 7})

    Attributes:
        vocabulary: of ``characters``, or the one given to ``setup``. Its number 0, else the
            unknown character, is CTC's blank.
        audio: what makes samples into frames.

    Args:
        features: ``spectrogram``, 161 bands, or ``mel``, 40.
        normalise: by each ``utterance`` as a whole, or ``running``, by what was heard so far.
        band_masks: of SpecAugment (Park et al. 2019): so many runs of bands of each training utterance become 0.
        time_masks: the same of frames.
        speed_copies: training hears each utterance at these speeds too, pitch and all (Ko et al. 2015); a copy whose
            transcript is longer than its frames is left out.
        noise_db: white noise is so many dB below each utterance, always the same; None for none.
        buckets: so many lengths that training batches are padded to; 1 pads all of them to the longest utterance, which
            ``trainer.cuda_graph=true`` wants.
        batch_size: B.
        characters: the alphabet, as ``abc '``; None takes all characters that training transcripts have.
        unusable: what becomes of files that cannot be read, of empty transcripts, of unknown characters, and of
            transcripts that are longer than their frames: ``refuse`` stops the run, ``skip`` leaves them out.

    Raises:
        UserError: from ``setup``: utterances that cannot be used, or too few of them.
    """

    objective = "ctc"
    unit = "utterances"

    _: KW_ONLY
    features: FeatureKind = "spectrogram"
    normalise: Normalising = "utterance"
    band_masks: Masks = 0
    time_masks: Masks = 0
    speed_copies: list[Annotated[float, Range(ge=0.5, le=2)]] = field(default_factory=list)
    noise_db: Annotated[float, Range(ge=-20, le=60)] | None = None
    buckets: Count = 8
    batch_size: Count = 16
    characters: str | None = None
    unusable: Unusable = "refuse"

    def __post_init__(self) -> None:
        super().__init__()
        self.audio = Features(self.features, self.normalise)
        self._parts: dict[Split, _Part] = {}
        self._kept: dict[tuple[Split, int], Tensor] = {}
        self._room = KEPT_BYTES

    @abstractmethod
    def utterances(self) -> dict[Split, list[Utterance]]:
        """Split -> its utterances. Raises UserError for what is missing."""

    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Look at every utterance, once.

        Args:
            stage: not used, as all splits are made at once.
            vocabulary: a trained network's own.

        Raises:
            UserError: utterances that cannot be used, or fewer of them than a batch has.
        """
        if self._parts:
            return
        found = self.utterances()
        alphabet = self.characters or "".join(u.text for u in found["train"])
        known = vocabulary or Vocabulary.build("characters", alphabet)
        self.vocabulary, bad, reasons = known, [], Counter[str]()
        for split in SPLITS:
            looked = {u: self._frames(u, known) for u in found[split]}
            frames = {u: count for u, count in looked.items() if isinstance(count, int)}
            bad += [f"{u.name} ({why})" for u, why in looked.items() if not isinstance(why, int)]
            reasons.update(why.partition(":")[0] for why in looked.values() if not isinstance(why, int))
            if split == "train":
                copies = [_Played(u, speed) for u in frames for speed in self.speed_copies]
                heard = ((u, self._frames(u, known)) for u in copies)
                frames |= {u: count for u, count in heard if isinstance(count, int)}
            self._parts[split] = _Part.of(frames, known)
        if bad:
            self._report(bad)
        for split in SPLITS:
            self._check(split, len(self._parts[split].frames), len(found[split]))
        self.left_out = dict(reasons)
        self.sizes = {"input_size": self.audio.bands, "output_size": len(known)}
        self.counts = {split: len(part.utterances) for split, part in self._parts.items()}

    @staticmethod
    def _frames(utterance: Utterance, vocabulary: Vocabulary) -> int | str:
        """Frames of an utterance, or why it cannot be used: a few words, and after a colon what is its own."""
        text = utterance.text
        if not text.strip():
            return "empty transcript"
        if unknown := vocabulary.unknown(text):
            return f"unknown character: {''.join(unknown)!r}"
        try:
            frames = frames_of(round(utterance.seconds() * RATE))
        except UserError:
            return "cannot be read"
        # CTC puts a blank between two equal characters; networks halve the frames.
        needed = len(text) + sum(a == b for a, b in itertools.pairwise(text))
        if (frames + 1) // 2 < needed:
            return f"transcript longer than its frames: {needed} steps of {(frames + 1) // 2}"
        return frames

    def _check(self, split: Split, usable: int, found: int) -> None:
        wanted = self.batch_size if split == "train" else 1
        if usable < wanted:
            batch = f", and dataset.batch_size={self.batch_size}" if split == "train" else ""
            raise UserError(f"the {split} split has {usable} utterances that can be used, of {found}{batch}.")

    def _report(self, bad: Sequence[str]) -> None:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        told = f"{len(bad)} utterances cannot be used: {'; '.join(bad[:_NAMED])}{more}"
        if self.unusable == "refuse":
            raise UserError(f"{told}. Mend them, or leave them out with dataset.unusable=skip.")
        console.print(f"{told}. They are left out.", soft_wrap=True, markup=False)

    def features_of(self, split: Split, index: int) -> Tensor:
        """x_TI of the ``index``-th shortest utterance of a split; kept while there is room."""
        if (kept := self._kept.get((split, index))) is not None:
            return kept
        x_TI = self.audio(self.samples_of(self._parts[split].utterances[index]))
        if x_TI.nbytes <= self._room:
            self._room -= x_TI.nbytes
            self._kept[split, index] = x_TI
        return x_TI

    def samples_of(self, utterance: Utterance) -> Tensor:
        """x_N at 16 kHz, with the noise asked for."""
        x_N = utterance.samples()
        if self.noise_db is None:
            return x_N
        noise_N = torch.randn(len(x_N), generator=torch.Generator().manual_seed(zlib.crc32(utterance.name.encode())))
        return x_N + noise_N * x_N.square().mean().sqrt() * 10 ** (-self.noise_db / 20)

    def checksum(self, split: Split) -> str:
        """Of names, transcripts and lengths, and of the frames of a few: a corpus is too long to be read twice."""
        sha, part = hashlib.sha256(f"{self.audio}".encode()), self._parts[split]
        for utterance, frames in zip(part.utterances, part.frames, strict=True):
            sha.update(f"{utterance.name} {utterance.text} {frames}\n".encode())
        for index in range(0, len(part.frames), -(-len(part.frames) // 8)):
            sha.update(self.features_of(split, index).numpy().tobytes())
        return sha.hexdigest()

    def batches(self, split: Split) -> Batches:
        """Training in a new order each pass, whole batches only; the others in order, all of them."""
        part, size, seed = self._parts[split], self.batch_size, torch.initial_seed()
        if split != "train":
            count = len(part.frames)
            return Batches(
                lambda _, i: self._batch(split, range(i * size, min(count, i * size + size))), -(-count // size)
            )
        frames = torch.tensor(part.frames)
        # Each batch is padded to one of a few lengths, at which equal shares of the utterances end.
        ends = [part.frames[(k + 1) * len(frames) // self.buckets - 1] for k in range(self.buckets)]

        @functools.lru_cache(maxsize=1)
        def order(epoch: int) -> Tensor:
            random = torch.Generator().manual_seed(seed + epoch)
            chosen = torch.randperm(len(frames), generator=random)[: len(frames) // size * size]
            # Neighbours by length, but not the same ones in each pass.
            lengths = frames[chosen] * (0.9 + 0.2 * torch.rand(len(chosen), generator=random))
            batches = chosen[lengths.argsort()].view(-1, size)
            return batches[torch.randperm(len(batches), generator=random)]

        def fetch(epoch: int, index: int) -> Batch:
            chosen = order(epoch)[index].tolist()
            longest = max(part.frames[i] for i in chosen)
            x_BTI, targets_BU = self._batch(split, chosen, next(end for end in ends if end >= longest))
            random = torch.Generator().manual_seed(((seed + epoch) * 1_000_003 + index) % 2**63)
            return self._masked(x_BTI, random), targets_BU

        return Batches(fetch, len(frames) // size)

    def _batch(self, split: Split, chosen: Sequence[int], length: int = 0) -> Batch:
        part = self._parts[split]
        xs, targets = [self.features_of(split, i) for i in chosen], [part.targets[i] for i in chosen]
        x_BTI = torch.full((len(xs), max(length, *map(len, xs)), self.audio.bands), torch.nan)
        targets_BU = torch.full((len(xs), max(map(len, targets))), IGNORED)
        for row, (x_TI, target_U) in enumerate(zip(xs, targets, strict=True)):
            x_BTI[row, : len(x_TI)] = x_TI
            targets_BU[row, : len(target_U)] = target_U
        return x_BTI, targets_BU

    def _masked(self, x_BTI: Tensor, random: torch.Generator) -> Tensor:
        """SpecAugment: runs of bands and of frames become 0, the mean."""
        bands = self.audio.bands
        for x_TI in x_BTI if self.band_masks or self.time_masks else ():
            frames = int((~x_TI[:, 0].isnan()).sum())
            for axis, masks, whole, share in (
                (1, self.band_masks, bands, WIDEST_BANDS),
                (0, self.time_masks, frames, WIDEST_FRAMES),
            ):
                for _ in range(masks):
                    width = int(torch.randint(int(share * whole) + 1, (), generator=random))
                    first = int(torch.randint(whole - width + 1, (), generator=random))
                    x_TI[:frames].narrow(axis, first, width).zero_()
        return x_BTI
