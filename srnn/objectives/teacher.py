"""A trained network whose outputs another one learns to give: distillation.

Hinton, Vinyals and Dean, *Distilling the knowledge in a neural network*, 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Teacher:
    """A trained network that is asked what it makes of each training batch; it is no part of what is trained.

    Args:
        model: ``outputs, state = model(inputs, state)``; any sizes inside.
        carried: what of a batch's final state the next batch starts from, as the objective says.
        temperature: what logits are divided by before they are compared.
        weight: of its part in the loss; the targets' part has the rest.
        call: how to call the model where it isn't called plainly, say from a CUDA graph.

    Attributes:
        state: what the next batch starts from.
        ready: whether it teaches; a network that is yet to become its own teacher does not.
    """

    def __init__(
        self,
        model: nn.Module,
        carried: Callable[[Any], Any],
        temperature: float,
        weight: float,
        call: Callable[..., Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.call = call or self.model
        self.carried = carried
        self.temperature = temperature
        self.weight = weight
        self.state: Any = None
        self.ready = True
        self._device: torch.device | None = None

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Its outputs, without gradients; the state goes on to the next batch."""
        if inputs.device != self._device:  # at the first batch; moving lays out a recurrent layer's weights anew
            self._device = inputs.device
            self.model.to(inputs.device)
        outputs, state = self.call(inputs, self.state)
        self.state = self.carried(state)
        return outputs


class Several(nn.Module):
    """Networks that are asked together: the mean of their outputs, of logits the geometric mean of distributions.

    Args:
        models: each as a ``Teacher`` wants it.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, inputs: Tensor, states: Sequence[Any] | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """Their mean, and the state of each."""
        each = states if states is not None else [None] * len(self.models)
        outputs, after = zip(
            *(model(inputs, state) for model, state in zip(self.models, each, strict=True)), strict=True
        )
        return torch.stack(outputs).mean(0), after


def softened_cross_entropy(logits: Tensor, teachers: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the teacher's softened distribution and the student's, times the temperature squared.

    The square keeps the gradients' size, which falls with it (Hinton et al. 2015, section 2.1).

    Args:
        logits: of the student, [N, classes].
        teachers: logits of the teacher, [N, classes].
        temperature: what both are divided by.

    Returns:
        One number a row, in nats times the temperature squared.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 2.0]])
        >>> softened_cross_entropy(logits, logits, 1.0).round(decimals=4)
        tensor([0.3653])
    """
    soft = torch.softmax(teachers / temperature, -1)
    return temperature**2 * nn.functional.cross_entropy(logits / temperature, soft, reduction="none")
