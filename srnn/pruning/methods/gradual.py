"""``pruning=gradual``: the paper's method, Algorithm 1 of Narang et al., ICLR 2017."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.formats import Structure
from srnn.pruning.cutting import Cut
from srnn.pruning.forecast import expected_n_of_m, expected_sparsity
from srnn.pruning.groups import Group, magnitude
from srnn.pruning.methods.base import Shared
from srnn.pruning.parts import Piece
from srnn.pruning.ranking import Ranking
from srnn.pruning.schedules import Freq, GradualSchedule, RunLength, When, resolve_gradual
from srnn.pruning.scope import LayerType
from srnn.pruning.scores import unit_scores
from srnn.registry import Range, register

Magnitude = Annotated[float, Range(gt=0, le=1e30)]  # of a weight


@register.pruning("gradual")
@dataclass(kw_only=True)
class Gradual(Shared):
    """Prune while training, under a threshold that rises in two linear pieces (Narang et al., ICLR 2017).

    The layers of one type share a threshold. ``q`` is the absolute weight that the share ``sparsity`` of a trained
    dense model's weights lie under; it sets the slopes (Eq. 1), and it comes from one of three places:

    * ``"auto"``: estimated at each update from the live weights. The threshold never falls, never prunes more than
      asked, and the last update cuts by rank to the exact count.
    * a number, or one a layer type: Algorithm 1 as printed runs open-loop, and the sparsity is a result.
    * the path of a dense checkpoint or packed file: the number is taken from there, then as above.

    As printed, weights are masked *after* each optimiser step and compared *after* that, so masks found at an update
    act from the next step on, and a pruned weight stays pruned. ``soft=True`` compares before masking instead: until
    ``end_itr`` a weight may come back. For blocks, ``q`` and the threshold are about the scores of blocks.
    """

    q: Magnitude | dict[LayerType, Magnitude] | str = "auto"
    start_itr: When = "auto"
    ramp_itr: When = "auto"
    end_itr: When = "auto"
    freq: Freq = "auto"
    phi_ratio: Annotated[float, Range(ge=1, le=1e6)] = 1.5
    soft: bool = False

    heuristics = (0.25, 0.5)  # of all epochs: where ``auto`` ramps and ends

    def __post_init__(self) -> None:
        super().__post_init__()
        self.delayed = not self.soft

    @property
    def reference_path(self) -> str | None:
        """The dense checkpoint or packed file that ``q`` names."""
        return self.q if isinstance(self.q, str) and self.q != "auto" else None

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve Table 1's heuristics and ``q``; refuse a schedule that cannot run."""
        self.schedule: GradualSchedule = resolve_gradual(
            self.start_itr, self.ramp_itr, self.end_itr, self.freq, self.phi_ratio, run, self.heuristics
        )
        self.updates = self.schedule.updates
        self.dense_until, self.done_from = self.schedule.start_itr, self.schedule.end_itr
        self.fixed_q = {g.name: self._q_of(g, reference) for g in groups} if self.q != "auto" else None

    def _q_of(self, group: Group, reference: Mapping[str, Tensor] | None) -> float:
        if isinstance(self.q, dict):
            kind = group.layer_type
            found = [value for name, value in self.q.items() if name == kind]
            if not found:
                raise UserError(f"pruning.q has no entry for {kind}; give one for each of pruning.layer_types.")
            return self.of_units(found[0], group)
        if not isinstance(self.q, str):
            return self.of_units(self.q, group)
        return self._q_of_reference(_like(group, reference, self.q), group)

    def _q_of_reference(self, pieces: list[Piece], group: Group) -> float:
        q = self.reference_q(pieces, group)
        largest = rank_pieces(pieces, group.structure, group).largest()
        # A network that is pruned already gives 0, one that has diverged infinity.
        if not 0 < q < math.inf:
            raise UserError(
                f"pruning.q={self.q} gives q={q:g} for the {group.name} weights: take it from a dense, trained model."
            )
        # The known trap of a steep phi: refused here, before hours of training, and again at each update.
        last = self.schedule.epsilon(self.updates[-1], q)
        if last > largest:
            raise UserError(
                f"pruning: the {group.name} threshold would rise to {last:.4g} at step {self.updates[-1]} and prune "
                f"every weight: the largest in {self.q} is {largest:.4g}; lower pruning.phi_ratio={self.phi_ratio:g}."
            )
        return q

    def of_units(self, q: float, group: Group) -> float:
        """The ``q`` of units, from the one that was given."""
        return q

    def reference_q(self, pieces: list[Piece], group: Group) -> float:
        """The ``q`` of a dense model's weights: of the scores of its units."""
        return rank_pieces(pieces, group.structure, group).quantile(group.sparsity or self.sparsity)

    def update(self, itr: int, group: Group) -> None:
        """One update of Algorithm 1, open-loop or with ``q`` estimated."""
        if self.fixed_q is not None:
            self._update_fixed(itr, group, self.fixed_q[group.name])
            return
        # Pruned weights are ranked too, so that q is a quantile of all weights, as the paper's is. A q that falls, as
        # weights shrink, does not let the threshold fall. A phi_ratio above 1.5, or weights that have shrunk, may take
        # the threshold past the share: then by rank, as the last update is.
        share = None if itr == self.updates[-1] else group.target / group.size
        group.cut(Cut(group.target, share, self.schedule.epsilon(itr, 1.0), rising=True))

    def _update_fixed(self, itr: int, group: Group, q: float) -> None:
        ranking, epsilon = group.ranking(), self.schedule.epsilon(itr, q)
        if (largest := ranking.largest()) < epsilon:
            raise UserError(
                f"pruning: at step {itr} the {group.name} threshold reaches {epsilon:.4g} (q={q:g}, "
                f"phi_ratio={self.phi_ratio:g}) and would prune every weight: the largest is "
                f"{largest:.4g}. Lower pruning.q or pruning.phi_ratio; pruning.q=auto estimates q."
            )
        ranking.keep_at_least(epsilon)
        group.epsilon = epsilon

    def wanted(self, group: Group) -> int | None:
        """The share asked for where ``q`` is estimated; open-loop it results."""
        return group.target if self.fixed_q is None else None

    def expected(self, itr: int, group: Group) -> float:
        """If weights are normally distributed."""
        sparsity = group.target / group.size
        if itr < self.updates[0]:
            return 0.0
        epsilon = self.schedule.epsilon(min(itr, self.updates[-1]), 1.0)
        # With q given, it is a quantile of single weights; with q estimated, of what N:M lets go.
        if group.structure.of:
            runs = group.size // group.structure.of if self.fixed_q is None else None
            share = expected_n_of_m(epsilon, group.structure.keep, group.structure.of, runs)
        else:
            share = expected_sparsity(epsilon, sparsity, group.structure.block, group.score)
        if self.fixed_q is not None:
            return share
        return sparsity if itr >= self.updates[-1] else min(share, sparsity)


def _like(group: Group, reference: Mapping[str, Tensor] | None, path: str) -> list[Piece]:
    """The group's weights in a reference, of any width: q comes from a smaller network too. Raises UserError."""
    if reference is None:
        raise UserError(f"pruning.q={path} names a dense model: give its weights by name as reference=...")
    names = {part.parameter_name: part.parameter.ndim for part in group.parts}
    if missing := [n for n, ndim in names.items() if n not in reference or reference[n].ndim != ndim]:
        raise UserError(
            f"pruning.q={path} holds no weights of the kind of {', '.join(missing)}; "
            "train a dense model of the same kind first."
        )
    nothing = torch.empty(0, dtype=torch.bool)  # these are ranked only; nobody asks for their mask
    parts = [replace(p, parameter=reference[p.parameter_name].float(), mask=nothing) for p in group.parts]  # type: ignore[arg-type]
    return [piece for part in parts for piece in part.pieces(group.structure.rows)]


def rank_pieces(pieces: list[Piece], structure: Structure, group: Group) -> Ranking:
    """Weights of a reference, scored as a group's."""
    return Ranking(pieces, structure, lambda piece: unit_scores(magnitude(piece), structure, group.score))
