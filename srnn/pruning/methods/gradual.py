"""``pruning=gradual``: the paper's method, Algorithm 1 of Narang et al., ICLR 2017."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from srnn.errors import UserError
from srnn.pruning.groups import LAYER_TYPES, Group, LayerType, keep_largest, quantile, target_count
from srnn.pruning.methods.base import ForecastRow, LayerTypes, PruningMethod, Sparsity
from srnn.pruning.schedules import GradualSchedule, RunLength, When, expected_sparsity, resolve_gradual
from srnn.registry import Range, check_ranges, register

Positive = Annotated[float, Range(gt=0, le=1e30)]


@register.pruning("gradual")
@dataclass
class Gradual(PruningMethod):
    """Prune while training, under a threshold that rises in two linear pieces (Narang et al., ICLR 2017).

    The layers of one type share a threshold. ``q`` is the absolute weight that the share ``sparsity`` of a trained
    dense model's weights lie under; it sets the slopes (Eq. 1), and it comes from one of three places:

    * ``"auto"``: estimated at each update from the live weights. The threshold never falls, never prunes more than
      asked, and the last update cuts by rank to the exact count.
    * a number, or one a layer type: Algorithm 1 as printed runs open-loop, and the sparsity is what results.
    * the path of a dense checkpoint or packed file: the number is taken from there, then as above.

    As printed, weights are masked *after* each optimiser step and compared *after* that, so masks found at an update
    act from the next step on, and a pruned weight stays pruned. ``soft=True`` compares before masking instead: until
    ``end_itr`` a weight may come back.
    """

    sparsity: Sparsity = 0.9
    q: Positive | dict[LayerType, Positive] | str = "auto"
    start_itr: When = "auto"
    ramp_itr: When = "auto"
    end_itr: When = "auto"
    freq: Annotated[int, Range(ge=1)] | Literal["auto"] = "auto"
    phi_ratio: Annotated[float, Range(ge=1, le=1e6)] = 1.5
    soft: bool = False
    layer_types: LayerTypes = field(default_factory=lambda: list(LAYER_TYPES))

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def reference_path(self) -> str | None:
        """The dense checkpoint or packed file that ``q`` names."""
        return self.q if isinstance(self.q, str) and self.q != "auto" else None

    def prepare(self, run: RunLength, groups: Sequence[Group], reference: Mapping[str, Tensor] | None) -> None:
        """Resolve Table 1's heuristics and ``q``; refuse a schedule that cannot run."""
        self.schedule: GradualSchedule = resolve_gradual(
            self.start_itr, self.ramp_itr, self.end_itr, self.freq, self.phi_ratio, run
        )
        self.dense_until, self.done_from = self.schedule.start_itr, self.schedule.end_itr
        self.fixed_q = {g.layer_type: self._q_of(g, reference) for g in groups} if self.q != "auto" else None

    def _q_of(self, group: Group, reference: Mapping[str, Tensor] | None) -> float:
        kind = group.layer_type
        if isinstance(self.q, dict):
            if kind not in self.q:
                raise UserError(f"pruning.q has no entry for {kind}; give one for each of pruning.layer_types.")
            return self.q[kind]
        if not isinstance(self.q, str):
            return self.q
        missing = [
            name
            for name, p in group.parameters.items()
            if reference is None or name not in reference or (reference[name].ndim != p.ndim)
        ]
        if reference is None or missing:
            raise UserError(
                f"pruning.q={self.q} holds no weights of the kind of {', '.join(missing)}; "
                "train a dense model of the same kind first."
            )
        magnitudes = torch.cat([reference[name].float().abs().flatten() for name in group.parameters])
        q, largest = quantile(magnitudes, self.sparsity), float(magnitudes.max())
        if not 0 < q < float("inf"):
            raise UserError(
                f"pruning.q={self.q} gives q={q:g} for the {kind} weights: take it from a dense, trained model."
            )
        last = self.schedule.epsilon(self.schedule.updates[-1], q)
        if last > largest:
            raise UserError(
                f"pruning: the {kind} threshold would rise to {last:.4g} at step {self.schedule.updates[-1]} and prune "
                f"every weight: the largest in {self.q} is {largest:.4g}; lower pruning.phi_ratio={self.phi_ratio:g}."
            )
        return q

    def is_update(self, itr: int) -> bool:
        """Every ``freq`` iterations between start and end."""
        return self.schedule.is_update(itr)

    def update(self, itr: int, group: Group) -> None:
        """One update of Algorithm 1, open-loop or with ``q`` estimated."""
        magnitudes = group.magnitudes()
        keep = (
            self._keep_estimated(itr, group, magnitudes)
            if self.fixed_q is None
            else self._keep_fixed(itr, group, magnitudes)
        )
        group.set_masks(keep)

    def _keep_fixed(self, itr: int, group: Group, magnitudes: Tensor) -> Tensor:
        assert self.fixed_q is not None
        q = self.fixed_q[group.layer_type]
        epsilon = self.schedule.epsilon(itr, q)
        keep = magnitudes >= epsilon
        if not bool(keep.any()):
            raise UserError(
                f"pruning: at step {itr} the {group.layer_type} threshold reaches {epsilon:.4g} (q={q:g}, "
                f"phi_ratio={self.phi_ratio:g}) and would prune every weight: the largest is "
                f"{float(magnitudes.max()):.4g}. Lower pruning.q or pruning.phi_ratio; pruning.q=auto estimates q."
            )
        group.epsilon = epsilon
        return keep

    def _keep_estimated(self, itr: int, group: Group, magnitudes: Tensor) -> Tensor:
        q = quantile(magnitudes, self.sparsity)
        epsilon = max(group.epsilon, q * self.schedule.epsilon(itr, 1.0))
        keep = magnitudes >= epsilon
        count = group.size - self.wanted_count(group)
        if itr == self.schedule.updates[-1] or int(keep.sum()) < count:
            keep = keep_largest(magnitudes, count)
            epsilon = max(group.epsilon, float(magnitudes[keep].min()))
        group.epsilon = epsilon
        return keep

    def wanted_count(self, group: Group) -> int:
        """The share asked for, to the nearest weight."""
        return target_count(group.size, self.sparsity)

    def wanted(self, group: Group) -> int | None:
        """The share asked for where ``q`` is estimated; open-loop it results."""
        return self.wanted_count(group) if self.fixed_q is None else None

    def forecast(self) -> list[ForecastRow]:
        """Thresholds over q, and the sparsity they give if weights are normally distributed."""
        s, last = self.schedule, self.schedule.updates[-1]
        third = (s.end_itr - s.ramp_itr) / 3
        between = [(s.start_itr + s.ramp_itr) / 2, s.ramp_itr + third, s.ramp_itr + 2 * third]
        events = {_nearest(s.updates, itr): "" for itr in between}
        events |= {s.updates[0]: "first update", _nearest(s.updates, s.ramp_itr): "ramp", last: "last update"}
        return [
            ForecastRow(event, itr, s.epsilon(itr, 1.0), self._expected(itr)) for itr, event in sorted(events.items())
        ]

    def _expected(self, itr: int) -> float:
        share = expected_sparsity(self.schedule.epsilon(itr, 1.0), self.sparsity)
        if self.fixed_q is not None:
            return share
        return self.sparsity if itr == self.schedule.updates[-1] else min(share, self.sparsity)


def _nearest(updates: range, itr: float) -> int:
    return min(updates, key=lambda update: abs(update - itr))
