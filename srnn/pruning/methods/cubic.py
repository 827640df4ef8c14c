"""``pruning=cubic``: to a sparsity that rises by a cubic, Zhu and Gupta 2017 (arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import Shared
from srnn.pruning.schedules import CubicSchedule, Freq, RunLength, When, resolve_cubic
from srnn.registry import register
from srnn.registry.option_types import Share


@register.pruning("cubic")
@dataclass(kw_only=True)
class Cubic(Shared):
    """Prune the smallest weights to a sparsity that rises fast at first and then ever slower (Zhu & Gupta 2017)."""

    initial_sparsity: Share = 0.0
    start_itr: When = "auto"
    end_itr: When = "auto"
    freq: Freq = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_sparsity > self.sparsity:
            raise UserError(
                f"pruning.initial_sparsity={self.initial_sparsity:g} must be at most sparsity={self.sparsity:g}."
            )

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the schedule."""
        self.schedule: CubicSchedule = resolve_cubic(
            self.start_itr, self.end_itr, self.freq, self.initial_sparsity, run
        )
        self.updates = self.schedule.updates
        # With nothing to prune at the first update, the network is dense until the second.
        self.dense_until = self.schedule.start_itr - (self.initial_sparsity > 0)
        self.done_from = self.schedule.end_itr

    def update(self, itr: int, group: Group) -> None:
        """Prune the smallest units, by rank, to the sparsity of the schedule."""
        group.prune_to(group.zeros_for(self.expected(itr, group)))

    def expected(self, itr: int, group: Group) -> float:
        """The schedule's own, as far as N:M leaves so many to prune."""
        if itr < self.schedule.start_itr:
            return 0.0
        # Between two updates the sparsity is that of the last one.
        final = self.sparsity if group.sparsity is None else group.sparsity
        itr -= (itr - self.schedule.start_itr) % self.schedule.freq if itr < self.schedule.end_itr else 0
        share = max(min(self.initial_sparsity, final), self.schedule.sparsity(itr, final))
        return min(share, group.target / group.size)
