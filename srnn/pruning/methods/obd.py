"""``pruning=obd``: what the loss misses least goes first, on the schedule of ``cubic``.

LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1989: without a weight w the loss rises by about h w^2 / 2, where
h is its second derivative. Adam divides a step by the square root of v, its mean of squared gradients, which stands for
h here and costs nothing to know. (Theis et al. 2018 take v itself, the diagonal of the Fisher information.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.methods.base import PrunerView
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.parts import Piece
from srnn.pruning.scope import Sharing
from srnn.registry import register

SECOND_MOMENT = "exp_avg_sq"  # torch's name of v in the state of Adam and its kind
DECAY = 0.999  # share of itself that a mean of squared gradients keeps at a step: Adam's own


@register.pruning("obd")
@dataclass(kw_only=True)
class OBD(Cubic):
    """Prune the weights that the loss misses least, by Adam's second moments (LeCun et al. 1989), as fast as cubic.

    Its scores are parts of the loss whatever matrix a weight is in, so all weights share one threshold unless told
    otherwise: where the sparsity goes is found. Beside an optimiser that keeps no mean of squared gradients it keeps
    one of its own, as large as the weights, until pruning is over.
    """

    share: Sharing = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._own: dict[str, Tensor] = {}  # parameter name -> a mean of squared gradients, where no optimiser has one
        self._moments: dict[str, Tensor] = {}  # what an update ranks by

    def before_update(self, pruner: PrunerView) -> None:
        """Look up the means of squared gradients; in the first step its own are those of this step.

        Raises:
            UserError: there are no gradients to look at.
        """
        first = {name: _next(None, name, p) for name, p in self._without(pruner).items() if name not in self._own}
        self._moments = {**_of_optimizers(pruner), **first, **self._own}

    def after_masks(self, pruner: PrunerView) -> None:
        """Take in the step's gradients, and let go of what is the optimiser's.

        Raises:
            UserError: there are no gradients to look at.
        """
        self._moments = {}
        left = self._without(pruner) if pruner.itr < self.done_from else {}
        self._own = {name: _next(self._own.get(name), name, parameter) for name, parameter in left.items()}

    def _without(self, pruner: PrunerView) -> dict[str, nn.Parameter]:
        """The parameters of which no optimiser keeps a mean of squared gradients."""
        theirs = _of_optimizers(pruner)
        return {part.parameter_name: part.parameter for part in pruner.parts if part.parameter_name not in theirs}

    def importance(self, piece: Piece) -> Tensor:
        """The root of w^2 sqrt(v): |w| v^(1/4)."""
        return piece.weight.abs() * piece.of(self._moments[piece.part.parameter_name]).pow(0.25)

    def state_dict(self) -> dict[str, Any]:
        """Its own means of squared gradients."""
        return {name: mean.clone() for name, mean in self._own.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        self._own = {name: mean.clone() for name, mean in state.items()}


def _of_optimizers(pruner: PrunerView) -> dict[str, Tensor]:
    """Parameter name -> the optimiser's own mean of squared gradients, where it keeps one."""
    states = {parameter: state for each in pruner.optimizers for parameter, state in each.state.items()}
    kept = {part.parameter_name: states.get(part.parameter, {}).get(SECOND_MOMENT) for part in pruner.parts}
    return {name: moment for name, moment in kept.items() if moment is not None}


def _next(before: Tensor | None, name: str, parameter: nn.Parameter) -> Tensor:
    """A mean of squared gradients after one more step."""
    if parameter.grad is None:
        raise UserError(
            f"pruning=obd ranks by squared gradients, and {name} has none: call pruner.step() before "
            f"optimizer.zero_grad(), or choose pruning=cubic."
        )
    # What overflowed in a step that mixed precision skips tells nothing.
    gradient = parameter.grad.detach().nan_to_num(0.0, 0.0, 0.0)
    mean = torch.zeros_like(gradient) if before is None else before.to(gradient.device)
    return mean.mul_(DECAY).addcmul_(gradient, gradient, value=1 - DECAY)
