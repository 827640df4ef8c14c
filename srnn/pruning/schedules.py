"""When to prune and how far: the iterations of a schedule, and its threshold, sparsity or share to replace.

``GradualSchedule`` is Narang et al., *Exploring Sparsity in Recurrent Neural Networks*, ICLR 2017, whose names are
used; ``CubicSchedule`` Zhu and Gupta, *To prune, or not to prune*, 2017; ``CosineSchedule`` Evci et al., *Rigging the
lottery*, ICML 2020. An iteration (``itr``) is the number of optimiser steps done so far.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from srnn.errors import UserError
from srnn.registry import Range

When = int | float | str  # steps, a fraction of the whole run, "3 epochs", or "auto": the paper's heuristic
Freq = Annotated[int, Range(ge=1)] | Literal["auto"]
PAPER_EPOCHS = 20  # where a run does not say how long an epoch is
MIN_EPOCHS = 5  # below this, "second epoch", "25 %" and "50 %" crowd each other out
UPDATES = 50  # Algorithm 1's threshold moves at least this often between start_itr and end_itr


@dataclass(frozen=True)
class RunLength:
    """How long the training is.

    Example:
        >>> RunLength(total_steps=2000, steps_per_epoch=100).epochs
        20.0

    Attributes:
        total_steps: optimiser steps.
        steps_per_epoch: optimiser steps of a pass over the data; left out, the run counts as 20 epochs, the paper's.

    Raises:
        UserError: less than one step.
    """

    total_steps: int
    steps_per_epoch: float = 0.0

    def __post_init__(self) -> None:
        if self.total_steps < 1 or self.steps_per_epoch < 0:
            raise UserError(f"pruning needs the number of optimiser steps of the run, at least 1; got {self!r}.")
        if not self.steps_per_epoch:
            # What a frozen dataclass allows in its own making.
            object.__setattr__(self, "steps_per_epoch", self.total_steps / PAPER_EPOCHS)

    def __str__(self) -> str:
        steps = f"a run of {self.total_steps} step{'' if self.total_steps == 1 else 's'}"
        # A step is no epoch; of a run this short the number of epochs is only assumed.
        return steps if self.steps_per_epoch < 1 else f"{steps} ({self.epochs:.4g} epochs)"

    @property
    def epochs(self) -> float:
        """Number of epochs; 4.5 when the run stops in the middle of the fifth."""
        return self.total_steps / self.steps_per_epoch


def iteration(key: str, when: When, heuristic: float, run: RunLength) -> int:
    """Turn a setting into a step number.

    Args:
        key: the config key, for messages.
        when: an int is a step, a float between 0 and 1 a fraction of the run, ``"3 epochs"`` counts epochs, ``"auto"``
            is the heuristic.
        heuristic: the paper's choice, in steps.
        run: the length of the training.

    Example:
        >>> [iteration("at", when, 500.0, RunLength(2000, 100)) for when in (800, 0.25, "3 epochs", "auto")]
        [800, 500, 300, 500]

    Raises:
        UserError: a fraction outside 0..1, a negative step, other words, or ``auto`` in a run of fewer than 5 epochs.
    """
    if when == "auto":
        if run.epochs < MIN_EPOCHS:
            raise UserError(
                f"{key}=auto follows the paper's heuristics, which need at least {MIN_EPOCHS} epochs, and this run has "
                f"{run.epochs:.3g}: give start_itr, end_itr and, if the method has one, ramp_itr as fractions of the "
                f"run, such as 0.1, 0.5 and 0.25."
            )
        return round(heuristic)
    if isinstance(when, str):
        epochs = re.fullmatch(r"(\d+(?:\.\d+)?) ?epochs?", when)
        if not epochs:
            raise UserError(
                f"{key}={when!r} must be a whole number of steps, a fraction of the run between 0.0 and 1.0, epochs "
                f"such as '3 epochs', or auto."
            )
        return round(float(epochs[1]) * run.steps_per_epoch)
    if isinstance(when, float):  # 1.0 is the end of the run, and 1 its first step
        if not 0 <= when <= 1:
            raise UserError(
                f"{key}={when} must be a fraction of the run between 0.0 and 1.0, or a whole number of steps."
            )
        return round(when * run.total_steps)
    if when < 0:
        raise UserError(f"{key}={when} must be a step from 0 on, or a fraction of the run between 0.0 and 1.0.")
    return when


def given(key: str, when: When, itr: int) -> str:
    """A setting in a message: as it was given, and the step that it means here."""
    words = when if when == "auto" else repr(when)
    return f"{key}={words}" if when == itr and isinstance(when, int) else f"{key}={words} (step {itr})"


@dataclass(frozen=True)
class GradualSchedule:
    """Algorithm 1: a threshold that rises in two linear pieces, moved every ``freq`` iterations.

    Attributes:
        start_itr: pruning starts after this iteration.
        ramp_itr: the slope changes from theta to phi.
        end_itr: no weight is pruned from here on.
        freq: iterations between two updates.
        phi_ratio: phi / theta; the paper uses 1.5 to 2.

    Example:
        >>> schedule = GradualSchedule(start_itr=100, ramp_itr=500, end_itr=1000, freq=100)
        >>> list(schedule.updates)[:3], f"{schedule.epsilon(900, q=1.0):.2f}"
        ([200, 300, 400], '0.87')
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
        """The threshold at iteration ``itr``, in the unit of ``q``.

        As printed, ``+ 1`` in both pieces: at ``end_itr`` it would be q, with phi = 1.5 theta, up to these.
        """
        theta = self.theta(q)
        if itr < self.ramp_itr:
            return theta * (itr - self.start_itr + 1) / self.freq
        phi = self.phi_ratio * theta
        return (theta * (self.ramp_itr - self.start_itr + 1) + phi * (itr - self.ramp_itr + 1)) / self.freq


@dataclass(frozen=True)
class CubicSchedule:
    """Zhu and Gupta's: sparsity rises fast at first, then ever slower, by a cubic, every ``freq`` iterations.

    Attributes:
        start_itr: the first update, at the initial sparsity.
        end_itr: the last update, at the final sparsity: a whole number of ``freq`` after the first.
        freq: iterations between two updates.
        initial: the sparsity to start from.
    """

    start_itr: int
    end_itr: int
    freq: int
    initial: float = 0.0

    @property
    def updates(self) -> range:
        """All the iterations that update."""
        return range(self.start_itr, self.end_itr + 1, self.freq)

    def sparsity(self, itr: int, final: float) -> float:
        """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, a share from 0 to 1."""
        left = 1 - (min(max(itr, self.start_itr), self.end_itr) - self.start_itr) / (self.end_itr - self.start_itr)
        return final + (self.initial - final) * left**3


@dataclass(frozen=True)
class CosineSchedule:
    """RigL's: the share of weights to replace falls to zero by half a cosine.

    Attributes:
        end_itr: from here on nothing is replaced.
        freq: iterations between two updates.
        drop_fraction: the share at the start (alpha).
    """

    end_itr: int
    freq: int
    drop_fraction: float

    @property
    def updates(self) -> range:
        """All the iterations that update."""
        return range(self.freq, self.end_itr, self.freq)

    def drop(self, itr: int) -> float:
        """f_t = alpha / 2 (1 + cos(t pi / T_end))."""
        return self.drop_fraction / 2 * (1 + math.cos(itr * math.pi / self.end_itr))


def resolve_gradual(
    start: When, ramp: When, end: When, freq: Freq, phi_ratio: float, run: RunLength,
    heuristics: tuple[float, float] = (0.25, 0.5),
) -> GradualSchedule:  # fmt: skip
    """Table 1's heuristics where a setting is ``auto``, then every check that needs the run's length.

    Start with the second epoch; ``heuristics`` are the shares of all epochs at which to ramp and to end; freq 100 but
    at most 1/50 of end - start.

    Raises:
        UserError: iterations out of order or beyond the run, ``freq`` too coarse, no update at all.
    """
    start_itr = iteration("pruning.start_itr", start, run.steps_per_epoch, run)
    ramp_itr = iteration("pruning.ramp_itr", ramp, heuristics[0] * run.total_steps, run)
    end_itr = iteration("pruning.end_itr", end, heuristics[1] * run.total_steps, run)
    ended = given("pruning.end_itr", end, end_itr)
    got = f"{given('pruning.start_itr', start, start_itr)}, {given('pruning.ramp_itr', ramp, ramp_itr)}, {ended}"
    if not start_itr <= ramp_itr <= end_itr or start_itr == end_itr:
        raise UserError(
            f"{got} are out of order in {run}: they must rise, start_itr <= ramp_itr <= end_itr, and start_itr < "
            f"end_itr{_also(start_itr=start, ramp_itr=ramp, end_itr=end)}."
        )
    chosen = _resolve_freq(freq, start_itr, end_itr, ended, run)
    _check_threshold_moves_often(chosen, start_itr, end_itr)
    schedule = GradualSchedule(start_itr, ramp_itr, end_itr, chosen, phi_ratio)
    if not schedule.updates:
        raise UserError(f"{got} leave no step for an update; move end_itr further from start_itr.")
    return schedule


def resolve_cubic(start: When, end: When, freq: Freq, initial: float, run: RunLength) -> CubicSchedule:
    """Start with the second epoch and end at 50 % of the run where a setting is ``auto``; ``freq`` as for ``gradual``,
    and if it is given, of any size: pruning in a few rounds.

    Raises:
        UserError: iterations out of order or beyond the run, ``freq`` beyond them.
    """
    start_itr = max(1, iteration("pruning.start_itr", start, run.steps_per_epoch, run))
    end_itr = iteration("pruning.end_itr", end, 0.5 * run.total_steps, run)
    ended = given("pruning.end_itr", end, end_itr)
    if start_itr >= end_itr:
        raise UserError(
            f"{given('pruning.start_itr', start, start_itr)}, {ended} are out of order in {run}: they must rise, "
            f"start_itr < end_itr{_also(start_itr=start, end_itr=end)}."
        )
    chosen = _resolve_freq(freq, start_itr, end_itr, ended, run)
    return CubicSchedule(start_itr, start_itr + (end_itr - start_itr) // chosen * chosen, chosen, initial)


def resolve_cosine(end: When, freq: Freq, drop_fraction: float, run: RunLength) -> CosineSchedule:
    """End at 75 % of the run where ``end`` is ``auto``, as RigL's authors do; ``freq`` as for ``cubic``.

    Raises:
        UserError: ``end`` beyond the run, no update at all.
    """
    heuristic = 0.75 * run.total_steps
    end_itr = round(heuristic) if end == "auto" else iteration("pruning.end_itr", end, heuristic, run)
    ended = given("pruning.end_itr", end, end_itr)
    schedule = CosineSchedule(end_itr, _resolve_freq(freq, 0, end_itr, ended, run), drop_fraction)
    if not schedule.updates:
        raise UserError(f"{ended} leaves no step for an update, every {schedule.freq} steps; raise it.")
    return schedule


def _resolve_freq(freq: Freq, start_itr: int, end_itr: int, ended: str, run: RunLength) -> int:
    """The one asked for; ``auto`` is 100, but at most 1/50 of end - start."""
    if end_itr > run.total_steps:
        raise UserError(
            f"{ended} is after the end of {run}; lower it, or train longer (on the command line trainer.max_epochs)."
        )
    span = end_itr - start_itr
    chosen = min(100, max(1, span // UPDATES)) if freq == "auto" else int(freq)
    if chosen > span:
        raise UserError(
            f"pruning.freq={chosen} is more than the {span} steps between start_itr and end_itr in {run}: lower it, or "
            f"leave it at auto."
        )
    return chosen


def _also(**options: When) -> str:
    """Advice where some were given and others stayed at ``auto``, which does not look at those given."""
    left = [name for name, when in options.items() if when == "auto"]
    return f"; give {' and '.join(left)} too" if 0 < len(left) < len(options) else ""


def _check_threshold_moves_often(freq: int, start_itr: int, end_itr: int) -> None:
    """Raise UserError if Algorithm 1's threshold would rise in few, large steps: each overshoots what is wanted."""
    coarsest = max(1, (end_itr - start_itr) // UPDATES)
    if freq > coarsest:
        raise UserError(
            f"pruning.freq={freq} is too coarse: at most 1/{UPDATES} of end_itr - start_itr = "
            f"{end_itr - start_itr}, so at most {coarsest}; or leave it at auto."
        )
