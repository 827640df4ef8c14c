"""``pruning=block``: block-sparse recurrent networks, Narang, Undersander and Diamos 2017 (arXiv 1711.02782)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from srnn.errors import UserError
from srnn.formats import Structure
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import PrunerView
from srnn.pruning.methods.gradual import Gradual, rank_pieces
from srnn.pruning.parts import Piece
from srnn.registry import register
from srnn.registry.option_types import NonNegative


@register.pruning("block")
@dataclass(kw_only=True)
class Block(Gradual):
    """Gradual pruning of blocks, ending at 40 % of the run (Narang et al. 2017).

    A block is as large as its largest weight, and goes when the threshold of ``gradual`` passes it. ``q`` is about
    single weights, as for ``gradual``; a block of N weights takes N^(1/4) of the slope: theta_b = theta_w N^(1/4). With
    ``q="auto"`` it is estimated from the blocks' own scores, which need no scaling.

    ``group_lasso`` adds the paper's penalty, that many times the sum of the blocks' norms, until ``end_itr``; with it,
    the method is the paper's GLP. It is taken as a proximal step after the optimiser's: the norm of each block shrinks
    by ``lr * group_lasso``. For plain SGD that minimises the penalised loss; for the others it is decoupled, as AdamW's
    decay is, so that clipping, accumulation and mixed precision leave it alone.
    """

    structure: str = "16x1"  # what the kernels run fastest
    group_lasso: NonNegative = 0.0

    heuristics = (0.2, 0.4)  # blocks end earlier, at 40 % of the epochs, and ramp at half of that

    def of_units(self, q: float, group: Group) -> float:
        """theta_b = theta_w N^(1/4), which is the same factor on ``q``."""
        return q * group.structure.block**0.25

    def reference_q(self, pieces: list[Piece], group: Group) -> float:
        """From the single weights of a dense model, scaled."""
        q = rank_pieces(pieces, Structure(), group).quantile(group.sparsity or self.sparsity)
        return self.of_units(q, group)

    def after_masks(self, pruner: PrunerView) -> None:
        """The proximal step of the group lasso.

        Raises:
            UserError: the pruner has no optimiser, whose step size it is.
        """
        if not self.group_lasso or pruner.itr > self.done_from:
            return
        if not pruner.optimizers:
            raise UserError("pruning.group_lasso needs the optimiser, for its step size: give it to the Pruner.")
        groups = [group for optimizer in pruner.optimizers for group in optimizer.param_groups]
        # Read anew at each step, because a scheduler may have changed them.
        rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        for group in pruner.groups:
            for piece in group.pieces:
                _shrink(piece, group.structure, rates.get(id(piece.part.parameter), 0.0) * self.group_lasso)


def _shrink(piece: Piece, structure: Structure, length: float) -> None:
    """Shorten each block by ``length``, down to zero."""
    norms = structure.sums(piece.weight.square()).sqrt()
    # Pruned blocks have norm 0. Clamped, they stay zero; 0 / 0 would make them NaN.
    factor = (1 - length / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(min=0)
    piece.scale(structure.spread(factor, piece.shape))
