"""Example plug-in: a pruning method, as ``pruning=cuts``.

Train, cut, train on, cut again (Han et al. 2015): the same sparsity as ``hard`` in several steps. A method says at
which iterations it wants to look (``is_update``) and what it then keeps (``update``); masking, optimiser states,
checkpoints and reports are the pruner's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning import Group, PruningMethod, RunLength
from srnn.pruning.groups import LAYER_TYPES, LayerType, keep_largest, target_count
from srnn.registry import Range, check_ranges, register


@register.pruning("cuts")
@dataclass
class Cuts(PruningMethod):
    """Zero the smallest weights of each layer type in several cuts, with training between them (Han et al. 2015)."""

    sparsity: Annotated[float, Range(gt=0, lt=1)] = 0.9
    at: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.3, 0.4, 0.5])
    layer_types: list[LayerType] = field(default_factory=lambda: list(LAYER_TYPES))

    def __post_init__(self) -> None:
        check_ranges(self)
        if not self.at or not all(0 < share < 1 for share in self.at):
            raise UserError(f"pruning.at={self.at} must be fractions of the run, between 0 and 1.")

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Turn fractions into steps."""
        self.steps = sorted({max(1, round(share * run.total_steps)) for share in self.at})
        self.dense_until, self.done_from = self.steps[0], self.steps[-1] + 1

    def is_update(self, itr: int) -> bool:
        """At each cut."""
        return itr in self.steps

    def update(self, itr: int, group: Group) -> None:
        """Each cut leaves the same share of what the one before it left."""
        share = (self.steps.index(itr) + 1) / len(self.steps)
        magnitudes = group.magnitudes()
        keep = keep_largest(magnitudes, group.size - target_count(group.size, 1 - (1 - self.sparsity) ** share))
        group.epsilon = float(magnitudes[keep].min())
        group.set_masks(keep)

    def wanted(self, group: Group) -> int:
        """The share asked for, to the nearest weight."""
        return target_count(group.size, self.sparsity)
