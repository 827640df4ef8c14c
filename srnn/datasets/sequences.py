"""Sequences with a label or a number each, small enough to test any idea on."""

from __future__ import annotations

from typing import Annotated

import torch

from srnn.datasets.base import Batch, LabelledSequences, Split
from srnn.errors import UserError
from srnn.registry import Range, register
from srnn.registry.option_types import Count


@register.dataset("digits")
class Digits(LabelledSequences):
    """1,797 handwritten digits (scikit-learn), each read row by row: 8 steps of 8 numbers, 10 classes."""

    objective = "classification"

    def __init__(self, batch_size: Count = 32) -> None:
        super().__init__(batch_size)

    def sequences(self) -> dict[Split, Batch]:
        """By position, which separates the writers: 1,257 to train on, 270 for validation, 270 for the test."""
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise UserError("dataset=digits needs scikit-learn: pip install 'srnn[digits]'.") from None
        found = load_digits()
        x_NTI = torch.from_numpy(found.images).float() / 16
        labels_N = torch.from_numpy(found.target).long()
        sizes = [1257, 270, 270]
        train, valid, test = zip(x_NTI.split(sizes), labels_N.split(sizes), strict=True)
        return {"train": train, "valid": valid, "test": test}


@register.dataset("adding")
class Adding(LabelledSequences):
    """The adding problem (Hochreiter & Schmidhuber 1997): add the two marked ones of many numbers, a test of memory.

    A step has a number from 0 to 1 and a mark, which is 1 at one step of each half and else 0. Always guessing 1 has
    a mean squared error of 1/6.
    """

    objective = "regression"

    def __init__(
        self,
        sequence_length: Annotated[int, Range(ge=2, le=100_000)] = 100,
        train_sequences: Count = 20_000,
        eval_sequences: Count = 1_000,
        data_seed: Annotated[int, Range(ge=0, le=2**31)] = 0,
        batch_size: Count = 32,
    ) -> None:
        super().__init__(batch_size)
        self.sequence_length = sequence_length
        self.lengths: dict[Split, int] = {"train": train_sequences, "valid": eval_sequences, "test": eval_sequences}
        self.data_seed = data_seed

    def sequences(self) -> dict[Split, Batch]:
        """All splits, from ``data_seed``, whatever the run's own seed is."""
        random = torch.Generator().manual_seed(self.data_seed)
        return {split: self._make(count, random) for split, count in self.lengths.items()}

    def _make(self, count: int, random: torch.Generator) -> Batch:
        half = self.sequence_length // 2
        # One mark in each half: the first has to be remembered across the middle.
        numbers_NT = torch.rand(count, self.sequence_length, generator=random)
        first = torch.randint(0, half, (count,), generator=random)
        second = torch.randint(half, self.sequence_length, (count,), generator=random)
        marked_N2 = torch.stack([first, second], 1)
        marks_NT = torch.zeros_like(numbers_NT).scatter_(1, marked_N2, 1.0)
        return torch.stack([numbers_NT, marks_NT], 2), numbers_NT.gather(1, marked_N2).sum(1, keepdim=True)
