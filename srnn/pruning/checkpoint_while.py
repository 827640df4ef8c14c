"""Lightning's ``ModelCheckpoint``, at work only while a condition holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint


class CheckpointWhile(ModelCheckpoint):
    """Keeps the best checkpoint among those taken while a condition holds.

    Args:
        eligible: asked before each checkpoint.
        options: of ``ModelCheckpoint``.
    """

    def __init__(self, eligible: Callable[[], bool], **options: Any) -> None:
        super().__init__(**options)
        self.eligible = eligible

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Compete only while eligible."""
        if self.eligible():
            super().on_train_batch_end(trainer, pl_module, *rest)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compete only while eligible."""
        if self.eligible():
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compete only while eligible."""
        if self.eligible():
            super().on_validation_end(trainer, pl_module)
