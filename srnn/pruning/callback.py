"""The pruner inside a Lightning Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.pruner import Pruner, build_method
from srnn.pruning.schedules import RunLength


class PruningCallback(pl.Callback):
    """Prunes a LightningModule, or a part of it, while any Trainer trains it.

    Example::

        trainer = pl.Trainer(max_epochs=20, callbacks=[PruningCallback("gradual", sparsity=0.9)])

    Args:
        method: the name of a method, its config as a mapping with ``name``, or a method.
        model: the module to prune; None prunes the whole LightningModule.
        reference: a dense model's weights by name, for a method that wants one.
        options: of the method, where it is given by name.

    Its state (masks, thresholds, iteration) goes into the Trainer's checkpoints. With Lightning's ``WeightAveraging``,
    which has to stand before it, the average is masked too.
    """

    def __init__(
        self,
        method: str | Mapping[str, Any] | PruningMethod,
        model: nn.Module | None = None,
        reference: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        self.method = build_method(method, options)
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
        average = self._average(trainer, pl_module)
        self.pruner = Pruner(self.model or pl_module, self.method, run, optimizer, self.reference, average)
        if self._restored is not None:
            self.pruner.load_state_dict(self._restored)

    def _average(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        """The average of what is pruned, where the Trainer keeps one."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            if isinstance(callback, WeightAveraging) and callback._average_model is not None:
                if place > callbacks.index(self):
                    raise UserError(
                        f"callbacks: {type(callback).__name__} must stand before PruningCallback, which masks the "
                        f"average after it is updated."
                    )
                average: nn.Module = callback._average_model.module
                names = [name for name, module in pl_module.named_modules() if module is self.model]
                return average.get_submodule(names[0]) if names else average
        return None

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
