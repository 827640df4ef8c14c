"""Vocabularies: text <-> token numbers. No Lightning here, so that the runtime can use it."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

Level = Literal["characters", "bytes", "words"]
UNKNOWN = "<unk>"
# How ``Vocabulary.build`` numbers the tokens of a training text after the unknown one, in words.
ORDER: dict[Level, str] = {
    "characters": "its characters in the order of their code points",
    "words": "its words, the most frequent first",
    "bytes": "none: a byte is its own number",
}
# A word, or a line end: the line end is a token of its own, as in Penn Treebank.
_WORD = re.compile(r"\n|[^\s]+")


class Vocabulary(ABC):
    """Encodes text as token numbers and back.

    Example:
        >>> vocabulary = Vocabulary.build("words", "to be or not to be", limit=3)
        >>> len(vocabulary), vocabulary.encode("to be brave").tolist()
        (3, [1, 2, 0])
        >>> vocabulary.decode([1, 2, 0]), vocabulary.unknown("to be brave")
        ('to be <unk>', ['brave'])

    Attributes:
        level: ``characters``, ``bytes`` or ``words``.
        placeholder: what ``decode`` writes for what it does not know.
    """

    level: Level
    placeholder: ClassVar[str] = "\N{REPLACEMENT CHARACTER}"

    @abstractmethod
    def __len__(self) -> int:
        """Number of tokens, V."""

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Token numbers of a text, int64 of its length in tokens."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers."""

    def unknown(self, text: str) -> list[str]:
        """The tokens of a text that are not in here, each once, in their order."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain data that ``from_dict`` takes."""
        return {"level": self.level}

    @staticmethod
    def build(level: Level, text: str, limit: int | None = None) -> Vocabulary:
        """The vocabulary of a training text.

        Args:
            level: what a token is: ``characters``, ``bytes`` or ``words``.
            text: the training text.
            limit: with words, V at most, <unk> among them: the most frequent are kept; None keeps all.
        """
        if level == "bytes":
            return Bytes()
        if level == "characters":
            return Characters(sorted(set(text)))
        # <unk> may be in the text itself, as in Penn Treebank; it has number 0 without being counted.
        counts = Counter(word for word in _WORD.findall(text) if word != UNKNOWN)
        most_common = counts.most_common(limit and limit - 1)
        return Words([word for word, _ in most_common])

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Vocabulary:
        """Rebuild what ``to_dict`` gave; it may come out of a file from anywhere.

        Raises:
            ValueError: it is anything else.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"a vocabulary must be a mapping, not a {type(data).__name__}")
        level, tokens = data.get("level"), data.get("tokens", [])
        if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
            raise ValueError("vocabulary tokens must be a list of strings")
        if level == "bytes":
            return Bytes()
        if level == "characters" and all(len(token) == 1 for token in tokens):
            return Characters(tokens)
        if level == "words":
            return Words(tokens)
        raise ValueError(f"unknown vocabulary of level {level!r}")


class Bytes(Vocabulary):
    """The 256 bytes of UTF-8."""

    level: Level = "bytes"

    def __len__(self) -> int:
        return 256

    def encode(self, text: str) -> np.ndarray:
        """One token a byte."""
        # What Python could not decode, as in a prompt from a terminal, are the bytes that were there.
        return np.frombuffer(text.encode(errors="surrogateescape"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        """Bytes that are no UTF-8 become the replacement character."""
        return bytes(list(tokens)).decode(errors="replace")


class _Listed(Vocabulary):
    """A list of known tokens; number 0 is the unknown one."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = [UNKNOWN, *tokens]
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def to_dict(self) -> dict[str, Any]:
        return {"level": self.level, "tokens": self.tokens[1:]}

    @abstractmethod
    def split(self, text: str) -> Sequence[str]:
        """A text's tokens, known or not."""

    def encode(self, text: str) -> np.ndarray:
        """One token for each of ``split``."""
        tokens = self.split(text)
        return np.fromiter((self.numbers.get(token, 0) for token in tokens), dtype=np.int64, count=len(tokens))

    def unknown(self, text: str) -> list[str]:
        """The tokens of a text that are not in here, each once, in their order."""
        return [token for token in dict.fromkeys(self.split(text)) if token not in self.numbers]


class Characters(_Listed):
    """The characters of the training text."""

    level: Level = "characters"

    def split(self, text: str) -> Sequence[str]:
        """Characters."""
        return text

    def decode(self, tokens: Sequence[int]) -> str:
        """Unknown characters become the replacement character."""
        return "".join(self.tokens[token] if token else self.placeholder for token in tokens)


class Words(_Listed):
    """Words between white space, and the line end."""

    level: Level = "words"
    placeholder = UNKNOWN

    def split(self, text: str) -> Sequence[str]:
        """Words and line ends."""
        return _WORD.findall(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Words with one space between them."""
        text = " ".join(self.tokens[token] for token in tokens)
        return text.replace(" \n ", "\n").replace("\n ", "\n").replace(" \n", "\n")
