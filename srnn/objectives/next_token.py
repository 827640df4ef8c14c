"""Predict the next token of a text.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning_fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from srnn import distributed
from srnn.datasets.base import Batch, DataModule, Split
from srnn.datasets.text import IGNORED, TextStreams
from srnn.models.recurrent import TorchState, detach
from srnn.objectives.base import Objective
from srnn.registry import register


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
    if distributed.ranks() == 1:
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED)
    targets = (targets_BT != IGNORED).sum().to(torch.float32)
    return sum_of_losses(logits_BTV, targets_BT) / distributed.mean_over_ranks(targets)


@register.objective("next_token")
class NextToken(Objective):
    """Predict the next token: stateful truncated back-propagation through contiguous streams.

    The state flows from batch to batch, its gradient does not. It is part of checkpoints.
    """

    telling = "bits_per_character"
    loss_name = "loss, nats a token"
    words = "{bits_per_character:.4f} bits/char, perplexity {perplexity:.2f}{a_token}"

    def __init__(
        self, model: nn.Module, optimizer: Mapping[str, Any], data: DataModule, call: Callable[..., Any] | None = None
    ) -> None:
        super().__init__(model, optimizer, data, call)
        self.state: TorchState | None = None
        self._training_state: TorchState | None = None

    @classmethod
    def metrics(cls, data: DataModule, part: Split) -> TextScore:
        """Loss, perplexity, bits per character."""
        assert isinstance(data, TextStreams)
        # The first token of a text is no target, but its characters count.
        return TextScore(data.counts[part] / (data.tokens[part] - 1))

    @staticmethod
    def carried(state: TorchState | None) -> TorchState | None:
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
        checkpoint["recurrent_state"] = distributed.gather(self.state)
        if self.data.vocabulary is not None:
            checkpoint["vocabulary"] = self.data.vocabulary.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from the streams' state."""
        self.state = move_data_to_device(distributed.own(checkpoint["recurrent_state"]), self.device)
