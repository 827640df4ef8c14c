"""The objectives: what is learned, and the scores that tell how well. One Lightning module each.

Shapes: B batch, T time, V vocabulary, O outputs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from srnn.datasets.base import Batch, DataModule, Part
from srnn.datasets.text import IGNORED, TextStreams
from srnn.models.recurrent import State, detach
from srnn.registry import register
from srnn.training import devices
from srnn.training.graph import Graphed

CPU = torch.device("cpu")


class Objective(pl.LightningModule):
    """Trains a model on a data set. Logs each score of the validation part, as ``valid_*``, after every pass.

    Attributes:
        train_loss: of the last batch. Logging it at every step would cost a small network on a GPU a fifth of its time.

    Args:
        model: what to train: ``outputs, state = model(inputs, state)``.
        optimizer: the optimiser's config.
        data: the data set, after its ``setup``.
        cuda_graph: train from CUDA graphs.
    """

    def __init__(
        self, model: nn.Module, optimizer: Mapping[str, Any], data: DataModule, cuda_graph: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = dict(optimizer)
        self.data = data
        self.train_loss: Tensor | None = None
        self.call: Callable[..., Any] = model.__call__
        if cuda_graph:
            self.call = Graphed(model, data.batches("train").fetch(0, 0)[0])
        self.metric: Any = None  # of the validation that runs; no submodule, so that checkpoints hold the model alone

    def configure_optimizers(self) -> Any:
        """What the config names: an optimiser, or Lightning's dict of one and its schedule."""
        parameters = list(self.model.parameters())
        # One kernel a step, on a GPU; Lightning does not clip for such an optimiser in mixed precision.
        fused = all(p.device.type == "cuda" for p in parameters) and self.trainer.precision == "32-true"
        return register.build("optimizer", self.optimizer_config, parameters=parameters, fused=fused)

    @classmethod
    @abstractmethod
    def metrics(cls, data: DataModule, part: Part) -> Metric | MetricCollection:
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
    def score(cls, model: nn.Module, data: DataModule, part: Part) -> dict[str, float]:
        """Score a model on a whole part of the data, on the CPU; ``loss`` is always among the scores."""
        model.eval()
        metric, state = cls.metrics(data, part), None
        for inputs, targets in data.limited(part):
            outputs, state = model(inputs, cls.carried(state))
            metric.update(outputs, targets)
        return _floats(metric.compute())

    @staticmethod
    def carried(state: State | None) -> State | None:
        """What of a batch's final state the next batch starts from."""
        return None


def _floats(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}


class TextScore(Metric):
    """How well a whole text is predicted: ``loss`` in nats a token, ``perplexity`` a token, ``bits_per_character``.

    Perplexity is at most exp(700), which is still a float; bits are those of the whole text over its characters,
    whatever a token is.

    Args:
        characters_per_token: of the text.
    """

    nats: Tensor
    tokens: Tensor

    def __init__(self, characters_per_token: float) -> None:
        super().__init__()
        self.characters_per_token = characters_per_token
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits_BTV: Tensor, targets_BT: Tensor) -> None:
        """Add a batch; ``IGNORED`` targets do not count."""
        self.nats += sum_of_losses(logits_BTV, targets_BT)
        self.tokens += (targets_BT != IGNORED).sum()

    def compute(self) -> dict[str, Tensor]:
        """The scores."""
        loss = self.nats / self.tokens
        bits = loss / math.log(2) / self.characters_per_token
        return {"loss": loss, "perplexity": loss.clamp(max=700.0).exp(), "bits_per_character": bits}


def sum_of_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all targets that are not padding."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


def mean_of_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats; the mean over ranks is that over the targets of all ranks, of which some have fewer."""
    if devices.ranks() == 1:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    targets = (targets_BT != IGNORED).sum().to(torch.float32)
    return sum_of_losses(logits_BTV, targets_BT) / devices.mean_over_ranks(targets)


class NextToken(Objective):
    """Predict the next token: stateful truncated back-propagation through contiguous streams.

    The state flows from batch to batch, its gradient does not. It is part of checkpoints.
    """

    def __init__(
        self, model: nn.Module, optimizer: Mapping[str, Any], data: DataModule, cuda_graph: bool = False
    ) -> None:
        super().__init__(model, optimizer, data, cuda_graph)
        self.state: State | None = None
        self._training_state: State | None = None

    @classmethod
    def metrics(cls, data: DataModule, part: Part) -> TextScore:
        """Loss, perplexity, bits per character."""
        assert isinstance(data, TextStreams)
        # The first token of a text is no target, but its characters count.
        return TextScore(data.counts[part] / (data.tokens[part] - 1))

    @staticmethod
    def carried(state: State | None) -> State | None:
        """All of it."""
        return detach(state)

    def on_train_epoch_start(self) -> None:
        """Every pass over the text starts from a zero state; Lightning does not call this in a resumed pass."""
        self.state = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the batch's targets."""
        inputs_BT, targets_BT = batch
        logits_BTV, state = self.call(inputs_BT, self.state)
        self.state = detach(state)
        loss = mean_of_losses(logits_BTV, targets_BT)
        self.train_loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        """Set the training streams' state aside and start the text from zero."""
        super().on_validation_epoch_start()
        self._training_state, self.state = self.state, None

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss of the next part of the text."""
        inputs_BT, targets_BT = batch
        logits_BTV, self.state = self.model(inputs_BT, self.state)
        self.metric.update(logits_BTV, targets_BT)

    def on_validation_epoch_end(self) -> None:
        """Log the score of the whole text, and give the training streams their state back."""
        super().on_validation_epoch_end()
        self.state = self._training_state

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Every rank's streams' state, and the vocabulary, without which the weights mean nothing."""
        checkpoint["recurrent_state"] = devices.gather(self.state)
        if self.data.vocabulary is not None:
            checkpoint["vocabulary"] = self.data.vocabulary.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the streams' state."""
        self.state = move_data_to_device(devices.own(checkpoint["recurrent_state"]), self.device)


class _Whole(Objective):
    """Sequences that are read whole, each from a zero state."""

    @staticmethod
    @abstractmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        """What is minimised."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the sequences."""
        inputs_BTI, targets = batch
        loss = self.loss(self.call(inputs_BTI)[0], targets)
        self.train_loss = loss.detach()
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the scores."""
        inputs_BTI, targets = batch
        self.metric.update(self.model(inputs_BTI)[0], targets)


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


class Classification(_Whole):
    """Name the class of a sequence, by cross-entropy."""

    @classmethod
    def metrics(cls, data: DataModule, part: Part) -> MetricCollection:
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


class Regression(_Whole):
    """Tell the numbers of a sequence, by mean squared error."""

    @classmethod
    def metrics(cls, data: DataModule, part: Part) -> MetricCollection:
        """Mean squared error (``loss``), its root, and mean absolute error."""
        return MetricCollection(
            {"loss": MeanSquaredError(), "rmse": MeanSquaredError(squared=False), "mae": MeanAbsoluteError()},
            compute_groups=False,
        )

    @staticmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(outputs_BO, targets)


OBJECTIVES: dict[str, type[Objective]] = {
    "next_token": NextToken,
    "classification": Classification,
    "regression": Regression,
}
