"""The optimisers, torch's own, under the names configs use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import nn

from srnn.registry import Range, register

Rate = Annotated[float, Range(gt=0, le=1e6)]
NonNegative = Annotated[float, Range(ge=0, le=1e6)]
Below1 = Annotated[float, Range(ge=0, lt=1)]


@register.optimizer("adam")
def adam(
    lr: Rate = 0.002,
    beta1: Below1 = 0.9,
    beta2: Below1 = 0.999,
    *,
    parameters: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """Adam (``torch.optim.Adam``)."""
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, beta2))


@register.optimizer("adamw")
def adamw(
    lr: Rate = 0.002,
    beta1: Below1 = 0.9,
    beta2: Below1 = 0.999,
    weight_decay: NonNegative = 0.01,
    *,
    parameters: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """Adam with decoupled weight decay (``torch.optim.AdamW``)."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)


@register.optimizer("sgd")
def sgd(
    lr: Rate = 1.0,
    momentum: Below1 = 0.9,
    nesterov: bool = True,
    weight_decay: NonNegative = 0.0,
    *,
    parameters: Iterable[nn.Parameter],
) -> torch.optim.Optimizer:
    """Stochastic gradient descent with Nesterov momentum, the paper's optimiser (``torch.optim.SGD``)."""
    return torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0, weight_decay=weight_decay
    )
