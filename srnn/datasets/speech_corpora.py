"""Speech from where people have it: lists of files, LibriSpeech's folders, spoken digits.

Shapes: N samples.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from filelock import FileLock
from torch import Tensor

from srnn.audio import RATE, read_audio
from srnn.datasets.base import SPLITS, Split
from srnn.datasets.download import fetch
from srnn.datasets.speech import AudioFile, SpeechData, Utterance
from srnn.errors import UserError
from srnn.files import cache_folder, expanded
from srnn.registry import Range, register
from srnn.registry.option_types import Count


def _absolute(path: str) -> str:
    """So that a packed network's run finds its data from anywhere."""
    return os.path.abspath(expanded(path))


@register.dataset("manifest")
@dataclass(eq=False, repr=False)
class Manifest(SpeechData):
    """Any speech: files that list recordings and what is said in them, one list for each split.

    A list is CSV with the columns ``path`` and ``text``, or JSON lines (``.jsonl``, ``.json``) with these keys; others
    are passed over. Paths are relative to the list's folder.
    """

    train: str
    valid: str
    test: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lists: dict[Split, str] = {split: _absolute(getattr(self, split)) for split in SPLITS}

    def utterances(self) -> dict[Split, list[Utterance]]:
        """Of the three lists."""
        return {split: list(_listed(Path(self.lists[split]), f"dataset.{split}")) for split in SPLITS}

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute paths of the lists."""
        return config | self.lists


def _listed(path: Path, key: str) -> Iterator[Utterance]:
    """The utterances of a list. Raises UserError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = (
                map(json.loads, filter(str.strip, file)) if path.suffix in (".jsonl", ".json") else csv.DictReader(file)
            )
            for number, row in enumerate(rows, start=1):
                values = [row.get(name) if isinstance(row, dict) else None for name in ("path", "text")]
                if not isinstance(values[0], str) or not isinstance(values[1], str):
                    raise UserError(f"{key}={path}: entry {number} has no path and text.")
                yield AudioFile(path.parent / values[0], " ".join(values[1].split()))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{key}={path} cannot be read: {why}.") from None


_ARCHIVES = "https://www.openslr.org/resources/12"
_MD5 = {  # of the archives, from their md5sum.txt
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}


def _unpacked(name: str) -> Path:
    """A subset of LibriSpeech in the cache, downloaded if it is not there. Raises UserError."""
    home = cache_folder() / "librispeech"
    subset, archive, part = home / name, home / f"{name}.tar.gz", home / f"{name}.unpacking"
    if subset.is_dir():
        return subset
    try:
        fetch(f"{_ARCHIVES}/{name}.tar.gz", archive, f"md5:{_MD5[name]}")
    except UserError as error:
        raise UserError(f"dataset=librispeech: {error} Or add dataset.folder=FOLDER, with archives unpacked.") from None
    try:
        with FileLock(f"{part}.lock"):
            if not subset.is_dir():
                shutil.rmtree(part, ignore_errors=True)  # of a try that was stopped
                with tarfile.open(archive) as file:
                    file.extractall(part, filter="data")
                os.replace(part / "LibriSpeech" / name, subset)
                shutil.rmtree(part)
                archive.unlink()
    except OSError as error:
        raise UserError(
            f"{archive} cannot be unpacked: {error.strerror or error}; set SRNN_CACHE to a folder with room."
        ) from None
    return subset


@register.dataset("librispeech")
@dataclass(eq=False, repr=False)
class LibriSpeech(SpeechData):
    """LibriSpeech (Panayotov et al. 2015): 1,000 hours of books read aloud, as its archives are laid out.

    A subset is a folder such as ``train-clean-100``, in which ``SPEAKER/CHAPTER/`` has ``SPEAKER-CHAPTER.trans.txt``
    and a FLAC file for each of its lines. Without a folder of yours, subsets are downloaded into the cache.
    """

    folder: str | None = None
    train: list[str] = field(default_factory=lambda: ["train-clean-100"])
    valid: list[str] = field(default_factory=lambda: ["dev-clean"])
    test: list[str] = field(default_factory=lambda: ["test-clean"])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folder = None if self.folder is None else _absolute(self.folder)
        self.subsets: dict[Split, list[str]] = {split: getattr(self, split) for split in SPLITS}

    def utterances(self) -> dict[Split, list[Utterance]]:
        """Of the subsets."""
        unknown = {name for subsets in self.subsets.values() for name in subsets} - _MD5.keys()
        if self.folder is None and unknown:  # before the others are downloaded
            raise UserError(
                f"dataset=librispeech: there is no subset {', '.join(sorted(unknown))}; there are: {', '.join(_MD5)}."
            )
        return {split: [u for name in self.subsets[split] for u in self._subset(name)] for split in SPLITS}

    def _subset(self, name: str) -> list[Utterance]:
        if self.folder is None:
            subset = _unpacked(name)
        else:
            folder, inside = Path(self.folder), Path(self.folder) / "LibriSpeech"  # which its archives unpack to
            subset = (inside if inside.is_dir() else folder) / name
        lists = sorted(subset.glob("*/*/*.trans.txt"))
        if not lists:
            raise UserError(
                f"dataset.folder={self.folder} has no {name}/SPEAKER/CHAPTER/*.trans.txt: it must hold the unpacked "
                f"archives of LibriSpeech, from https://www.openslr.org/12; or leave it out, to have them downloaded."
            )
        found: list[Utterance] = []
        for path in lists:
            for line in path.read_text(encoding="utf-8").splitlines():
                key, _, text = line.partition(" ")
                found.append(AudioFile(path.parent / f"{key}.flac", text.strip()))
        return found

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute folder."""
        return config | {"folder": self.folder}


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_RECORDING = re.compile(r"(\d)_([A-Za-z]+)_(\d+)\.wav")
_GAP = RATE // 10  # samples: silence between digits is 0.05 to 0.15 s long


class _String(Utterance):
    """Recordings of a speaker one after the other."""

    def __init__(self, data: SpokenDigits, names: Sequence[str], seed: int) -> None:
        super().__init__(" + ".join(names), " ".join(DIGITS[int(Path(name).name[0])] for name in names))
        self.data, self.names, self.seed = data, names, seed

    def seconds(self) -> float:
        return len(self.samples()) / RATE

    def samples(self) -> Tensor:
        pieces = [self.data.recording(name) for name in self.names]
        if len(pieces) == 1:
            return pieces[0]
        random = torch.Generator().manual_seed(self.seed)
        gaps = torch.randint(_GAP // 2, 3 * _GAP // 2, (len(pieces) - 1,), generator=random).tolist()
        joined = [part for piece, gap in zip(pieces, gaps, strict=False) for part in (piece, torch.zeros(gap))]
        return torch.cat([*joined, pieces[-1]])


@register.dataset("fsdd")
@dataclass(eq=False, repr=False)
class SpokenDigits(SpeechData):
    """Free Spoken Digit Dataset (Jackson 2018): 3,000 digits by six speakers, as words or strings of them.

    From https://github.com/Jakobovski/free-spoken-digit-dataset; its files are ``DIGIT_SPEAKER_INDEX.wav``. Recordings
    of index 0 to 4 are the test, and 5 to 9 validation; with speakers held out, these are the test, and 0 to 4 of the
    others are validation.
    """

    path: str
    digits: Annotated[int, Range(ge=1, le=20)] = 1
    strings: Count = 3000
    held_out: list[str] = field(default_factory=list)
    data_seed: Annotated[int, Range(ge=0, le=2**31)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = _absolute(self.path)
        self.recording = functools.cache(self._recording)  # a recording is in many strings

    def utterances(self) -> dict[Split, list[Utterance]]:
        """Each recording by itself, or strings of ``digits`` at most."""
        speakers: dict[Split, dict[str, list[str]]] = {split: {} for split in SPLITS}
        for name in self._names():
            _, speaker, index = _RECORDING.fullmatch(Path(name).name).groups()  # type: ignore[union-attr]
            speakers[self._split(speaker, int(index))].setdefault(speaker, []).append(name)
        if unknown := set(self.held_out) - speakers["test"].keys():
            there = ", ".join(sorted({s for part in speakers.values() for s in part}))
            raise UserError(f"dataset.held_out: no recordings of {', '.join(sorted(unknown))}; there are: {there}.")
        random = torch.Generator().manual_seed(self.data_seed)
        return {split: self._of(speakers[split], split, random) for split in SPLITS}

    def _split(self, speaker: str, index: int) -> Split:
        if self.held_out:
            return "test" if speaker in self.held_out else "valid" if index < 5 else "train"
        return "test" if index < 5 else "valid" if index < 10 else "train"

    def _of(self, speakers: dict[str, list[str]], split: Split, random: torch.Generator) -> list[Utterance]:
        def below(limit: int) -> int:
            return int(torch.randint(limit, (), generator=random))

        if self.digits == 1:
            return [_String(self, [name], below(2**31)) for names in speakers.values() for name in names]
        everyone = list(speakers.values())
        found: list[Utterance] = []
        for _ in range(self.strings if split == "train" else -(-self.strings // 10)) if everyone else ():
            names = everyone[below(len(everyone))]
            chosen = [names[below(len(names))] for _ in range(1 + below(self.digits))]
            found.append(_String(self, chosen, below(2**31)))
        return found

    def _names(self) -> list[str]:
        """The recordings, in the order of their names. Raises UserError if there are none."""
        try:
            if self._zip is not None:
                names = self._zip.namelist()
            else:
                names = [str(path) for path in Path(self.path).rglob("*.wav")]
        except (OSError, zipfile.BadZipFile) as error:
            raise UserError(f"dataset.path={self.path} cannot be read: {error}.") from None
        names = sorted((n for n in names if _RECORDING.fullmatch(Path(n).name)), key=lambda n: Path(n).name)
        if not names:
            raise UserError(
                f"dataset.path={self.path} has no DIGIT_SPEAKER_INDEX.wav: give the folder or zip file of "
                f"https://github.com/Jakobovski/free-spoken-digit-dataset."
            )
        return names

    @functools.cached_property
    def _zip(self) -> zipfile.ZipFile | None:
        return zipfile.ZipFile(self.path) if Path(self.path).is_file() else None

    def _recording(self, name: str) -> Tensor:
        """x_N of a recording. Raises UserError for what is no audio."""
        if self._zip is None:
            return read_audio(Path(name))
        return read_audio(io.BytesIO(self._zip.read(name)), name)

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute path."""
        return config | {"path": self.path}
