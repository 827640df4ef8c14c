"""``pruning=random``: the control that says what choosing by magnitude is worth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from srnn.pruning.methods.base import Seed
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.parts import Piece
from srnn.pruning.scores import random_scores
from srnn.registry import register


@register.pruning("random")
@dataclass(kw_only=True)
class Random(Cubic):
    """Prune random weights, on the schedule of ``cubic``: the control."""

    seed: Seed = 0

    def importance(self, piece: Piece) -> Tensor:
        """A random number of each weight, the same for the whole run: what is pruned stays pruned."""
        count = piece.shape[0] * piece.shape[1] * piece.shape[2]
        return random_scores(count, piece.part.mask.device, self.seed, piece.key).view(piece.shape)
