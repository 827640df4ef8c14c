"""Which average of the weights a run keeps. Without Lightning, which takes seconds to import, until one is made."""

from __future__ import annotations

from typing import Annotated, Any

from srnn.registry import Range, register
from srnn.registry.option_types import PositiveShare
from srnn.training.moments import Moment, Moments


@register.averaging("none")
def none() -> None:
    """No average: the weights as they are."""


@register.averaging("ema")
def ema(decay: PositiveShare = 0.999, start: Moment = 0, *, moments: Moments) -> Any:
    """An exponential moving average of the weights."""
    from srnn.training.running_averages import RunningAverage

    return RunningAverage(moments.step("averaging.start", start), decay)


@register.averaging("asgd")
def asgd(patience: Annotated[int, Range(ge=1)] = 5, start: Moment = "pruning_end", *, moments: Moments) -> Any:
    """The mean of the weights since the validation loss stopped falling (Merity et al. 2018)."""
    from srnn.training.running_averages import TriggeredAverage

    return TriggeredAverage(moments.step("averaging.start", start), patience)
