"""``pruning=obd``: what the loss misses least goes first, on the schedule of ``cubic``.

LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1989: without a weight w the loss rises by about h w^2 / 2, where
h is its second derivative. Adam divides a step by the square root of v, its mean of squared gradients, which stands for
h here and costs nothing to know. (Theis et al. 2018 take v itself, the diagonal of the Fisher information.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.methods.base import PrunerView
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.parts import Piece
from srnn.pruning.scope import Sharing
from srnn.registry import register

SECOND_MOMENT = "exp_avg_sq"  # torch's name of v in the state of Adam and its kind


@register.pruning("obd")
@dataclass(kw_only=True)
class OBD(Cubic):
    """Prune the weights that the loss misses least, by Adam's second moments (LeCun et al. 1989), as fast as cubic.

    Its scores are parts of the loss whatever matrix a weight is in, so all weights share one threshold unless told
    otherwise: where the sparsity goes is found.
    """

    share: Sharing = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._moments: dict[int, Tensor] = {}

    def before_update(self, pruner: PrunerView) -> None:
        """Look up the second moments.

        Raises:
            UserError: the optimiser keeps none, or was not given to the pruner.
        """
        states = [(parameter, state) for each in pruner.optimizers for parameter, state in each.state.items()]
        self._moments = {id(p): state[SECOND_MOMENT] for p, state in states if SECOND_MOMENT in state}
        for part in pruner.parts:
            if id(part.parameter) not in self._moments:
                raise UserError(
                    f"pruning=obd ranks weights by Adam's means of squared gradients, and there is none for "
                    f"{part.parameter_name}: choose optimizer=adam or adamw (in a loop of your own, give it to the "
                    f"Pruner), or pruning=cubic."
                )

    def after_masks(self, pruner: PrunerView) -> None:
        """Let go of them: a pruner that is copied or pickled holds no optimiser's state."""
        self._moments.clear()

    def importance(self, piece: Piece) -> Tensor:
        """The root of w^2 sqrt(v): |w| v^(1/4)."""
        return piece.weight.abs() * piece.of(self._moments[id(piece.part.parameter)]).pow(0.25)
