"""Masks by rank, or under a threshold, on a GPU: launched, and nobody waits for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srnn.pruning.masking import Launches, RecentLaunches, blocks_of, put

# In fp32: scores, or weights with their mask; where new masks go; and moments, where these say how weights are ranked.
UnitRow = tuple[Tensor, Tensor | None, Tensor, Tensor | None]
MOST_UNITS = 1 << 30  # counted in 32 bits


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
        self._infinite: Tensor | None = None
        self._flags: Any = None  # the same, faster to look at
        self._odd: Tensor | None = None  # [], bool, on the GPU: of all scores since the last that was told of
        self._recent = RecentLaunches(2)

    def __reduce__(self) -> tuple[type[GpuCut], tuple[()]]:
        return GpuCut, ()  # addresses are no good elsewhere

    def _begin(self, device: torch.device) -> Tensor:
        """The flags."""
        if self.epsilon is None or self._infinite is None or self.epsilon.device != device:
            self.epsilon = torch.zeros(1, dtype=torch.float64, device=device)
            self._infinite = torch.zeros(2, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")
            self._flags, self._recent, self._odd = self._infinite.numpy(), RecentLaunches(2), None
        return self._infinite

    def tell(self, scores: Tensor) -> None:
        """Note whether one of these scores is infinite, NaN or negative, once the GPU knows."""
        flags, odd = self._begin(scores.device), (~scores.isfinite() | (scores < 0)).any()
        # With those before: the host may be several cuts ahead, and would see the last one's answer alone.
        self._odd = odd if self._odd is None else odd | self._odd
        flags[1:].copy_(self._odd, non_blocking=True)

    def found_odd(self) -> bool:
        """Whether a cut since this was asked met what cannot be ranked, as far as the GPU has come."""
        if self._flags is None or not (self._flags[0] or self._flags[1]):  # any() takes twenty times as long
            return False
        self._flags[:], self._odd = 0, None
        return True

    def __call__(self, rows: Sequence[UnitRow], weights: bool, keep: int, cut: Cut, before: float | Tensor) -> Tensor:
        """Write new masks.

        Args:
            rows: of all units in their order, on one device, each contiguous.
            weights: whether they are weights, ranked by their magnitudes or by these times the fourth roots of moments,
                and those that are pruned last; else scores.
            keep: units to keep by rank.
            cut: how far.
            before: the threshold of the last cut.

        Returns:
            ``epsilon``, which the next cut writes to.
        """
        device = rows[0][0].device
        self._begin(device)
        assert self.epsilon is not None
        if before is not self.epsilon:
            self.epsilon.fill_(float(before))
        rows = [row for row in rows if row[0].numel()]
        units = sum(row[0].numel() for row in rows)
        table = tuple([(row[0].numel(), *map(_address, row)) for row in rows])
        kind = 0 if not weights else 1 if rows[0][3] is None else 2
        launches, wanted = self._recent.get((kind, table), lambda: self._launches(table, units, kind))
        by_rank, rank = cut.share is None, units - keep + 1
        numbers = (rank if by_rank else cut.rank(units), rank, keep, by_rank, cut.factor, cut.rising)
        wanted.copy_(put(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device))
        launches.run()
        return self.epsilon

    def _launches(self, table: Sequence[Sequence[int]], units: int, kind: int) -> tuple[Launches, Tensor]:
        from srnn.pruning.cutting_kernel import CUT_BLOCK, launches  # here, because Triton may be missing

        assert self.epsilon is not None
        assert self._infinite is not None
        device = self.epsilon.device
        blocks = put(table, device), *blocks_of([row[0] for row in table], CUT_BLOCK, device)
        wanted = torch.zeros(6, dtype=torch.float64, device=device)
        several = launches(blocks, wanted, self.epsilon, self._infinite, units, kind)
        return Launches(list(several), device, 1 if kind else 3), wanted  # scores move


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
