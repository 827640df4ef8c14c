"""Moments of a run, which options name: steps, fractions, epochs, and where pruning starts and ends."""

from __future__ import annotations

from dataclasses import dataclass

from srnn.errors import UserError
from srnn.pruning.methods import PruningMethod
from srnn.pruning.schedules import RunLength, iteration

# Steps, a fraction of the run, "3 epochs", "pruning_start" or "pruning_end".
Moment = int | float | str


@dataclass(frozen=True)
class Moments:
    """When pruning starts and ends in a run, and how long the run is.

    Example:
        >>> from srnn.pruning.schedules import RunLength
        >>> moments = Moments(RunLength(2000, 100), pruning_start=100, pruning_end=1000)
        >>> [moments.step("at", when) for when in (800, 0.25, "3 epochs", "pruning_end")]
        [800, 500, 300, 1000]

    Attributes:
        run: the length of the run.
        pruning_start: the step up to which no weight is masked.
        pruning_end: the step from which the sparsity is final.
    """

    run: RunLength
    pruning_start: int
    pruning_end: int

    @classmethod
    def of(cls, method: PruningMethod, run: RunLength) -> Moments:
        """Those of a run with this method, whose schedule is resolved.

        Where nothing is pruned they are where the paper has them, the second epoch and half of the run, so that a
        dense network is trained with the step sizes of the sparse one beside it.
        """
        if not method.layer_types:
            return cls(run, round(run.steps_per_epoch), round(0.5 * run.total_steps))
        return cls(run, max(0, method.dense_until), method.done_from)

    def step(self, key: str, when: Moment) -> int:
        """The step that an option means.

        Args:
            key: the option, for messages.
            when: an int is a step, a float between 0 and 1 a fraction of the run, ``"3 epochs"`` counts epochs;
                ``"pruning_start"`` and ``"pruning_end"`` are this run's.

        Raises:
            UserError: a fraction outside 0..1, a negative step, a step after the run, or other words.
        """
        if when in ("pruning_start", "pruning_end"):
            return int(getattr(self, str(when)))
        if isinstance(when, str) and "epoch" not in when:
            raise UserError(
                f"{key}={when!r} must be a step, a fraction of the run between 0.0 and 1.0, epochs such as "
                f"'3 epochs', pruning_start or pruning_end."
            )
        step = iteration(key, when, 0, self.run)
        if step > self.run.total_steps:
            raise UserError(f"{key}={when!r} (step {step}) is after the end of {self.run}.")
        return step
