"""Speech from sentences alone, spoken by a synthesiser."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from filelock import FileLock

from srnn.datasets.base import SPLITS, Split
from srnn.datasets.speech import AudioFile, SpeechData, Utterance
from srnn.errors import UserError
from srnn.files import cache_folder, csv_bytes, expanded
from srnn.registry import Range, register
from srnn.terminal import console

Speed = Annotated[int, Range(ge=80, le=450)]  # words a minute, what eSpeak NG takes


@dataclass(frozen=True)
class Espeak:
    """eSpeak NG as the package ``espeakng-loader`` brings it: its library, and its folder of voices."""

    library: str
    data: str
    version: str

    @classmethod
    def installed(cls) -> Espeak:
        """Raises UserError where it is not."""
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "dataset=synthetic_speech needs eSpeak NG, which is GPL-3: pip install 'srnn[synthetic]'."
            ) from None
        version = importlib.metadata.version("espeakng-loader")
        return cls(espeakng_loader.get_library_path(), espeakng_loader.get_data_path(), version)

    def names(self) -> tuple[set[str], set[str]]:
        """Of languages, and of variants."""
        languages = {path.name.lower() for path in Path(self.data, "lang").rglob("*") if path.is_file()}
        return languages, {path.name for path in Path(self.data, "voices", "!v").iterdir()}

    def speak(self, jobs: list[tuple[str, str, str, int]]) -> None:
        """Write a WAV file for each of path, text, voice and speed. Raises UserError."""
        order = Path(jobs[0][0]).with_name("jobs.json")
        order.write_text(json.dumps({"library": self.library, "data": self.data, "jobs": jobs}), encoding="utf-8")
        script = Path(__file__).with_name("espeak_process.py")
        done = subprocess.run(
            [sys.executable, "-I", str(script), str(order)], capture_output=True, text=True, check=False
        )
        order.unlink()
        if done.returncode:
            why = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
            raise UserError(f"dataset=synthetic_speech: eSpeak NG failed: {why}.")


class _Job(NamedTuple):
    """An utterance to be."""

    split: Split
    text: str
    voice: str
    speed: int

    @property
    def spoken(self) -> tuple[str, str, int]:
        return self.text, self.voice, self.speed


class _Spoken(AudioFile):
    """Named by what it is, not by where it lies."""

    def __init__(self, path: Path, job: _Job) -> None:
        super().__init__(path, job.text)
        self.name = f"{job.text!r} by {job.voice} at {job.speed} words a minute"


@register.dataset("synthetic_speech")
@dataclass(eq=False, repr=False)
class SyntheticSpeech(SpeechData):
    """Sentences of yours, spoken by the voices of eSpeak NG: each sentence by each voice at each speed.

    Voices are its languages with a variant, as ``en-us+f3``; those of validation and test are not heard in training.
    All is spoken once, and kept in the cache.
    """

    sentences: str | list[str]
    voices: list[str] = field(
        default_factory=lambda: ["en-us", "en-us+f2", "en-us+m3", "en", "en+f4", "en-029+m5", "en-gb-scotland"]
    )
    valid_voices: list[str] = field(default_factory=lambda: ["en-us+f5", "en-gb-x-rp+m7"])
    test_voices: list[str] = field(default_factory=lambda: ["en-us-nyc+f3", "en-gb-x-gbclan+m2"])
    speeds: list[Speed] = field(default_factory=lambda: [140, 175, 210])

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sentences, str):
            self.sentences = os.path.abspath(expanded(self.sentences))

    def utterances(self) -> dict[Split, list[Utterance]]:
        """Those of the cache; what is not there is spoken first."""
        espeak, voices = Espeak.installed(), self._checked()
        _check_names(voices, *espeak.names())
        texts = self._texts()
        jobs = [
            _Job(split, text, voice, speed)
            for split in SPLITS
            for voice in voices[split]
            for speed in self.speeds
            for text in texts
        ]
        key = hashlib.sha256(json.dumps([espeak.version, jobs]).encode()).hexdigest()[:32]
        folder = cache_folder() / "synthetic_speech" / key
        paths = [folder / f"{number}.wav" for number in range(len(jobs))]
        if not folder.is_dir():
            _speak(espeak, folder, [(path.name, *job.spoken) for path, job in zip(paths, jobs, strict=True)])
        found: dict[Split, list[Utterance]] = {split: [] for split in SPLITS}
        for path, job in zip(paths, jobs, strict=True):
            found[job.split].append(_Spoken(path, job))
        return found

    def _checked(self) -> dict[Split, list[str]]:
        """The voices of each split. Raises UserError where one is in two of them, or nothing would be said."""
        voices: dict[Split, list[str]] = {
            "train": self.voices, "valid": self.valid_voices, "test": self.test_voices,
        }  # fmt: skip
        every = [voice for several in voices.values() for voice in several]
        if twice := sorted({voice for voice in every if every.count(voice) > 1}):
            raise UserError(
                f"dataset.voices, valid_voices and test_voices have {', '.join(twice)} twice: validation and test are "
                f"of voices that training does not hear."
            )
        if not self.speeds:
            raise UserError("dataset.speeds=[] must have a speed, in words a minute.")
        return voices

    def _texts(self) -> list[str]:
        """The sentences, each once. Raises UserError."""
        if isinstance(self.sentences, str):
            try:
                lines = Path(self.sentences).read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                why = getattr(error, "strerror", None) or error
                raise UserError(
                    f"dataset.sentences={self.sentences} cannot be read: {why}. It is a file with a sentence a line, "
                    f"or a list: dataset.sentences=[lights on,lights off]."
                ) from None
        else:
            lines = self.sentences
        texts = list(dict.fromkeys(text for line in lines if (text := " ".join(line.split()))))
        if not texts:
            raise UserError(f"dataset.sentences={self.sentences} has no sentences.")
        return texts

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute path of a file of sentences."""
        return config | {"sentences": self.sentences}


def _speak(espeak: Espeak, folder: Path, jobs: list[tuple[str, str, str, int]]) -> None:
    """All of them into a folder, or nothing. Raises UserError."""
    part = folder.with_name(f"{folder.name}.speaking")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if folder.is_dir():  # another process was first
                return
            console.print(f"eSpeak NG speaks {len(jobs)} utterances into {folder}.", soft_wrap=True, markup=False)
            shutil.rmtree(part, ignore_errors=True)  # of a try that was stopped
            part.mkdir()
            espeak.speak([(str(part / name), text, voice, speed) for name, text, voice, speed in jobs])
            rows = [dict(zip(("path", "text", "voice", "speed"), job, strict=True)) for job in jobs]
            (part / "list.csv").write_bytes(csv_bytes(rows))  # as dataset=manifest reads it
            os.replace(part, folder)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror or error}; set SRNN_CACHE to a folder with room."
        ) from None


def _check_names(voices: dict[Split, list[str]], languages: set[str], variants: set[str]) -> None:
    """Raises UserError for a voice that is not there: eSpeak NG itself passes over an unknown variant."""
    keys: dict[Split, str] = {"train": "voices", "valid": "valid_voices", "test": "test_voices"}
    for split, several in voices.items():
        for voice in several:
            language, plus, variant = voice.partition("+")
            if language not in languages:
                raise UserError(
                    f"dataset.{keys[split]}: eSpeak NG has no language {language!r}; of English it has: "
                    f"{', '.join(sorted(n for n in languages if n.startswith('en')))}."
                )
            if plus and variant not in variants:
                raise UserError(
                    f"dataset.{keys[split]}: eSpeak NG has no variant {variant!r}; it has: "
                    f"{', '.join(sorted(variants))}."
                )
