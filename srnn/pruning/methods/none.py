"""``pruning=none``: dense training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from srnn.pruning.groups import Group
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.schedules import RunLength
from srnn.registry import register


@register.pruning("none")
class NoPruning(PruningMethod):
    """Dense training: the baseline."""

    layer_types = ()

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Nothing to resolve."""
        self.dense_until, self.done_from = run.total_steps, 0

    def is_update(self, itr: int) -> bool:
        """Never."""
        return False

    def update(self, itr: int, group: Group) -> None:
        """Never called."""

    def wanted(self, group: Group) -> int:
        """No weight."""
        return 0
