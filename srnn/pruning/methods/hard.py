"""``pruning=hard``: zero the smallest weights once, in the middle of a training or before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import Shared
from srnn.pruning.schedules import RunLength, When, given, iteration
from srnn.registry import register


@register.pruning("hard")
@dataclass(kw_only=True)
class Hard(Shared):
    """Zero the smallest weights of each layer type once, then train on: what the paper compares with.

    With ``prune_itr=0`` a trained network is pruned before the first step; see also ``srnn.prune``.
    """

    prune_itr: When = 0.25
    delayed = True  # as Algorithm 1, which it is compared with

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_training = self.prune_itr != 0

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the step, which must leave a step to train on; prune at once if it is 0."""
        itr = iteration("pruning.prune_itr", self.prune_itr, 0.25 * run.total_steps, run)
        self.updates = range(itr, itr + 1)
        if not self.needs_training:
            self.dense_until, self.done_from = -1, 0
            for group in groups:
                self.update(0, group)
            return
        if not 0 < itr < run.total_steps:
            at, last = given("pruning.prune_itr", self.prune_itr, itr), run.total_steps - 1
            raise UserError(
                f"{at} must lie inside {run}: {f'from step 1 to {last}' if last else 'it has no step inside'}. To "
                f"prune a trained network before the first step, set pruning.prune_itr=0; to prune it without "
                f"training, call srnn.prune(model, sparsity=...), or `srnn prune`."
            )
        self.dense_until, self.done_from = itr, itr + 1

    def update(self, itr: int, group: Group) -> None:
        """Keep the largest weights, by rank, to the exact count."""
        group.prune_to(group.target)

    def expected(self, itr: int, group: Group) -> float:
        """All at once."""
        return group.target / group.size if itr >= self.updates[0] else 0.0
