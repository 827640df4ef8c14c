"""``pruning=hard``: train dense, zero the smallest weights once, train on."""

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
    """Zero the smallest weights of each layer type once, then train on: what the paper compares with."""

    prune_itr: When = 0.25
    delayed = True  # as Algorithm 1, which it is compared with

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the step; it must leave a step to train on."""
        itr = iteration("pruning.prune_itr", self.prune_itr, 0.25 * run.total_steps, run)
        if run.total_steps < 2:
            raise UserError(
                f"pruning=hard prunes inside a training of 2 steps or more, and this run has {run.total_steps}: to "
                f"prune without training, take Pruner(model, "
                f"'hard', 2, prune_itr=1, sparsity=...), and call step() twice."
            )
        if not 0 < itr < run.total_steps:
            at = given("pruning.prune_itr", self.prune_itr, itr)
            raise UserError(f"{at} must lie inside {run}: from step 1 to {run.total_steps - 1}.")
        self.updates = range(itr, itr + 1)
        self.dense_until, self.done_from = itr, itr + 1

    def update(self, itr: int, group: Group) -> None:
        """Keep the largest weights, by rank, to the exact count."""
        group.prune_to(group.target)

    def expected(self, itr: int, group: Group) -> float:
        """All at once."""
        return group.target / group.size if itr >= self.updates[0] else 0.0
