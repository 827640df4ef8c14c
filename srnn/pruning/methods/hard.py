"""``pruning=hard``: train dense, zero the smallest weights once, train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.groups import LAYER_TYPES, Group, keep_largest, target_count
from srnn.pruning.methods.base import ForecastRow, LayerTypes, PruningMethod, Sparsity
from srnn.pruning.schedules import RunLength, When, iteration
from srnn.registry import check_ranges, register


@register.pruning("hard")
@dataclass
class Hard(PruningMethod):
    """Zero the smallest weights of each layer type once, then train on: what the paper compares with."""

    sparsity: Sparsity = 0.9
    prune_itr: When = 0.25
    layer_types: LayerTypes = field(default_factory=lambda: list(LAYER_TYPES))

    def __post_init__(self) -> None:
        check_ranges(self)

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the step; it must leave a step to train on."""
        itr = iteration("pruning.prune_itr", self.prune_itr, 0.25 * run.total_steps, run)
        if not 0 < itr < run.total_steps:
            raise UserError(f"pruning.prune_itr={itr} must lie inside the run: 1 to {run.total_steps - 1}.")
        self.dense_until, self.done_from = itr, itr + 1

    def is_update(self, itr: int) -> bool:
        """Once."""
        return itr == self.dense_until

    def update(self, itr: int, group: Group) -> None:
        """Keep the largest weights, by rank, to the exact count."""
        magnitudes = group.magnitudes()
        keep = keep_largest(magnitudes, group.size - target_count(group.size, self.sparsity))
        group.epsilon = float(magnitudes[keep].min())
        group.set_masks(keep)

    def wanted(self, group: Group) -> int:
        """The share asked for, to the nearest weight."""
        return target_count(group.size, self.sparsity)

    def forecast(self) -> list[ForecastRow]:
        """One row: the step."""
        return [ForecastRow("prune once", self.dense_until, None, self.sparsity)]
