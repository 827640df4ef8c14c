"""Tell the numbers of a sequence.

Shapes: B batch, O outputs.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, MetricCollection

from srnn.datasets.base import DataModule, Split
from srnn.objectives.whole_sequence import WholeSequence
from srnn.registry import register


@register.objective("regression")
class Regression(WholeSequence):
    """Tell the numbers of a sequence, by mean squared error."""

    loss_name = "mean squared error"
    words = "mean squared error {loss:.6f}, mean absolute error {mae:.5f}"

    @classmethod
    def metrics(cls, data: DataModule, part: Split) -> MetricCollection:
        """Mean squared error (``loss``), its root, and mean absolute error."""
        return MetricCollection(
            {"loss": MeanSquaredError(), "rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()},
            compute_groups=False,
        )

    @staticmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs_BO, targets)

    def imitation(self, outputs: Tensor, teachers: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """The loss, with what the teacher says as targets."""
        return self.loss(outputs, teachers)
