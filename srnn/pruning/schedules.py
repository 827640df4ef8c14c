"""When to prune and how far: the iterations of a schedule and Algorithm 1's threshold.

Narang et al., *Exploring Sparsity in Recurrent Neural Networks*, ICLR 2017. Names are the paper's. An
iteration (``itr``) is the number of optimiser steps done so far.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from srnn.errors import UserError

When = int | float | Literal["auto"]  # steps, a fraction of the whole run, or the paper's heuristic
MIN_EPOCHS = 5  # below this, "second epoch", "25 %" and "50 %" crowd each other out
UPDATES = 50  # thresholds move at least this often between start_itr and end_itr


@dataclass(frozen=True)
class RunLength:
    """How long the training is, in optimiser steps."""

    total_steps: int
    steps_per_epoch: int

    @property
    def epochs(self) -> float:
        """Number of epochs; 4.5 when the run stops in the middle of the fifth."""
        return self.total_steps / self.steps_per_epoch


def iteration(key: str, when: When, heuristic: float, run: RunLength) -> int:
    """Turn a setting into a step number.

    Args:
        key: the config key, for messages.
        when: an int is a step, a float between 0 and 1 a fraction of the run, ``"auto"`` the heuristic.
        heuristic: the paper's choice, in steps.
        run: the length of the training.

    Raises:
        UserError: a fraction outside 0..1, a negative step, or ``auto`` in a run of fewer than 5 epochs.
    """
    if when == "auto":
        if run.epochs < MIN_EPOCHS:
            raise UserError(
                f"{key}=auto follows the paper's heuristics, which need at least {MIN_EPOCHS} epochs, and this run has "
                f"{run.epochs:.3g}: give start_itr, ramp_itr and end_itr as fractions of the run, such as 0.1, 0.25 "
                f"and 0.5."
            )
        return round(heuristic)
    if isinstance(when, float):
        if not 0 <= when <= 1:
            raise UserError(
                f"{key}={when} must be a fraction of the run between 0.0 and 1.0, or a whole number of steps."
            )
        return round(when * run.total_steps)
    if when < 0:
        raise UserError(f"{key}={when} must be a step from 0 on, or a fraction of the run between 0.0 and 1.0.")
    return when


@dataclass(frozen=True)
class GradualSchedule:
    """Algorithm 1: a threshold that rises in two linear pieces, moved every ``freq`` iterations.

    Attributes:
        start_itr: pruning starts after this iteration.
        ramp_itr: the slope changes from theta to phi.
        end_itr: no weight is pruned from here on.
        freq: iterations between two updates.
        phi_ratio: phi / theta; the paper uses 1.5 to 2.
    """

    start_itr: int
    ramp_itr: int
    end_itr: int
    freq: int
    phi_ratio: float = 1.5

    def is_update(self, itr: int) -> bool:
        """Whether thresholds and masks are updated after iteration ``itr``."""
        return self.start_itr < itr < self.end_itr and itr % self.freq == 0

    @property
    def updates(self) -> range:
        """All the iterations that update."""
        return range((self.start_itr // self.freq + 1) * self.freq, self.end_itr, self.freq)

    def theta(self, q: float) -> float:
        """Eq. 1: the first slope, from ``q``, the absolute weight below which the share asked for lies."""
        span = 2 * (self.ramp_itr - self.start_itr) + 3 * (self.end_itr - self.ramp_itr)
        return 2 * q * self.freq / span

    def epsilon(self, itr: int, q: float) -> float:
        """The threshold at iteration ``itr``."""
        theta = self.theta(q)
        if itr < self.ramp_itr:
            return theta * (itr - self.start_itr + 1) / self.freq
        phi = self.phi_ratio * theta
        return (theta * (self.ramp_itr - self.start_itr + 1) + phi * (itr - self.ramp_itr + 1)) / self.freq


def resolve_gradual(
    start: When, ramp: When, end: When, freq: int | Literal["auto"], phi_ratio: float, run: RunLength
) -> GradualSchedule:
    """Table 1's heuristics where a setting is ``auto``, then every check that needs the run's length.

    The heuristics: start with the second epoch, ramp at 25 % and end at 50 % of all epochs, freq 100 but at
    most 1/50 of end - start.

    Raises:
        UserError: iterations out of order or beyond the run, ``freq`` too coarse, no update at all.
    """
    start_itr = iteration("pruning.start_itr", start, run.steps_per_epoch, run)
    ramp_itr = iteration("pruning.ramp_itr", ramp, 0.25 * run.total_steps, run)
    end_itr = iteration("pruning.end_itr", end, 0.5 * run.total_steps, run)
    got = f"start_itr={start_itr}, ramp_itr={ramp_itr}, end_itr={end_itr} of {run.total_steps} steps"
    if not start_itr <= ramp_itr <= end_itr or start_itr == end_itr:
        raise UserError(f"pruning: {got} are out of order; they must rise: start_itr <= ramp_itr <= end_itr.")
    if end_itr > run.total_steps:
        raise UserError(f"pruning.end_itr: {got} end after the run; lower end_itr or raise trainer.max_epochs.")
    coarsest = max(1, (end_itr - start_itr) // UPDATES)
    chosen = min(100, coarsest) if freq == "auto" else freq
    if chosen > coarsest:
        raise UserError(
            f"pruning.freq={chosen} is too coarse: at most 1/{UPDATES} of end_itr - start_itr = "
            f"{end_itr - start_itr}, so at most {coarsest}; or leave it at auto."
        )
    schedule = GradualSchedule(start_itr, ramp_itr, end_itr, chosen, phi_ratio)
    if not schedule.updates:
        raise UserError(f"pruning: {got} leave no step for an update; move end_itr further from start_itr.")
    return schedule


def expected_sparsity(epsilon_over_q: float, sparsity: float) -> float:
    """Share of weights under the threshold if they are normally distributed with ``sparsity`` of them under q."""
    q_in_deviations = NormalDist().inv_cdf((1 + sparsity) / 2)
    return math.erf(max(0.0, epsilon_over_q) * q_in_deviations / math.sqrt(2))
