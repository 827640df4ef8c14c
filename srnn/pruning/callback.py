"""The pruner inside a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength


class PruningCallback(pl.Callback):
    """Prunes a LightningModule, or a part of it, while any Trainer trains it.

    Example::

        trainer = pl.Trainer(max_epochs=20, callbacks=[PruningCallback(Gradual(sparsity=0.9))])

    Args:
        method: the pruning method.
        model: the module to prune; None prunes the whole LightningModule.
        reference: a dense model's weights by name, for a method that wants one.

    Its state (masks, thresholds, iteration) goes into the Trainer's checkpoints.
    """

    def __init__(
        self,
        method: PruningMethod,
        model: nn.Module | None = None,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.method = method
        self.model = model
        self.reference = reference
        self.pruner: Pruner | None = None
        self._restored: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the pruner, now that the length of the run and the optimiser are known."""
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("pruning needs to know how long the run is: set max_epochs or max_steps in the Trainer.")
        batches = int(trainer.num_training_batches)
        per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        run = RunLength(int(total), per_epoch)
        self.pruner = Pruner(self.model or pl_module, self.method, run, optimizer, self.reference)
        if self._restored is not None:
            self.pruner.load_state_dict(self._restored)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """One pruning step for each optimiser step; gradient accumulation has batches without one."""
        assert self.pruner is not None
        if trainer.global_step > self.pruner.itr:
            self.pruner.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks found in the very last step still have to be applied."""
        if self.pruner is not None:
            self.pruner.finalize()

    def state_dict(self) -> dict[str, Any]:
        """Goes into every checkpoint."""
        return self.pruner.state_dict() if self.pruner is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts, when the pruner is built."""
        self._restored = state_dict or None
