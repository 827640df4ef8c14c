"""The pruner inside a Lightning Trainer."""

from __future__ import annotations

import hashlib
import math
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import (
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from srnn.errors import UserError
from srnn.pruning.arguments import build_method, differing, unwrapped
from srnn.pruning.checkpoint_while import CheckpointWhile
from srnn.pruning.clipping import MaskingClip
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.parts import some_of
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength

# Where a module or callback could look at gradients between the backward pass and Lightning's clipping.
_BETWEEN = (
    "backward", "on_after_backward", "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping",
    "clip_gradients",
)  # fmt: skip
# Stands for the run whose first steps ``fast_dev_run`` tries out: long enough for any schedule.
_DEV_RUN = RunLength(10_000_000, 10_000)


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
    after the last step, such as in a module's ``on_train_end``, are masked once more, with a warning. A
    ``ModelCheckpoint`` that keeps the best network may keep one from before pruning was over, and is warned of:
    ``checkpoint`` gives one that does not.

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
        self._clip: MaskingClip | None = None
        self._before_reading: RemovableHandle | None = None

    def checkpoint(self, **options: Any) -> ModelCheckpoint:
        """Lightning's ``ModelCheckpoint`` that keeps no network from before pruning was over.

        Args:
            options: of ``ModelCheckpoint``: ``monitor``, ``mode``, ``dirpath``, ...

        Returns:
            A callback for the same Trainer. Of a run that ends before pruning does it has nothing.

        Example:
            >>> from srnn import PruningCallback
            >>> pruning = PruningCallback("cubic", sparsity=0.9)
            >>> callbacks = [pruning, pruning.checkpoint(monitor="valid_loss")]
        """
        return CheckpointWhile(self._is_over, **options)

    def _is_over(self) -> bool:
        return self.pruner is not None and self.pruner.itr >= self.pruner.method.done_from

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
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            warnings.warn("fast_dev_run: pruning is set up and tried out, and its schedule is not run.", stacklevel=2)
        run = _run_length(trainer, pl_module.automatic_optimization)
        model = pl_module if self.model is None else self.model
        average = self._average(trainer, pl_module)
        state, before = self._restored, self.pruner
        self.pruner = Pruner(model, self.method, run, trainer.optimizers, self.reference, average)
        self._restored, self._seen = None, trainer.global_step
        if state is None and before is not None and trainer.global_step > 0:
            state = before.state_dict()  # a second ``fit`` of the same Trainer resumes
        if state is not None:
            self.pruner.load_state_dict(state)
        else:
            # Of a dense network's checkpoint.
            automatic = pl_module.automatic_optimization
            self.pruner.itr = trainer.global_step if automatic else _manual_itr(trainer, run)
        self._warn_of_half_pruned(trainer.checkpoint_callbacks)
        self._leave(trainer)
        # Of a checkpoint of weights alone, callbacks are not told.
        self._before_reading = pl_module.register_state_dict_pre_hook(_MaskFirst(self.pruner))
        if self.pruner.groups and _only_clips(trainer, pl_module):
            # Nothing sees gradients before they are clipped: they are masked there, which saves a pass over them.
            self._take_clipping(trainer.precision_plugin, self.pruner.clips())

    def _take_clipping(self, plugin: Precision, clip: MaskingClip) -> None:
        def by_norm(optimizer: Optimizer, clip_val: float) -> None:
            clip(plugin.main_params(optimizer), clip_val)

        self._clip = clip
        vars(plugin)["clip_grad_by_norm"] = by_norm

    def _leave(self, trainer: pl.Trainer) -> None:
        """Take back what was put into the Trainer and the module."""
        if self._before_reading is not None:
            self._before_reading.remove()
            self._before_reading = None
        if self._clip is not None:
            self._clip.end()
            self._clip = None
            vars(trainer.precision_plugin).pop("clip_grad_by_norm", None)

    def _warn_of_half_pruned(self, callbacks: Sequence[pl.Callback]) -> None:
        """Warn of what may keep, as the best network, one from before pruning is over: it is usually the better one."""
        assert self.pruner is not None
        if self._is_over() or not self.pruner.groups:
            return
        for callback in callbacks:
            if not isinstance(callback, ModelCheckpoint) or isinstance(callback, CheckpointWhile):
                continue
            if callback.monitor and callback.save_top_k > 0:
                given = f"monitor={callback.monitor!r}"
                warnings.warn(
                    f"{type(callback).__name__}({given}) keeps the best network of all, which may be one from before "
                    f"pruning is over, at step {self.pruner.method.done_from}, with too few zeros. Put "
                    f"pruning_callback.checkpoint({given}, ...) in its place: it takes the same options.",
                    stacklevel=2,
                )

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
            # One of them wraps the copy in an AveragedModel.
            average: nn.Module = unwrapped(callback._average_model)
            names = [name for name, module in pl_module.named_modules() if module is self.model]
            return average.get_submodule(names[0]) if names else average
        return None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """One pruning step for each optimiser step; gradient accumulation has batches without one."""
        assert self.pruner is not None
        steps = int(trainer.global_step > self._seen)
        self._seen = trainer.global_step
        if not (pl_module.automatic_optimization or trainer.fast_dev_run):  # type: ignore[attr-defined]
            # A batch may have several optimiser steps, or none: pruning keeps up with the part of the run that is done.
            steps = max(steps, _manual_itr(trainer, self.pruner.run) - self.pruner.itr)
        for _step in range(steps):
            self.pruner.step()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """What is scored, and may be saved as the best, is masked."""
        if self.pruner is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.pruner.mask_now()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the Trainer as it was."""
        self._leave(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Masks found in the very last step still have to be applied."""
        self._leave(trainer)
        if self.pruner is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
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

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget the masks of a checkpoint that was only scored: a training after it has others."""
        if stage != "fit":
            self._restored = None

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
            others = [c.state_key for c in trainer.callbacks if isinstance(c, PruningCallback)]  # type: ignore[attr-defined]
            now = next((key for key in others if key not in own), self.state_key)
            raise UserError(
                f"the checkpoint was pruned with other settings: {differing(lost[0], now)}. Go on with the same "
                f"method, options and module."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts, when the pruner is built."""
        self._restored = state_dict or None


class _MaskFirst:
    """Zeroes what is pruned when a module's ``state_dict`` is asked for. The hook of a copied module does nothing.

    Args:
        pruner: that masks; held weakly.
    """

    def __init__(self, pruner: Pruner | None = None) -> None:
        self._pruner = None if pruner is None else weakref.ref(pruner)

    def __reduce__(self) -> tuple[type[_MaskFirst], tuple[()]]:
        return _MaskFirst, ()

    def __call__(self, *_: Any) -> None:
        if self._pruner is not None and (pruner := self._pruner()) is not None:
            pruner.mask_now()


def _only_clips(trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Whether gradients, on one GPU, are clipped by their norm in Lightning's own way, and nothing sees them before."""
    plugin, strategy = trainer.precision_plugin, trainer.strategy
    by_norm = bool(trainer.gradient_clip_val) and trainer.gradient_clip_algorithm in (None, "norm")
    # A scaler looks whether gradients are finite, of pruned weights too.
    usual = type(plugin) in (Precision, MixedPrecision) and getattr(plugin, "scaler", None) is None
    alone = type(strategy) is SingleDeviceStrategy and strategy.root_device.type == "cuda"
    free = pl_module.automatic_optimization and "clip_grad_by_norm" not in vars(plugin)  # of another such callback
    there = [pl_module, *trainer.callbacks]  # type: ignore[attr-defined]
    return by_norm and usual and alone and free and not any(map(_looks_between, there))


def _looks_between(one: pl.LightningModule | pl.Callback) -> bool:
    plain = pl.LightningModule if isinstance(one, pl.LightningModule) else pl.Callback
    hooks = [(getattr(one, hook, None), getattr(plain, hook, None)) for hook in _BETWEEN]
    return any(getattr(own, "__func__", own) is not usual for own, usual in hooks)


def _run_length(trainer: pl.Trainer, automatic: bool) -> RunLength:
    """How long the run will be, in optimiser steps; with manual optimisation see ``_manual_itr``.

    Raises:
        UserError: nobody knows.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return _DEV_RUN
    batches, limit, epochs = trainer.num_training_batches, trainer.max_steps, _epochs(trainer)
    if limit == -1 and math.inf in (batches, epochs):
        known = "max_epochs or max_steps" if math.isfinite(batches) else "max_steps, because the data have no length,"
        raise UserError(f"pruning needs to know how long the run is: set {known} in the Trainer.")
    if batches == math.inf:
        return RunLength(limit)  # counts as 20 epochs
    if not automatic:
        all_batches, steps = _manual_limits(trainer)
        each = max(1, len(trainer.optimizers)) if steps < all_batches else 1  # usually all step on each batch
        return RunLength(int(min(all_batches, steps)), batches * each)
    schedulers = [c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if not schedulers:
        per_epoch = max(1, math.ceil(batches / trainer.accumulate_grad_batches))
        total = per_epoch * epochs
        return RunLength(int(total if limit == -1 else min(total, limit)), per_epoch)
    total, epoch = 0, 0.0  # with steps that become fewer
    while epoch < epochs and total != limit:
        steps = max(1, math.ceil(batches / schedulers[-1].get_accumulate_grad_batches(int(epoch))))
        taken = steps if limit == -1 else min(steps, limit - total)
        total, epoch = total + taken, epoch + taken / steps
    return RunLength(total, total / epoch if epoch else 0.0)


def _epochs(trainer: pl.Trainer) -> float:
    """How many epochs the Trainer trains for, infinite if it has no such limit."""
    if trainer.max_epochs in (None, -1):
        return math.inf
    # With batch norm, this callback adds an epoch that only measures activations.
    averages = [c for c in trainer.callbacks if isinstance(c, StochasticWeightAveraging)]  # type: ignore[attr-defined]
    return max(1, trainer.max_epochs - sum(bool(c._model_contains_batch_norm) for c in averages))


def _manual_limits(trainer: pl.Trainer) -> tuple[float, float]:
    """After how many batches, and how many optimiser steps, manual optimisation ends; infinite without a limit."""
    return trainer.num_training_batches * _epochs(trainer), math.inf if trainer.max_steps == -1 else trainer.max_steps


def _manual_itr(trainer: pl.Trainer, run: RunLength) -> int:
    """How far the run is, in its own steps, where the module steps its optimisers itself.

    How many of them step on a batch only the module knows. ``max_epochs`` limits batches, and ``max_steps`` the steps
    of all optimisers: what is nearer to its limit counts, so that the schedule ends with the run.
    """
    batches, steps = _manual_limits(trainer)
    done = max((trainer.fit_loop.epoch_loop.total_batch_idx + 1) / batches, trainer.global_step / steps)
    return math.floor(done * run.total_steps + 1e-6)
