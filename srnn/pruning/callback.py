"""The pruner inside a Lightning Trainer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.pruning.arguments import build_method
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.parts import some_of
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength


class PruningCallback(pl.Callback):
    """Prunes a LightningModule, or a part of it, while any Trainer trains it (Narang et al., ICLR 2017).

    Example:
        >>> import pytorch_lightning as pl
        >>> import torch
        >>> from srnn import PruningCallback
        >>> class Echo(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.rnn = torch.nn.GRU(16, 16, batch_first=True)
        ...     def training_step(self, x_BTI, _):
        ...         return (self.rnn(x_BTI)[0] - x_BTI).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.Adam(self.parameters())
        >>> pruning = PruningCallback("gradual", sparsity=0.9)
        >>> trainer = pl.Trainer(
        ...     max_epochs=5, accelerator="cpu", callbacks=[pruning], logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False,
        ... )
        >>> trainer.fit(Echo(), torch.utils.data.DataLoader(torch.randn(64, 5, 16), batch_size=8))
        >>> round(pruning.pruner.sparsity, 2)
        0.9

    Args:
        method: the name of a method, its config as a mapping with ``name``, or a method.
        model: the module to prune; None prunes the whole LightningModule.
        reference: a dense model's weights by name, for a method that wants one.
        options: of the method, where it is given by name.

    Its state (masks, thresholds, iteration) goes into the Trainer's checkpoints, under its method, options and module:
    a Trainer may have several that differ in one of these. With Lightning's ``WeightAveraging`` and
    ``StochasticWeightAveraging``, which have to stand before it, the average is masked too. Weights that others write
    after the last step, such as in a module's ``on_train_end``, are masked once more, with a warning.

    Attributes:
        method: the method it was given.
        pruner: the ``Pruner`` at work: masks, sparsities, report; None until training starts.

    Raises:
        UserError: no such method, or an option is wrong. When training starts: nothing can be pruned, the schedule
            does not fit the run, or the run has no known length.
    """

    def __init__(
        self,
        method: str | Mapping[str, Any] | PruningMethod,
        model: nn.Module | None = None,
        reference: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """See ``PruningCallback``."""
        self.method = build_method(method, options)
        self.model = model
        self.reference = reference
        self.pruner: Pruner | None = None
        self._restored: dict[str, Any] | None = None
        self._seen = 0  # optimiser steps up to the last batch

    @property
    def state_key(self) -> str:
        """What tells it from others in the same Trainer and its checkpoints."""
        # Names and shapes, and nothing of the weights: the same in the process that resumes.
        if self.model is None:
            return self._generate_state_key(method=self.method.settings)
        names = [f"{name} {tuple(parameter.shape)}" for name, parameter in self.model.named_parameters()]
        digest = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        return self._generate_state_key(method=self.method.settings, model=f"{type(self.model).__qualname__} {digest}")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the pruner, now that the length of the run and the optimiser are known.

        Raises:
            UserError: the run has no known length, or cannot be pruned as asked.
        """
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise UserError("pruning needs to know how long the run is: set max_epochs or max_steps in the Trainer.")
        batches = trainer.num_training_batches
        # Data without a length: the run counts as 20 epochs.
        per_epoch = 0 if batches == float("inf") else max(1, -(-int(batches) // trainer.accumulate_grad_batches))
        model = pl_module if self.model is None else self.model
        average = self._average(trainer, pl_module)
        state, before = self._restored, self.pruner
        self.pruner = Pruner(
            model, self.method, RunLength(int(total), per_epoch), trainer.optimizers, self.reference, average
        )
        self._restored, self._seen = None, trainer.global_step
        if state is None and before is not None and trainer.global_step > 0:
            state = before.state_dict()  # a second ``fit`` of the same Trainer resumes
        if state is not None:
            self.pruner.load_state_dict(state)
        else:
            self.pruner.itr = trainer.global_step  # of a dense network's checkpoint

    def _average(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> nn.Module | None:
        """The average of what is pruned, where the Trainer keeps one."""
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for place, callback in enumerate(callbacks):
            # Lightning has no public name for the average.
            if not isinstance(callback, WeightAveraging | StochasticWeightAveraging) or callback._average_model is None:
                continue
            if place > callbacks.index(self):
                raise UserError(
                    f"callbacks: {type(callback).__name__} must stand before PruningCallback, which masks the "
                    f"average after it is updated, and what it writes into the module when training ends."
                )
            average: nn.Module = callback._average_model
            if isinstance(callback, WeightAveraging):  # an AveragedModel around the copy
                average = callback._average_model.module
            names = [name for name, module in pl_module.named_modules() if module is self.model]
            return average.get_submodule(names[0]) if names else average
        return None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """One pruning step for each optimiser step; gradient accumulation has batches without one."""
        assert self.pruner is not None
        if trainer.global_step > self._seen:
            self._seen = trainer.global_step
            self.pruner.step()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks found in the very last step still have to be applied."""
        if self.pruner is not None:
            self.pruner.finalize()

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Mask again what others wrote when training ended: their ``on_train_end`` may come after this callback's."""
        if self.pruner is not None and (written := self.pruner.mask_again()):
            warnings.warn(
                f"pruned weights of {some_of(written)} were written after PruningCallback had masked them, when "
                f"training ended, and are zero again. Checkpoints from in between have them: put the callback that "
                f"writes weights before PruningCallback.",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        """Goes into every checkpoint."""
        return self.pruner.state_dict() if self.pruner is not None else {}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to lose masks: Lightning passes over a state that belongs to no callback.

        Raises:
            UserError: the checkpoint was pruned with settings that no callback of this Trainer has.
        """
        there = {callback.state_key for callback in trainer.callbacks}  # type: ignore[attr-defined]
        own = [key for key in map(str, checkpoint["callbacks"]) if key.partition("{")[0] == type(self).__qualname__]
        if lost := [key for key in own if key not in there]:
            raise UserError(
                f"the checkpoint was pruned by {', '.join(lost)}, and this Trainer has {self.state_key}: go on with "
                f"the same method, options and module."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts, when the pruner is built."""
        self._restored = state_dict or None
