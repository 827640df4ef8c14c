"""``pruning=rigl``: sparse from the first step, weights dropped and regrown.

Evci et al., *Rigging the lottery*, ICML 2020 (arXiv 1911.11134). With ``grow=random`` it is sparse evolutionary
training, SET (Mocanu et al. 2018), which suits recurrent networks better (Selfish-RNN, Liu et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.groups import Group
from srnn.pruning.methods.base import Seed, Structured
from srnn.pruning.parts import Piece
from srnn.pruning.ranking import Scorer
from srnn.pruning.schedules import CosineSchedule, Freq, RunLength, When, resolve_cosine
from srnn.pruning.scope import in_a_scope
from srnn.pruning.scores import random_scores, unit_scores
from srnn.registry import register
from srnn.registry.option_types import PositiveShare

Density = Literal["uniform", "er", "erk"]


@register.pruning("rigl")
@dataclass(kw_only=True)
class RigL(Structured):
    """Train a sparse network from the first step; drop its smallest weights, grow others (Evci et al. 2020).

    Every ``freq`` steps each matrix drops the share ``drop_fraction / 2 (1 + cos(pi t / end_itr))`` of its weights, the
    smallest, and grows as many among those that are zero: where the gradient is largest, or random ones (SET). They
    start from zero, and so does the optimiser's state of them. Dropped weights may grow again at once, and then go on
    from where they were. Each matrix keeps its number of weights, which ``density``
    sets.
    """

    sparsity: PositiveShare = 0.9
    density: Density = "erk"
    grow: Literal["gradient", "random"] = "gradient"
    drop_fraction: PositiveShare = 0.3
    end_itr: When = "auto"
    freq: Freq = "auto"
    seed: Seed = 0
    regrows = True

    def groups(self, model: nn.Module) -> list[Group]:
        """Each matrix, or gate with settings of its own, is a group."""
        groups = self._groups(model, "matrix", self.sparsity)
        for group in groups:
            if group.structure.of:
                raise UserError(
                    f"pruning.structure={group.structure}: rigl regrows single weights and blocks, not N:M."
                )
        return groups

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve the schedule, share out the weights, and draw the first masks at random."""
        self.schedule: CosineSchedule = resolve_cosine(self.end_itr, self.freq, self.drop_fraction, run)
        self.updates = self.schedule.updates
        self.dense_until, self.done_from = -1, 0  # masked from the start, and at the final sparsity all along
        self._share_out(groups)
        for group in groups:
            group.ranking(self._random(group, 0)).prune(group.target)

    def _share_out(self, groups: Sequence[Group]) -> None:
        """Give every group without a sparsity of its own its part of the budget."""
        free = [group for group in groups if not any("sparsity" in part.own for part in group.parts)]
        if not free:
            return
        shapes = [tuple(group.parts[0].parameter.shape) for group in free]
        # The diagonal, where it is kept, stays whatever the formula gives its matrix.
        least = [max(1, group.size - group.most_zeros) for group in free]
        kept = allocate(shapes, [group.size for group in free], 1 - self.sparsity, self.density, least)
        for group, count in zip(free, kept, strict=True):
            group.target = group.size - count

    def update(self, itr: int, group: Group) -> None:
        """Drop the smallest, grow as many."""
        # Dropped in units; below, as many weights are grown as were there before, to the nearest unit.
        must_stay = group.ranking(_zeros(group)).count_at_least(math.inf)
        alive = sum(int(group.kept_units(piece).sum()) for piece in group.pieces)
        drop = min(alive - max(1, must_stay), math.floor(self.schedule.drop(itr) * alive))
        if drop < 1:
            return
        group.set_epsilon(group.ranking().keep_largest(alive - drop))
        grown = self._random(group, itr) if self.grow == "random" else self._gradients(group)

        # What survived outranks all that could grow, so that one cut by rank keeps it and fills up with the best.
        def survivors_first(piece: Piece) -> Tensor:
            return grown(piece).masked_fill(group.kept_units(piece), torch.inf)

        group.ranking(survivors_first).prune(group.target)

    def _random(self, group: Group, itr: int) -> Scorer:
        def scorer(piece: Piece) -> Tensor:
            units = group.structure.units(piece.shape)
            return random_scores(units, piece.part.mask.device, self.seed, itr, piece.key)

        return scorer

    def _gradients(self, group: Group) -> Scorer:
        def scorer(piece: Piece) -> Tensor:
            gradient = piece.part.parameter.grad
            if gradient is None:
                name, trains = piece.part.parameter_name, piece.part.parameter.requires_grad
                frozen = f"it is frozen; leave it out: {in_a_scope(name, '0')}"
                raise UserError(
                    f"pruning=rigl grows where gradients are large, and {name} has none: "
                    f"{'call pruner.step() before optimizer.zero_grad()' if trains else frozen}, or choose "
                    f"pruning.grow=random."
                )
            # What overflowed in a step that mixed precision skips tells nothing.
            finite = piece.of(gradient.detach()).abs().nan_to_num(0.0, 0.0, 0.0)
            return unit_scores(finite, group.structure, group.score)

        return scorer

    def expected(self, itr: int, group: Group) -> float:
        """The same from the first step to the last."""
        return group.target / group.size


def densities(shapes: Sequence[tuple[int, ...]], sizes: Sequence[int], density: float, kind: Density) -> list[float]:
    """The density of each matrix, so that all have ``density`` together (Evci et al. 2020, section 3).

    Args:
        shapes: of the parameters; a convolution's is [outputs, inputs, kernel ...].
        sizes: weights of each.
        density: of all together.
        kind: ``uniform``; ``er``, Erdos-Renyi: in proportion to (inputs + outputs) / (inputs * outputs); ``erk``: the
            same with the sizes of a convolution's kernel among them. No density exceeds 1.
    """
    if kind == "uniform":
        return [density] * len(shapes)
    used = [shape if kind == "erk" else shape[:2] for shape in shapes]
    raw = [sum(shape) / math.prod(shape) for shape in used]
    # A matrix whose density would exceed 1 stays dense, and the others share what is left of the budget; that may make
    # the next one dense, so again until none is.
    full: set[int] = set()
    while True:
        left = density * sum(sizes) - sum(sizes[i] for i in full)
        scale = left / sum(raw[i] * sizes[i] for i in range(len(raw)) if i not in full)
        over = {i for i in range(len(raw)) if i not in full and scale * raw[i] > 1}
        if not over:
            return [1.0 if i in full else scale * raw[i] for i in range(len(raw))]
        full |= over


def _zeros(group: Group) -> Scorer:
    """Scores of 0, of which those of units that must stay become infinite."""

    def scorer(piece: Piece) -> Tensor:
        return torch.zeros(group.structure.units(piece.shape), device=piece.part.mask.device)

    return scorer


def allocate(
    shapes: Sequence[tuple[int, ...]],
    sizes: Sequence[int],
    density: float,
    kind: Density,
    least: Sequence[int] | None = None,
) -> list[int]:
    """Whole weights for each matrix, which sum to the budget; those that were cut off most get the rest.

    Args:
        shapes: of the parameters.
        sizes: weights of each.
        density: of all together.
        kind: as for ``densities``.
        least: weights that a matrix has to keep, at least 1, which is what None means.
    """
    least = least or [1] * len(sizes)
    wanted = [d * n for d, n in zip(densities(shapes, sizes, density, kind), sizes, strict=True)]
    # 1e-9, because 1 - 0.9 is 0.09999999999999998 in fp64, of 30 weights 2.999999999999999, which means 3.
    counts = [max(low, math.floor(count + 1e-9)) for low, count in zip(least, wanted, strict=True)]
    rest = round(density * sum(sizes)) - sum(counts)
    order = sorted(range(len(sizes)), key=lambda i: counts[i] - wanted[i], reverse=rest < 0)
    while rest:
        able = [i for i in order if (counts[i] < sizes[i] if rest > 0 else counts[i] > least[i])]
        if not able:
            break
        for index in able[: abs(rest)]:
            counts[index] += 1 if rest > 0 else -1
        rest = round(density * sum(sizes)) - sum(counts)
    return counts
