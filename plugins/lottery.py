"""Example plug-in: a pruning method, as ``pruning=lottery``.

Iterative magnitude pruning with rewinding: train, cut, go back to early weights, train on (Frankle et al., *Linear
mode connectivity and the lottery ticket hypothesis*, ICML 2020). A method says after which iterations masks change
(``updates``), what they keep (``update``) and, here, what else becomes of the weights (``after_masks``). Scope,
structures, masking, optimiser states, checkpoints, forecasts and reports are the pruner's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning import Group, PrunerView, RunLength, Shared
from srnn.pruning.schedules import When, given, iteration
from srnn.registry import register


@register.pruning("lottery")
@dataclass(kw_only=True)
class Lottery(Shared):
    """Cut the smallest weights several times, each time going back to early weights (Frankle et al. 2020).

    ``at`` are the cuts, as fractions of the run; each leaves the same share of what the one before it left.
    ``rewind_itr`` is the step whose weights are gone back to, with the optimiser's state set to zero; null does not go
    back, which is the iterative pruning of Han et al. 2015.
    """

    at: list[float] = field(default_factory=lambda: [0.2, 0.4, 0.6])
    rewind_itr: When | None = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.at or not all(0 < share < 1 for share in self.at):
            raise UserError(f"pruning.at={self.at} must be fractions of the run, between 0 and 1.")

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Turn fractions into steps."""
        self.updates = sorted({max(1, round(share * run.total_steps)) for share in self.at})
        self.dense_until, self.done_from = self.updates[0] - 1, self.updates[-1]
        self.early: dict[str, Tensor] = {}
        if self.rewind_itr is None:
            self.rewind_to = None
            return
        self.rewind_to = max(1, iteration("pruning.rewind_itr", self.rewind_itr, 0.05 * run.total_steps, run))
        if self.rewind_to >= self.updates[0]:
            rewind = given("pruning.rewind_itr", self.rewind_itr, self.rewind_to)
            raise UserError(f"{rewind} must come before the first cut, at step {self.updates[0]}.")

    def update(self, itr: int, group: Group) -> None:
        """A cut, by rank."""
        last = itr == self.updates[-1]
        group.prune_to(group.target if last else group.zeros_for(self.expected(itr, group)))

    def expected(self, itr: int, group: Group) -> float:
        """Each cut leaves the same share of what was left."""
        cuts = sum(step <= itr for step in self.updates)
        share = 1 - (1 - (group.sparsity or 0.0)) ** (cuts / len(self.updates))
        return min(share, group.target / group.size)

    def after_masks(self, pruner: PrunerView) -> None:
        """Keep the early weights; go back to them after each cut."""
        parameters = {part.parameter_name: part.parameter for part in pruner.parts}
        if pruner.itr == self.rewind_to:
            self.early = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        if pruner.itr in self.updates and self.early:
            masks = pruner.masks()
            for name, parameter in parameters.items():
                parameter.copy_(self.early[name].to(parameter) * masks[name])
                for state in pruner.state_of(parameter):
                    state.zero_()
            if pruner.itr == self.done_from:
                self.early = {}

    def state_dict(self) -> dict[str, Any]:
        """The early weights, while they are needed."""
        return {"early": self.early}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        self.early = dict(state["early"])
