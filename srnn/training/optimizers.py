"""The optimisers, torch's own, under the names configs use. ``fused``: a step in one kernel."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from torch import nn

from srnn.registry import Range, register
from srnn.registry.option_types import NonNegative, Positive, Share

Decay = Annotated[float, Range(gt=0, le=1)]
Epochs = Annotated[int, Range(ge=0)]


def with_decay(optimizer: torch.optim.Optimizer, lr_decay: float, lr_decay_after: int) -> Any:
    """The optimiser, with its rate multiplied by ``lr_decay`` after each epoch but the first ``lr_decay_after``.

    Args:
        optimizer: at its full rate.
        lr_decay: factor of an epoch; 1 keeps the rate.
        lr_decay_after: epochs at the full rate.

    Returns:
        The optimiser itself, or Lightning's dict of it and its schedule.
    """
    if lr_decay == 1:
        return optimizer

    def factor(epoch: int) -> float:  # of the epoch that begins; torch counts from 0
        return lr_decay ** max(0, epoch + 1 - lr_decay_after)

    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor)}


@register.optimizer("adam")
def adam(
    lr: Positive = 0.002,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    lr_decay: Decay = 1.0,
    lr_decay_after: Epochs = 1,
    *,
    parameters: Iterable[nn.Parameter],
    fused: bool,
) -> Any:
    """Adam (``torch.optim.Adam``)."""
    return with_decay(torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2), fused=fused), lr_decay, lr_decay_after)


@register.optimizer("adamw")
def adamw(
    lr: Positive = 0.002,
    beta1: Share = 0.9,
    beta2: Share = 0.999,
    weight_decay: NonNegative = 0.01,
    lr_decay: Decay = 1.0,
    lr_decay_after: Epochs = 1,
    *,
    parameters: Iterable[nn.Parameter],
    fused: bool,
) -> Any:
    """Adam with decoupled weight decay (``torch.optim.AdamW``)."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, fused=fused)
    return with_decay(optimizer, lr_decay, lr_decay_after)


@register.optimizer("sgd")
def sgd(
    lr: Positive = 1.0,
    momentum: Share = 0.9,
    nesterov: bool = True,
    weight_decay: NonNegative = 0.0,
    lr_decay: Decay = 1.0,
    lr_decay_after: Epochs = 1,
    *,
    parameters: Iterable[nn.Parameter],
    fused: bool,
) -> Any:
    """Stochastic gradient descent with Nesterov momentum, the paper's optimiser (``torch.optim.SGD``)."""
    # torch refuses Nesterov without momentum. Here it is the default, so that momentum=0 alone switches both off.
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay, fused=fused
    )
    return with_decay(optimizer, lr_decay, lr_decay_after)
