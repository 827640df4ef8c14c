"""Text as contiguous streams, for stateful truncated back-propagation through time.

Shapes: B streams side by side, T tokens a step. A text of N tokens becomes B rows of N / B; batch ``i`` holds the
``i``-th T columns, so that a row of batch ``i + 1`` continues where the same row of batch ``i`` ended.
"""

from __future__ import annotations

import glob
import math
import os
import re
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from srnn.datasets.base import SPLITS, Batch, Batches, DataModule, Split
from srnn.errors import UserError
from srnn.registry import Range, register
from srnn.registry.option_types import Count, PositiveShare
from srnn.vocabulary import Level, Vocabulary

VocabularyLimit = Annotated[int, Range(ge=2)] | None  # one word, and the unknown one
_REST_OF_WORD = re.compile(r"(?<=\S)\S+")
IGNORED = -100  # target of padding; torch's cross-entropy skips it


@dataclass(frozen=True)
class Texts:
    """The three splits of a text data set."""

    train: str
    valid: str
    test: str

    @classmethod
    def split(cls, text: str, valid_share: float, test_share: float, level: Level = "characters") -> Texts:
        """By position: the end is the test text, what comes before it validation.

        Args:
            text: all of it.
            valid_share: share of its characters, 0 to 1.
            test_share: share of its characters, 0 to 1.
            level: with ``words`` none is cut in two: one at a border belongs to the text before it.
        """
        first_test = round(len(text) * (1 - test_share))
        first_valid = round(len(text) * (1 - test_share - valid_share))
        if level == "words":
            first_valid, first_test = _word_end(text, first_valid), _word_end(text, first_test)
        return cls(text[:first_valid], text[first_valid:first_test], text[first_test:])


def _word_end(text: str, position: int) -> int:
    """The end of the word that a cut at a position would go through, or the position."""
    rest = _REST_OF_WORD.match(text, position)
    return rest.end() if rest else position


class TextStreams(DataModule):
    """Base of the text data sets: a subclass says what the texts are.

    Example:
        >>> class Counting(TextStreams):
        ...     "The numbers in order."
        ...     def texts(self):
        ...         return Texts.split(" ".join(map(str, range(1000))), 0.1, 0.1)
        >>> data = Counting(batch_size=4, sequence_length=8)
        >>> data.setup()
        >>> inputs_BT, targets_BT = next(iter(data.train_dataloader()))
        >>> inputs_BT.shape, data.vocabulary.decode(inputs_BT[0].tolist())
        (torch.Size([4, 8]), '0 1 2 3 ')
        >>> data.vocabulary.decode(targets_BT[0].tolist())
        ' 1 2 3 4'

    Attributes:
        vocabulary: made of the training text, or the one given to ``setup``; there after it.
        counts, tokens: split -> characters and tokens it has; there after ``setup``.

    Args:
        level: what a token is.
        batch_size: B, the streams side by side in training.
        sequence_length: T, the tokens back-propagation goes through.
        eval_streams: B of validation and test, where each stream starts from a zero state.
        vocabulary_limit: with words, keep this many; None keeps all.
    """

    objective = "next_token"
    unit = "characters"
    vocabulary: Vocabulary

    def __init__(
        self,
        level: Level = "characters",
        batch_size: int = 32,
        sequence_length: int = 64,
        eval_streams: int = 16,
        vocabulary_limit: int | None = None,
    ) -> None:
        super().__init__()
        self.level = level
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.eval_streams = eval_streams
        self.vocabulary_limit = vocabulary_limit
        self.tokens: dict[Split, int] = {}
        self._streams: dict[Split, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def texts(self) -> Texts:
        """Read or make the three texts.

        Raises:
            UserError: a text that cannot be used.
        """

    def setup(self, stage: str | None = None, vocabulary: Vocabulary | None = None) -> None:
        """Read the texts and cut them into streams, once.

        Args:
            stage: not used, as all splits are made at once.
            vocabulary: a trained model's own; None builds it from the training text.

        Raises:
            UserError: a text that cannot be used, or is too short for its streams.
        """
        if self._streams:
            return
        texts = self.texts()
        self.vocabulary = vocabulary or Vocabulary.build(self.level, texts.train, self.vocabulary_limit)
        self.sizes = {"vocabulary_size": len(self.vocabulary)}
        for split in SPLITS:
            self._add_split(split, getattr(texts, split))

    def _add_split(self, split: Split, text: str) -> None:
        tokens = self.vocabulary.encode(text)
        count = self.batch_size if split == "train" else self.eval_streams
        if len(tokens) <= count:
            raise UserError(
                f"dataset: the {split} part has {len(tokens)} {self.level}, too few for {count} streams: give more "
                f"text, or lower dataset.{'batch_size' if split == 'train' else 'eval_streams'}."
            )
        self.counts[split], self.tokens[split] = len(text), len(tokens)
        self._streams[split] = streams(tokens, count)

    def batches(self, split: Split) -> Batches:
        """Contiguous streams: row b of a batch continues where row b of the one before ended."""
        return stream_batches(*self._streams[split], self.sequence_length)


def streams(tokens: np.ndarray, count: int) -> tuple[Tensor, Tensor]:
    """Cut a text into ``count`` rows side by side: inputs_BN and targets_BN, one token ahead.

    Every token but the first is a target exactly once; the last row is padded with ``IGNORED`` targets.

    Example:
        >>> inputs_BN, targets_BN = streams(np.arange(6), 2)
        >>> inputs_BN.tolist(), targets_BN.tolist()
        ([[0, 1, 2], [3, 4, 0]], [[1, 2, 3], [4, 5, -100]])

    Args:
        tokens: of the text, [tokens].
        count: B.

    Returns:
        int64, both with N columns.
    """
    length = len(tokens) - 1
    width = math.ceil(length / count)
    inputs = np.zeros(count * width, dtype=np.int64)
    targets = np.full(count * width, IGNORED, dtype=np.int64)
    inputs[:length], targets[:length] = tokens[:-1], tokens[1:]
    return torch.from_numpy(inputs.reshape(count, width)), torch.from_numpy(targets.reshape(count, width))


def stream_batches(inputs_BN: Tensor, targets_BN: Tensor, sequence_length: int) -> Batches:
    """Batches of ``sequence_length`` columns; the last one may be narrower."""

    def fetch(epoch: int, index: int) -> Batch:
        columns = slice(index * sequence_length, (index + 1) * sequence_length)
        return inputs_BN[:, columns], targets_BN[:, columns]

    return Batches(fetch, math.ceil(inputs_BN.shape[1] / sequence_length))


@register.dataset("text")
class Text(TextStreams):
    """Any text file, folder or glob; split into train, validation and test by position."""

    def __init__(
        self,
        path: str,
        level: Level = "characters",
        valid_share: PositiveShare = 0.05,
        test_share: PositiveShare = 0.05,
        vocabulary_limit: VocabularyLimit = None,
        batch_size: Count = 32,
        sequence_length: Count = 64,
        eval_streams: Count = 16,
    ) -> None:
        super().__init__(level, batch_size, sequence_length, eval_streams, vocabulary_limit)
        if valid_share + test_share >= 1:
            raise UserError(
                f"dataset.valid_share={valid_share} and dataset.test_share={test_share} leave nothing to train on; "
                f"their sum must be below 1."
            )
        if not path.strip():  # it would be the working folder, with all that lies in it
            raise UserError("dataset.path is empty: name a text file, a folder of them, or a pattern.")
        # Absolute, so that a packed model's run finds its text from anywhere.
        self.path = os.path.abspath(os.path.expanduser(path))
        self.valid_share = valid_share
        self.test_share = test_share

    def texts(self) -> Texts:
        """Read all files in the order of their names."""
        parts = [read_text(file) for file in _files(self.path)]
        if self.level == "words":  # the last word of a file is no beginning of the next one's first
            parts[:-1] = [f"{part}\n" if part[-1:].strip() else part for part in parts[:-1]]
        text = "".join(parts)
        if not text.strip():
            raise UserError(f"dataset.path={self.path} is empty: give a file with text in it.")
        return Texts.split(text, self.valid_share, self.test_share, self.level)

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute path."""
        return config | {"path": self.path}


def _files(path: str) -> list[Path]:
    if os.path.isdir(path):
        found = [p for p in Path(path).rglob("*") if p.is_file()]
        # What is hidden is no text, such as .git; but the folder itself may lie in a hidden one, as .data/books does.
        files = [p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        if found and not files:
            raise UserError(
                f"dataset.path={path}: all files in the folder are hidden (their names, or those of their folders, "
                f"begin with a dot): name them by a pattern, such as '{path}/.*'."
            )
    else:
        files = [Path(p) for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        # A file whose name holds brackets or stars matches no pattern, not even its own.
        files = files or ([Path(path)] if os.path.isfile(path) else [])
    if not files and os.path.isdir(path):
        raise UserError(f"dataset.path={path}: the folder holds no files.")
    if not files and os.path.exists(path):
        raise UserError(f"dataset.path={path} is no file: a pipe is read once only; write what comes out of it to one.")
    if not files:
        raise UserError(f"dataset.path={path}: no such file or folder, and no file matches it.")
    return sorted(files)


def read_text(path: Path, option: str = "dataset.path") -> str:
    """A UTF-8 text file, whose line ends of any kind (LF, CR LF, CR) are read as LF.

    Args:
        path: the file.
        option: what named it, for messages.

    Raises:
        UserError: it cannot be read, or is anything else.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")  # without the byte order mark of some editors
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        levels = ", which every dataset.level reads, bytes too" if option == "dataset.path" else ""
        raise UserError(
            f"{option}: {path} is not UTF-8 text (byte {error.start}){levels}: convert it{_or_name_others(option)}."
        ) from None
    # Zero bytes are valid UTF-8, and no text has them.
    if "\0" in text:
        raise UserError(
            f"{option}: {path} is binary (it holds zero bytes): give a text file in UTF-8{_or_name_others(option)}."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _or_name_others(option: str) -> str:
    return ", or name text files only, as in 'folder/*.txt'" if option == "dataset.path" else ""
