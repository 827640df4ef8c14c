"""What is recorded while training: pruning metrics, the scores of each validation, and time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from srnn.distributed import mean_over_ranks
from srnn.errors import UserError
from srnn.pruning.callback import PruningCallback
from srnn.pruning.checkpoint_while import CheckpointWhile
from srnn.pruning.pruner import Pruner


@dataclass(frozen=True)
class Validation:
    """One validation: after which step, with which scores, at which sparsity; and examples, if there are any."""

    step: int
    scores: Mapping[str, float]
    sparsity: float
    dense: bool
    finished: bool
    examples: Sequence[Mapping[str, str]] = ()

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Validation:
        """Out of a checkpoint, which may hold anything: what is no number has to be seen now and not at the end."""
        scores = {str(name): float(score) for name, score in row["scores"].items()}
        return cls(int(row["step"]), scores, float(row["sparsity"]), bool(row["dense"]), bool(row["finished"]))


class Recorder(pl.Callback):
    """Logs sparsities and thresholds, keeps the validations, measures the loop.

    Attributes:
        validations: all of them, in order.
        loop_seconds: wall time of the training loop, validation excluded.

    Args:
        pruning: whose pruner is recorded.
        every: steps between two entries of the training loss.
    """

    def __init__(self, pruning: PruningCallback, every: int) -> None:
        self.pruning = pruning
        self.every = every
        self._step = 0
        self.validations: list[Validation] = []
        self.loop_seconds = 0.0
        self._began: float | None = None

    @property
    def pruner(self) -> Pruner:
        """The run's pruner; there once training has started."""
        assert self.pruning.pruner is not None
        return self.pruning.pruner

    def is_dense(self) -> bool:
        """Whether no weight has been touched yet."""
        return self.pruner.itr <= self.pruner.method.dense_until

    def is_finished(self) -> bool:
        """Whether pruning is over at the sparsity asked for."""
        return self.pruner.reached()

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints."""
        rows = [vars(v) | {"scores": dict(v.scores)} for v in self.validations]
        return {"validations": rows, "loop_seconds": self.loop_seconds + self._running()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume the record of a stopped run."""
        self.validations = [Validation.of(row) for row in state_dict["validations"]]
        self.loop_seconds = float(state_dict["loop_seconds"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock and note where everything starts."""
        self._step = trainer.global_step
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Log the loss now and then, and pruning's metrics at each update."""
        pruner = self.pruner
        if trainer.global_step == self._step:  # gradients are being added up
            return
        self._step = trainer.global_step
        if self._step % self.every == 0:
            logged = {"train_loss": float(mean_over_ranks(pl_module.train_loss))}  # type: ignore[arg-type]
            if pl_module.schedule is not None:
                logged["step_size"] = trainer.optimizers[0].param_groups[0]["lr"]  # of the next step
            for logger in trainer.loggers:
                logger.log_metrics(logged, step=self._step)
        if pruner.method.is_update(pruner.itr):
            sparsities = {f"sparsity/{name}": value for name, value in pruner.sparsities().items()}
            thresholds = {f"threshold/{kind}": value for kind, value in pruner.thresholds.items()}
            for logger in trainer.loggers:
                logger.log_metrics({"sparsity/total": pruner.sparsity} | sparsities | thresholds, step=pruner.itr)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._stop()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the scores and go on."""
        scores = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("valid_")}
        if not math.isfinite(scores["valid_loss"]):
            raise UserError(
                f"the training has diverged: the validation loss is {scores['valid_loss']} after step "
                f"{trainer.global_step}; lower optimizer.lr, or clip gradients with trainer.gradient_clip_val."
            )
        state = (self.pruner.sparsity, self.is_dense(), self.is_finished())
        self.validations.append(Validation(trainer.global_step, scores, *state, getattr(pl_module, "examples", ())))
        self._began = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock for good."""
        self._stop()

    def _running(self) -> float:
        """Seconds since the clock was started; 0 while it stands."""
        return 0.0 if self._began is None else time.perf_counter() - self._began

    def _stop(self) -> None:
        self.loop_seconds, self._began = self.loop_seconds + self._running(), None


class BestWhile(CheckpointWhile):
    """Keeps the best checkpoint among those taken while a condition holds.

    Args:
        eligible: asked after each validation.
        path: where; one file, replaced when a better one comes.
    """

    def __init__(self, eligible: Callable[[], bool], path: Path) -> None:
        super().__init__(
            eligible,
            dirpath=str(path.parent),
            filename=path.stem,
            monitor="valid_loss",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    @property
    def state_key(self) -> str:
        """Apart from the other checkpoint callbacks' state."""
        return f"BestWhile-{self.filename}"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also in a folder that was moved: Lightning would forget the best score, and keep whatever comes next."""
        moved = {"dirpath": str(self.dirpath)}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            moved[name] = self._here(state_dict[name])
        best = {self._here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | moved | {"best_k_models": best})

    def _here(self, path: str) -> str:
        return str(Path(str(self.dirpath), Path(path).name)) if path else path
