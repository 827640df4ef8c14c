"""The next-token objective: stateful truncated back-propagation through contiguous streams."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.datasets.text import IGNORED
from srnn.models.recurrent import State, detach
from srnn.registry import register

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Score:
    """How well a whole text is predicted.

    Attributes:
        loss: nats a token.
        perplexity: exp(loss), a token; at most exp(700), which is still a float.
        bits_per_character: bits over characters of text, whatever a token is.
    """

    loss: float
    perplexity: float
    bits_per_character: float

    @classmethod
    def of(cls, nats: float, tokens: int, characters: int) -> Score:
        """From the summed loss of a text."""
        loss = nats / tokens
        return cls(loss, math.exp(min(loss, 700.0)), nats / math.log(2) / characters)


def sum_of_losses(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over all targets that are not padding."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="sum")


class NextToken(pl.LightningModule):
    """Trains a language model; the state flows from batch to batch, its gradient does not.

    Logs ``train_loss`` and ``train_bits_per_character`` at every step, and ``valid_*`` over the whole text.

    Args:
        model: what to train: ``logits_BTV, state = model(tokens_BT, state)``.
        optimizer: the optimiser's config.
        tokens_per_character: of the training text; 1 where tokens are characters.
        valid_characters: number of characters of the validation text.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Mapping[str, Any],
        tokens_per_character: float,
        valid_characters: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer_config = dict(optimizer)
        self.tokens_per_character = tokens_per_character
        self.valid_characters = valid_characters
        self.state: State | None = None
        self._training_state: State | None = None
        self._nats = 0.0
        self._tokens = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser the config names."""
        optimizer: torch.optim.Optimizer = register.build(
            "optimizer", self.optimizer_config, parameters=self.model.parameters()
        )
        return optimizer

    def on_train_epoch_start(self) -> None:
        """Every pass over the text starts from a zero state."""
        self.state = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean loss over the batch's targets."""
        inputs_BT, targets_BT = batch
        logits_BTV, state = self.model(inputs_BT, self.state)
        self.state = detach(state)
        loss = sum_of_losses(logits_BTV, targets_BT) / (targets_BT != IGNORED).sum()
        bits = loss.detach() * (self.tokens_per_character / math.log(2))
        self.log_dict({"train_loss": loss, "train_bits_per_character": bits})
        return loss

    def on_validation_epoch_start(self) -> None:
        """Set the training streams' state aside and start the text from zero."""
        self._training_state, self.state = self.state, None
        self._nats, self._tokens = 0.0, 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the loss of the next part of the text."""
        inputs_BT, targets_BT = batch
        logits_BTV, self.state = self.model(inputs_BT, self.state)
        self._nats += sum_of_losses(logits_BTV, targets_BT).item()
        self._tokens += int((targets_BT != IGNORED).sum())

    def on_validation_epoch_end(self) -> None:
        """Log the score of the whole text, and give the training streams their state back."""
        score = Score.of(self._nats, self._tokens, self.valid_characters)
        self.log_dict({f"valid_{name}": value for name, value in vars(score).items()})
        self.state = self._training_state


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Any, characters: int, device: torch.device) -> Score:
    """Score a model on a whole text, given as the batches of contiguous streams."""
    model.eval()
    nats, tokens, state = 0.0, 0, None
    for inputs_BT, targets_BT in batches:
        logits_BTV, state = model(inputs_BT.to(device), state)
        nats += sum_of_losses(logits_BTV, targets_BT.to(device)).item()
        tokens += int((targets_BT != IGNORED).sum())
    return Score.of(nats, tokens, characters)
