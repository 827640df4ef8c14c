"""The schedules of the step size, for any optimiser: built on torch's, driven by Lightning.

All of them may start over at the full step size (``restart_at``), as learning rate rewinding does: Renda et al.,
*Comparing rewinding and fine-tuning in neural network pruning*, ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from srnn.errors import UserError
from srnn.registry import Range, register
from srnn.registry.option_types import PositiveShare, Share
from srnn.training.moments import Moment, Moments

# An optimiser -> Lightning's dicts of its schedulers.
Schedule = Callable[[torch.optim.Optimizer], list[dict[str, Any]]]


@dataclass(frozen=True)
class Falling:
    """When the step size falls: from ``decay_from`` on, and again from ``restart_at`` on, where there is one.

    Attributes:
        decay_from: the step at which it begins to fall.
        restart_at: the step at which it is full again and begins to fall once more; None never.
        end: the last step.
    """

    decay_from: int
    restart_at: int | None
    end: int

    @classmethod
    def resolve(cls, decay_from: Moment, restart_at: Moment | None, moments: Moments) -> Falling:
        """From options. Raises UserError unless 0 <= decay_from < restart_at < the last step."""
        first, end = moments.step("schedule.decay_from", decay_from), moments.run.total_steps
        again = None if restart_at is None else moments.step("schedule.restart_at", restart_at)
        if first >= end:
            raise UserError(
                f"schedule.decay_from={decay_from!r} (step {first}) is no step before the end of {moments.run}."
            )
        if again is not None and not first < again < end:
            raise UserError(
                f"schedule.restart_at={restart_at!r} (step {again}) must be after schedule.decay_from={decay_from!r} "
                f"(step {first}) and before the end of {moments.run}."
            )
        return cls(first, again, end)

    def since(self, itr: int) -> tuple[int, int]:
        """How many steps it has been falling for at step ``itr``, and for how many it will until it starts over."""
        if self.restart_at is not None and itr >= self.restart_at:
            return itr - self.restart_at, self.end - self.restart_at
        return max(0, itr - self.decay_from), (self.restart_at or self.end) - self.decay_from


def scaled(factor: Callable[[int], float]) -> Schedule:
    """The schedule that multiplies the optimiser's own step size by ``factor`` of the steps done so far."""

    def schedulers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    return schedulers


def rising(warmup: Moment, moments: Moments) -> Callable[[int], float]:
    """The factor that rises in equal steps and is 1 from step ``warmup`` on."""
    steps = moments.step("schedule.warmup", warmup)
    return lambda itr: min(1.0, (itr + 1) / (steps + 1))


@register.schedule("constant")
def constant(warmup: Moment = 0, *, moments: Moments) -> Schedule | None:
    """The optimiser's own step size, after a warm-up if one is asked for."""
    return scaled(rising(warmup, moments)) if moments.step("schedule.warmup", warmup) else None


@register.schedule("step")
def step_decay(
    decay: PositiveShare = 0.8,
    every: Moment = "1 epoch",
    decay_from: Moment = 0,
    restart_at: Moment | None = None,
    warmup: Moment = 0,
    *,
    moments: Moments,
) -> Schedule:
    """Multiplied by ``decay`` every so often."""
    falls, rises = Falling.resolve(decay_from, restart_at, moments), rising(warmup, moments)
    steps = moments.step("schedule.every", every)
    if steps < 1:
        raise UserError(f"schedule.every={every!r} must be at least one step.")
    return scaled(lambda itr: rises(itr) * decay ** (falls.since(itr)[0] // steps))


@register.schedule("cosine")
def cosine(
    floor: Share = 0.0,
    decay_from: Moment = 0,
    restart_at: Moment | None = None,
    warmup: Moment = 0,
    *,
    moments: Moments,
) -> Schedule:
    """Falls by half a cosine to the end of the run (Loshchilov & Hutter 2017)."""
    falls, rises = Falling.resolve(decay_from, restart_at, moments), rising(warmup, moments)

    def factor(itr: int) -> float:
        done, span = falls.since(itr)
        return rises(itr) * (floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, done / span))) / 2)

    return scaled(factor)


class PlateauFrom(ReduceLROnPlateau):
    """torch's ``ReduceLROnPlateau`` that looks at losses from a step on, and may start over.

    Args:
        optimizer: whose step size it lowers.
        falls: from when on, and when it starts over.
        steps: between two validations.
        options: of torch's.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, falls: Falling, steps: float, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.decay_from, self.restart_at, self.steps = falls.decay_from, falls.restart_at, steps
        self.full = [group["lr"] for group in optimizer.param_groups]
        self.validations = 0

    def step(self, metrics: Any, epoch: int | None = None) -> None:  # type: ignore[override]  # as torch's own
        """After each validation, with its loss."""
        before, self.validations = self.validations * self.steps, self.validations + 1
        now = self.validations * self.steps
        if self.restart_at is not None and before < self.restart_at <= now:
            self._reset()
            for group, lr in zip(self.optimizer.param_groups, self.full, strict=True):
                group["lr"] = lr
        if now >= self.decay_from:
            super().step(metrics)


@register.schedule("plateau")
def plateau(
    decay: PositiveShare = 0.5,
    patience: Annotated[int, Range(ge=0)] = 0,
    decay_from: Moment = "pruning_end",
    restart_at: Moment | None = None,
    warmup: Moment = 0,
    *,
    moments: Moments,
    batches: int,
) -> Schedule:
    """Multiplied by ``decay`` when the validation loss no longer falls."""
    falls, steps = Falling.resolve(decay_from, restart_at, moments), moments.step("schedule.warmup", warmup)

    def schedulers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
        lowers = PlateauFrom(optimizer, falls, moments.run.steps_per_epoch, factor=decay, patience=patience)
        # With each pass's last batch, and not with the pass: that would be after the checkpoint of its end is saved. A
        # loop without validation, such as a bench's, has no loss to look at.
        after = {"interval": "step", "frequency": batches, "monitor": "valid_loss", "strict": False}
        found: list[dict[str, Any]] = [{"scheduler": lowers, **after}]
        if steps:  # it multiplies the step size that is there, and so does the other
            warm = LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
            found.insert(0, {"scheduler": warm, "interval": "step"})
        return found

    return schedulers


def attach(schedule: Schedule | None, built: Any) -> Any:
    """What Lightning wants of an optimiser and its schedule.

    Args:
        schedule: None leaves the optimiser as it was built.
        built: an optimiser, or Lightning's dict of one with a schedule of its own.

    Raises:
        UserError: it has a schedule of its own beside this one.
    """
    if schedule is None:
        return built
    if not isinstance(built, torch.optim.Optimizer):
        raise UserError(
            "schedule and the optimizer's own schedule cannot both set the step size: leave schedule=constant, or "
            "leave the optimizer's out (optimizer.lr_decay=1.0)."
        )
    return [built], schedule(built)
