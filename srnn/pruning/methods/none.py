"""``pruning=none``: dense training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from srnn.pruning.groups import Group
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.schedules import RunLength
from srnn.registry import register


@register.pruning("none")
class NoPruning(PruningMethod):
    """Dense training: the baseline."""

    needs_training = False

    def groups(self, model: nn.Module) -> list[Group]:
        """None."""
        return []

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Nothing to resolve."""
        self.dense_until, self.done_from = run.total_steps, 0

    def update(self, itr: int, group: Group) -> None:
        """Never called."""
