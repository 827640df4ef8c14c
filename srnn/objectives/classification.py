"""Name the class of a sequence.

Shapes: B batch, O classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from srnn.datasets.base import DataModule, Split
from srnn.objectives.teacher import softened_cross_entropy
from srnn.objectives.whole_sequence import WholeSequence
from srnn.registry import register


class MeanLoss(Metric):
    """Cross-entropy in nats, mean over all sequences."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_BO: Tensor, labels_B: Tensor) -> None:
        """Add a batch."""
        self.total += F.cross_entropy(logits_BO, labels_B, reduction="sum")
        self.count += len(labels_B)

    def compute(self) -> Tensor:
        """The mean."""
        return self.total / self.count


@register.objective("classification")
class Classification(WholeSequence):
    """Name the class of a sequence, by cross-entropy."""

    telling = "accuracy"
    loss_name = "cross-entropy, nats a sequence"
    higher_is_better = frozenset({"accuracy", "f1"})
    words = "accuracy {accuracy:.4f}, F1 {f1:.4f}, loss {loss:.4f}"

    @classmethod
    def metrics(cls, data: DataModule, part: Split) -> MetricCollection:
        """Loss, accuracy, and the mean of the classes' F1."""
        classes = data.sizes["output_size"]
        return MetricCollection(
            {
                "loss": MeanLoss(),
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes),
            },
            compute_groups=False,
        )

    @staticmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs_BO, targets)

    def imitation(self, outputs: Tensor, teachers: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """Softened cross-entropy."""
        return softened_cross_entropy(outputs, teachers, temperature).mean()
