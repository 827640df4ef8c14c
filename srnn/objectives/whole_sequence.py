"""What objectives of whole sequences share: each is read from a zero state.

Shapes: B batch, T time, I inputs, O outputs.
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from srnn.datasets.base import Batch
from srnn.objectives.base import Objective


class WholeSequence(Objective):
    """Sequences that are read whole, each from a zero state."""

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
