"""What every objective provides: a Lightning module that trains a model, and the scores that tell how well.

Shapes: B batch, O outputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from srnn.datasets.base import DataModule, Split
from srnn.models.recurrent import TorchState
from srnn.objectives.teacher import Teacher
from srnn.registry import register


class Objective(pl.LightningModule):
    """Trains a model on a data set. Logs each score of the validation part, as ``valid_*``, after every pass.

    A subclass registered as ``@register.objective("name")`` serves the data sets whose ``objective`` is that name.

    Attributes:
        telling: the score that runs are compared by.
        higher_is_better: the scores of which more is better; of all others less is.
        loss_name: what the loss is called in plots, with its unit.
        words: how scores are written in tables, as a format string of their names.
        schedule: what it makes of the optimiser, an addition to it: a schedule of the step size; None leaves it.
        teacher: a trained network whose outputs are learned too; None for the targets alone.
        examples: of the last validation, what was wanted and what the model gave, by name; an objective may have none.
        train_loss: of the last batch, by its targets alone. Logging it at every step would cost a small network on a
            GPU a fifth of its time.

    Args:
        model: what to train: ``outputs, state = model(inputs, state)``.
        optimizer: the optimiser's config.
        data: the data set, after its ``setup``.
        call: what a training step calls in the model's place, such as its replay from a CUDA graph.
    """

    telling: str = "loss"
    higher_is_better: frozenset[str] = frozenset()
    words: str = "loss {loss:.4f}"
    loss_name: str = "loss"

    def __init__(
        self,
        model: nn.Module,
        optimizer: Mapping[str, Any],
        data: DataModule,
        call: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = dict(optimizer)
        self.data = data
        self.schedule: Callable[[Any], Any] | None = None
        self.teacher: Teacher | None = None
        self.examples: list[dict[str, str]] = []
        self.train_loss: Tensor | None = None
        self.call: Callable[..., Any] = call or model.__call__
        self.metric: Any = None  # of the validation that runs; no submodule, so that checkpoints hold the model alone

    def configure_optimizers(self) -> Any:
        """What the config names: an optimiser, or Lightning's dict of one and its schedule."""
        parameters = list(self.model.parameters())
        # One kernel a step, on a GPU; Lightning does not clip for such an optimiser in mixed precision.
        fused = all(p.device.type == "cuda" for p in parameters) and self.trainer.precision == "32-true"
        built = register.build("optimizer", self.optimizer_config, parameters=parameters, fused=fused)
        return built if self.schedule is None else self.schedule(built)

    def taught(self, loss: Tensor, inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss to minimise: that of the targets, and the teacher's part where there is one."""
        if self.teacher is None or not self.teacher.ready:
            return loss
        part = self.imitation(outputs, self.teacher(inputs), targets, self.teacher.temperature)
        return (1 - self.teacher.weight) * loss + self.teacher.weight * part

    def imitation(self, outputs: Tensor, teachers: Tensor, targets: Tensor, temperature: float) -> Tensor:
        """How far outputs are from a teacher's: an objective that has it can learn from one, by ``taught``.

        Args:
            outputs: of the model that is trained.
            teachers: of the teacher.
            targets: of the batch, which may say that some do not count.
            temperature: what logits are divided by.
        """
        raise NotImplementedError

    @classmethod
    @abstractmethod
    def metrics(cls, data: DataModule, part: Split) -> Metric | MetricCollection:
        """What adds up the scores of a part: ``update(outputs, targets)``, then ``compute()``."""

    def on_validation_epoch_start(self) -> None:
        """Count from zero."""
        object.__setattr__(self, "metric", self.metrics(self.data, "valid").to(self.device))

    def on_validation_epoch_end(self) -> None:
        """Log the scores of the whole part, at the step they are of: Lightning's own count is one behind."""
        scores = {f"valid_{name}": value for name, value in _floats(self.metric.compute()).items()}
        when = {"step": float(self.trainer.global_step), "epoch": float(self.trainer.current_epoch)}
        self.log_dict(scores | when, sync_dist=True)

    @classmethod
    @torch.inference_mode()
    def score(cls, model: nn.Module, data: DataModule, part: Split) -> dict[str, float]:
        """Score a model on a whole part of the data, on the CPU; ``loss`` is always among the scores."""
        model.eval()
        metric, state = cls.metrics(data, part), None
        for inputs, targets in data.limited(part):
            outputs, state = model(inputs, cls.carried(state))
            metric.update(outputs, targets)
        return _floats(metric.compute())

    @staticmethod
    def carried(state: TorchState | None) -> TorchState | None:
        """What of a batch's final state the next batch starts from."""
        return None


def _floats(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
