"""Masks by rank, or under a threshold, on a GPU: launched, and nobody waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srnn.pruning.launches import Launches, RecentLaunches, blocks_of, pointer, put
from srnn.pruning.scores import RankedBy

MOST_UNITS = 1 << 30  # counted in 32 bits


class UnitRow(NamedTuple):
    """Some of a group's units.

    Attributes:
        values: fp32, their scores, or the weights that they are.
        kept: the mask of weights, of which pruned ones are ranked last; None ranks all by their values.
        new_mask: bool, where the new mask goes.
        moments: fp32, of weights that are ranked by saliencies; else None.
    """

    values: Tensor
    kept: Tensor | None
    new_mask: Tensor
    moments: Tensor | None


@dataclass(frozen=True)
class Cut:
    """How far to prune.

    Attributes:
        zeros: how many weights, to the nearest unit; the smallest go.
        share: 0 to 1: prune no more than what is below ``factor`` times the score that this share of all units lies at
            or under; None prunes all of ``zeros``.
        factor: of that score.
        rising: the threshold never falls below the last one.
    """

    zeros: int
    share: float | None = None
    factor: float = 0.0
    rising: bool = False

    def rank(self, units: int) -> int:
        """Of the score that ``share`` means, counted from 1."""
        return max(1, min(units, round((self.share or 0.0) * units)))


class GpuCut:
    """Cuts the units of a group again and again.

    Attributes:
        epsilon: [1], fp64, on the GPU: the threshold of the last cut; None before.
    """

    def __init__(self) -> None:
        self.epsilon: Tensor | None = None
        # In memory of the host, which the GPU writes to: whether a weight was infinite or NaN, and whether a score
        # was, or negative.
        self._unrankable: Tensor | None = None
        self._flags: Any = None  # the same, faster to look at
        self._any: Tensor | None = None  # [], bool, on the GPU: whether any score was, of all that were noted
        self._recent = RecentLaunches(2)

    def __reduce__(self) -> tuple[type[GpuCut], tuple[()]]:
        return GpuCut, ()  # addresses are no good elsewhere

    def _begin(self, device: torch.device) -> Tensor:
        """The flags."""
        if self.epsilon is None or self._unrankable is None or self.epsilon.device != device:
            self.epsilon = torch.zeros(1, dtype=torch.float64, device=device)
            self._unrankable = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
            self._flags, self._recent, self._any = self._unrankable.numpy(), RecentLaunches(2), None
        return self._unrankable

    def note_unrankable(self, scores: Tensor) -> None:
        """Note whether one of these scores is infinite, NaN or negative, once the GPU knows."""
        flags, unrankable = self._begin(scores.device), (~scores.isfinite() | (scores < 0)).any()
        # With those before: the host may be several cuts ahead, and would see the last one's answer alone.
        self._any = unrankable if self._any is None else unrankable | self._any
        flags[1:].copy_(self._any, non_blocking=True)

    @property
    def met_unrankable(self) -> bool:
        """Whether a cut met what cannot be ranked, as far as the GPU has come."""
        return self._flags is not None and bool(self._flags[0] or self._flags[1])  # any() takes twenty times as long

    def forget_unrankable(self) -> None:
        """What was met is told, or no longer there."""
        if self._flags is not None:
            self._flags[:], self._any = 0, None

    def __call__(
        self, rows: Sequence[UnitRow], ranked_by: RankedBy, keep: int, cut: Cut, before: float | Tensor
    ) -> Tensor:
        """Write new masks.

        Args:
            rows: of all units in their order, on one device, each contiguous.
            ranked_by: what says how they are ranked.
            keep: units to keep by rank.
            cut: how far.
            before: the threshold of the last cut.

        Returns:
            ``epsilon``, which the next cut writes to.
        """
        device = rows[0].values.device
        self._begin(device)
        assert self.epsilon is not None
        if before is not self.epsilon:
            self.epsilon.fill_(float(before))
        rows = [row for row in rows if row.values.numel()]
        units = sum(row.values.numel() for row in rows)
        table = tuple([(row.values.numel(), *map(pointer, row)) for row in rows])
        launches, wanted = self._recent.get((ranked_by, table), lambda: self._launches(table, units, ranked_by))
        by_rank, rank = cut.share is None, units - keep + 1
        numbers = (rank if by_rank else cut.rank(units), rank, keep, by_rank, cut.factor, cut.rising)
        wanted.copy_(put(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device))
        launches.run()
        return self.epsilon

    def _launches(self, table: Sequence[Sequence[int]], units: int, ranked_by: RankedBy) -> tuple[Launches, Tensor]:
        from srnn.pruning.cutting_kernel import CUT_BLOCK, launches  # here, because Triton may be missing

        assert self.epsilon is not None
        assert self._unrankable is not None
        device = self.epsilon.device
        blocks = put(table, device), *blocks_of([row[0] for row in table], CUT_BLOCK, device)
        wanted = torch.zeros(6, dtype=torch.float64, device=device)
        several = launches(blocks, wanted, self.epsilon, self._unrankable, units, int(ranked_by))
        times = 3 if ranked_by == RankedBy.SCORES else 1  # scores move in memory, weights do not
        return Launches(list(several), device, times), wanted
