"""Example plug-in: a data set of sequences with a number each, as ``dataset=sine``.

A subclass of ``LabelledSequences`` names its objective and gives its sequences; batches, the sizes that a network has
to fit, and resuming in the middle of a pass are the base's. With classes instead of numbers the objective is
``classification``, and the second tensor of each split holds int64 labels, ``[N]``.
"""

from __future__ import annotations

from typing import Annotated

import torch

from srnn.datasets import LabelledSequences
from srnn.datasets.base import Batch, Split
from srnn.registry import Range, register
from srnn.registry.option_types import Count, NonNegative


@register.dataset("sine")
class Sine(LabelledSequences):
    """Noisy sine waves; the number to tell is how many periods a wave has, from 1 to 4.

    Args:
        sequence_length: T, steps of a wave.
        train_sequences: waves to train on; validation and test have a tenth of them, at least 100.
        noise: standard deviation of what is added to a wave of height 1.
        batch_size: B, sequences a step.
    """

    objective = "regression"

    def __init__(
        self,
        sequence_length: Annotated[int, Range(ge=16, le=100_000)] = 64,
        train_sequences: Count = 4_000,
        noise: NonNegative = 0.1,
        batch_size: Count = 32,
    ) -> None:
        super().__init__(batch_size)
        self.sequence_length, self.train_sequences, self.noise = sequence_length, train_sequences, noise

    def sequences(self) -> dict[Split, Batch]:
        """Split -> waves_NT1 and periods_N1, the same ones whatever the run's seed."""
        random = torch.Generator().manual_seed(0)
        few = max(100, self.train_sequences // 10)
        counts: dict[Split, int] = {"train": self.train_sequences, "valid": few, "test": few}
        return {split: self._waves(count, random) for split, count in counts.items()}

    def _waves(self, count: int, random: torch.Generator) -> Batch:
        periods_N1 = 1 + 3 * torch.rand(count, 1, generator=random)
        starts_N1 = torch.rand(count, 1, generator=random)
        times_T = torch.arange(self.sequence_length) / self.sequence_length
        waves_NT = torch.sin(2 * torch.pi * (periods_N1 * times_T + starts_N1))
        waves_NT += self.noise * torch.randn(waves_NT.shape, generator=random)
        return waves_NT[:, :, None], periods_N1
