"""What objectives of whole sequences share: each is read from a zero state.

Shapes: B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from srnn.datasets.base import Batch, DataModule
from srnn.errors import UserError
from srnn.objectives.base import Objective


class WholeSequence(Objective):
    """Sequences that are read whole, each from a zero state. Raises UserError for a network that writes speech down."""

    def __init__(
        self, model: nn.Module, optimizer: Mapping[str, Any], data: DataModule, call: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(model, optimizer, data, call)
        if hasattr(model, "output_lengths"):
            raise UserError(
                f"{type(model).__name__} writes speech down, character by character, and these data want "
                f"one answer for a whole sequence: choose model=gru, or dataset=fsdd, manifest, "
                f"librispeech or synthetic_speech."
            )

    @staticmethod
    @abstractmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        """What is minimised."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the sequences."""
        inputs_BTI, targets = batch
        outputs_BO = self.call(inputs_BTI)[0]
        loss = self.loss(outputs_BO, targets)
        self.train_loss = loss.detach()
        return self.taught(loss, inputs_BTI, outputs_BO, targets)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the scores."""
        inputs_BTI, targets = batch
        self.metric.update(self.model(inputs_BTI)[0], targets)
