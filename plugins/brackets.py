"""Example plug-in: a data set of balanced brackets, as ``dataset=brackets``.

A plug-in is a Python file in ``plugins/``. It registers a class or function; the typed arguments are the options,
checked like srnn's own, and ``python -m srnn list dataset`` shows them. A next bracket is predictable only by
remembering which ones are open, so this is a quick test of a network's memory.
"""

from __future__ import annotations

import random
from typing import Annotated

from srnn.datasets import Texts, TextStreams
from srnn.registry import Range, register

PAIRS = ["()", "[]", "{}", "<>"]


@register.dataset("brackets")
class Brackets(TextStreams):
    """Random text of balanced brackets: a test of memory that needs no file."""

    def __init__(
        self,
        pairs: Annotated[int, Range(ge=1, le=4)] = 3,
        max_depth: Annotated[int, Range(ge=1, le=1000)] = 8,
        train_characters: Annotated[int, Range(ge=1000, le=100_000_000)] = 200_000,
        text_seed: int = 0,
        batch_size: Annotated[int, Range(ge=1)] = 32,
        sequence_length: Annotated[int, Range(ge=1)] = 64,
    ) -> None:
        super().__init__("characters", batch_size, sequence_length)
        self.pairs = PAIRS[:pairs]
        self.max_depth = max_depth
        self.train_characters = train_characters
        self.text_seed = text_seed

    def texts(self) -> Texts:
        """Three texts from three seeds; validation and test are a tenth as long."""
        short = self.train_characters // 10
        lengths = {"train": self.train_characters, "valid": short, "test": short}
        return Texts(**{part: self._write(n, f"{self.text_seed} {part}") for part, n in lengths.items()})

    def _write(self, length: int, seed: str) -> str:
        rng = random.Random(seed)
        written: list[str] = []
        closing: list[str] = []
        while len(written) < length:
            opens = not closing or (len(closing) < self.max_depth and rng.random() < 0.5)
            if opens:
                pair = rng.choice(self.pairs)
                written.append(pair[0])
                closing.append(pair[1])
            else:
                written.append(closing.pop())
        return "".join(written)
