"""Timing training: a pass through the data by the run's own loop, and by a bare loop of the same model."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

from srnn.config.settings import Settings
from srnn.pruning.callback import PruningCallback
from srnn.registry import register
from srnn.training.fitting import quiet, trainer_for
from srnn.training.preparing import prepare

Module = Any


@dataclass(frozen=True)
class LoopRow:
    """How long the passes of one loop took.

    Attributes:
        loop: ``bare``, ``srnn`` (dense) or ``srnn, pruned``.
        ms_per_step: of the median pass, validation excluded.
        ratio: that pass over one of the bare loop.
        steps: of a pass.
        pruning_share: of the time, inside pruning; 0 without pruning.
        device: the GPU's name, or the number of threads.
        torch: its version.
        options: of the run, as they were given.
    """

    loop: str
    ms_per_step: float
    ratio: float
    steps: int
    pruning_share: float
    device: str
    torch: str
    options: str

    def rounded(self) -> dict[str, Any]:
        """As a file has it, with as many digits as can be told from noise."""
        figures = {"ms_per_step": f"{self.ms_per_step:.3f}", "ratio": f"{self.ratio:.3f}"}
        return asdict(self) | figures | {"pruning_share": f"{self.pruning_share:.4f}"}


class Clock(pl.Callback):
    """Wall time of each pass, the device's work included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start."""
        _finish()
        self._began = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop."""
        _finish()
        self.seconds.append(time.perf_counter() - self._began)


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare_loop(module: Module, clip: float | None, epochs: int, device: torch.device) -> list[float]:
    """Seconds of each pass of the loop one would write by hand: eager, fp32 unless autocast is on around it.

    Args:
        module: the run's objective, whose loss is minimised by the run's optimiser.
        clip: largest norm of all gradients; None leaves them.
        epochs: passes.
        device: where to train.
    """
    module.to(device).train()
    module.call = module.model.__call__  # not its replay from a CUDA graph
    optimizer, schedule = _optimizer(module)
    batches, seconds = module.data.limited("train"), []
    for _ in range(epochs):
        _finish()
        began = time.perf_counter()
        module.on_train_epoch_start()
        for index, (inputs, targets) in enumerate(batches):
            loss = module.training_step((inputs.to(device), targets.to(device)), index)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(module.model.parameters(), clip)
            optimizer.step()
        if schedule is not None:
            schedule.step()
        _finish()
        seconds.append(time.perf_counter() - began)
    return seconds


def _optimizer(module: Module) -> tuple[torch.optim.Optimizer, Any]:
    """The run's own, as torch makes it by default, and its schedule if it has one."""
    made = register.build("optimizer", module.optimizer_config, parameters=list(module.model.parameters()), fused=False)
    return (made["optimizer"], made["lr_scheduler"]) if isinstance(made, dict) else (made, None)


def compare_loops(settings: Settings, options: str, repeats: int = 3) -> list[LoopRow]:
    """Passes of the bare loop, of srnn's loop without pruning, and with it; in turns, ``repeats`` times.

    Args:
        settings: a config with at least five epochs.
        options: that made it, for the rows.
        repeats: turns.
    """
    quiet()
    none = register.check("pruning", {"name": "none"})
    trainer = trainer_for(settings.trainer, [])
    device = trainer.strategy.root_device
    times: dict[str, list[float]] = {"bare": [], "srnn": [], "srnn, pruned": []}
    share, steps = 0.0, 0
    for _ in range(repeats):
        module = prepare(settings).objective
        steps = len(module.data.train_dataloader())
        precision = settings.trainer.precision
        dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
        with torch.autocast(device.type, dtype, enabled=precision != "32-true"):
            times["bare"] += bare_loop(module, settings.trainer.gradient_clip_val, settings.trainer.epochs, device)[1:]
        for name in ("srnn", "srnn, pruned"):
            run = prepare(settings if "pruned" in name else replace(settings, pruning=none))
            clock, module = Clock(), run.objective
            pruning = PruningCallback(run.method, run.model, run.reference)
            trainer_for(settings.trainer, [pruning, clock]).fit(module, module.data.train_dataloader())
            times[name] += clock.seconds[1:]
            if "pruned" in name and pruning.pruner is not None:
                share = pruning.pruner.seconds / sum(clock.seconds)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    passes = {name: median(seconds) for name, seconds in times.items()}
    return [
        LoopRow(
            name, 1e3 * seconds / steps, seconds / passes["bare"], steps, share if "pruned" in name else 0.0,
            where, torch.__version__, options,
        )
        for name, seconds in passes.items()
    ]  # fmt: skip
