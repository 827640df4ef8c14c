"""Example plug-in: an optimiser, as ``optimizer=rmsprop``. The network's parameters are supplied by the run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from srnn.registry import Range, register


@register.optimizer("rmsprop")
def rmsprop(
    lr: Annotated[float, Range(gt=0, le=1e6)] = 0.001,
    alpha: Annotated[float, Range(ge=0, lt=1)] = 0.99,
    *,
    parameters: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """RMSprop (``torch.optim.RMSprop``)."""
    return torch.optim.RMSprop(parameters, lr=lr, alpha=alpha)
