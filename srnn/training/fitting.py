"""Fitting: Lightning's Trainer of a run, and what watches it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from srnn.config.settings import TrainerConfig
from srnn.datasets.base import Batches, DataModule
from srnn.errors import UserError
from srnn.pruning.callback import PruningCallback
from srnn.recording.console import RunProgress
from srnn.recording.metrics import MetricsFile, WandbCurves
from srnn.recording.recorder import BestWhile, Recorder
from srnn.run_folder import RunFolder
from srnn.training.checkpoints import AtomicCheckpoints, LastCheckpoint, stop_requests
from srnn.training.preparing import Run
from srnn.training.processes import OwnRandomNumbers, Place, all_ranks
from srnn.training.teaching import OwnTeacher

LOGGED_POINTS = 300  # about so many points of the training loss over a run


def fit(run: Run, folder: RunFolder, wandb: Any = None) -> Recorder:
    """Train in all ranks, and return what was recorded. Rank 0 alone writes, logs and prints.

    Args:
        run: what to train; its model is on the CPU in the end.
        folder: where its files go.
        wandb: the W&B run that gets its curves.

    Raises:
        UserError: the ranks have diverged, or the Trainer's options cannot be used here.
        KeyboardInterrupt: the user stopped it; the folder holds the last checkpoint.
    """
    module = run.objective
    pruning = PruningCallback(run.method, run.model, run.reference)
    recorder = Recorder(pruning, max(1, run.length.total_steps // LOGGED_POINTS))
    metrics = MetricsFile(folder.metrics)
    first = run.place.rank == 0
    with stop_requests() as request:
        last = LastCheckpoint(folder.last, run.trainer.checkpoint_minutes, request, metrics)
        trainer = trainer_for(
            run.trainer,
            _callbacks(run, folder, recorder, last),
            logger=[metrics, *([WandbCurves(wandb)] if wandb is not None else [])],
            enable_checkpointing=True,
            enable_progress_bar=first,
            plugins=[AtomicCheckpoints()],
            place=run.place,
        )
        with all_ranks(folder.path, run.place, run.checkpoint is not None):
            try:
                trainer.fit(module, datamodule=LightningData.of(run.data), ckpt_path=run.checkpoint, weights_only=True)
            except SystemExit:  # what Lightning makes of Ctrl-C
                if trainer.interrupted:
                    raise KeyboardInterrupt from None
                raise
            except Exception as error:  # of Lightning, torch or Python: a checkpoint may hold anything
                if isinstance(error, UserError) or run.checkpoint is None or last.stepped:
                    raise
                raise UserError(
                    f"{run.checkpoint}: the run cannot go on from it: {type(error).__name__}: {error}. It may be "
                    f"damaged, or of another run; SRNN_DEBUG=1 shows more."
                ) from error
    if pruning.pruner is None:  # it was stopped after its last step: there was nothing left to train
        pruning.on_train_start(trainer, module)
    run.model.to("cpu")
    return recorder


class LightningData(pl.LightningDataModule):
    """A data set as Lightning wants it: what is trained on, what is validated on, and the place in a pass."""

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data = data

    @classmethod
    def of(cls, data: DataModule) -> LightningData:
        """Under the data set's own name, by which checkpoints know it."""
        named: type[LightningData] = type(cls.__name__, (cls,), {"__qualname__": type(data).__qualname__})
        return named(data)

    def train_dataloader(self) -> Batches:
        """The training split."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Batches:
        """The validation split."""
        return self.data.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Goes into checkpoints."""
        return self.data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at a checkpoint's place."""
        self.data.load_state_dict(state_dict)


def _callbacks(run: Run, folder: RunFolder, recorder: Recorder, last: LastCheckpoint) -> list[pl.Callback]:
    """In the order in which they act: weights and their average are masked before anything is recorded or saved."""
    teacher = run.objective.teacher
    return [
        *([run.averaging] if run.averaging is not None else []),
        recorder.pruning,
        *([] if teacher is None or teacher.ready else [OwnTeacher(teacher, recorder.is_dense, folder.best_dense)]),
        recorder,
        *([RunProgress(recorder.pruning)] if run.place.rank == 0 else []),
        BestWhile(recorder.is_dense, folder.best_dense),
        BestWhile(recorder.is_finished, folder.best),
        last,
        OwnRandomNumbers(run.seed),
    ]


def trainer_for(
    chosen: TrainerConfig, callbacks: list[pl.Callback], place: Place | None = None, **options: Any
) -> pl.Trainer:
    """Lightning's Trainer of a config's ``trainer``. Raises UserError for what cannot be used here.

    Args:
        chosen: the options.
        callbacks: all there are.
        place: of this process among the run's; None for the only one.
        options: more, of Lightning's Trainer.
    """
    placed = (place or Place()).trainer_options()
    plugins = [*placed.pop("plugins", []), *options.pop("plugins", [])]
    quiet_by_default = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    try:
        with _without_variables():
            trainer = pl.Trainer(
                accelerator=chosen.accelerator,
                precision=chosen.precision,
                max_epochs=chosen.epochs,
                gradient_clip_val=chosen.gradient_clip_val,
                accumulate_grad_batches=chosen.accumulate_grad_batches,
                log_every_n_steps=1,  # of what Lightning itself logs, which is nothing; the recorder does
                num_sanity_val_steps=0,
                enable_model_summary=False,
                callbacks=callbacks,
                plugins=plugins,
                **(quiet_by_default | placed | options),
            )
    except MisconfigurationException as error:
        asked = f"trainer.accelerator={chosen.accelerator}"
        asked += f" trainer.devices={chosen.devices}" if chosen.devices > 1 else ""
        raise UserError(f"{asked} cannot be used here: {' '.join(str(error).split())}") from None
    _check_graph(chosen, trainer)
    return trainer


def check_devices(chosen: TrainerConfig, place: Place) -> None:
    """Make sure, before data are read, that the devices asked for can be used. Raises UserError."""
    if chosen.devices > 1 and chosen.cuda_graph:
        raise UserError(
            f"trainer.cuda_graph=true works on one device only, and trainer.devices={chosen.devices}: set "
            f"trainer.cuda_graph=false, or trainer.devices=1."
        )
    if chosen.devices > 1 and "LOCAL_RANK" in os.environ:
        raise UserError(
            f"trainer.devices={chosen.devices} starts its own processes, and this one was started as one of several "
            f"(LOCAL_RANK={os.environ['LOCAL_RANK']}): start srnn once, without torchrun or the like."
        )
    for name in filter(_is_trainers, os.environ):
        print(f"srnn: {name} is passed over: trainer.OPTION decides.", file=sys.stderr)
    trainer_for(chosen, [], place)


def _is_trainers(variable: str) -> bool:
    return variable.startswith("PL_TRAINER_")


@contextmanager
def _without_variables() -> Iterator[None]:
    """Lightning's Trainer takes what it is not given from the environment, of which a run's config says nothing."""
    taken = {name: os.environ.pop(name) for name in filter(_is_trainers, list(os.environ))}
    try:
        yield
    finally:
        os.environ.update(taken)


def _check_graph(chosen: TrainerConfig, trainer: pl.Trainer) -> None:
    if not chosen.cuda_graph:
        return
    if trainer.strategy.root_device.type != "cuda":
        raise UserError("trainer.cuda_graph=true needs a CUDA GPU, and this run is on the CPU: leave it at false.")
    if chosen.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.cuda_graph=true cannot add up gradients "
            f"(trainer.accumulate_grad_batches={chosen.accumulate_grad_batches}): choose one of the two."
        )


def quiet() -> None:
    """Silence Lightning, which speaks of itself on every run; what matters to a user is in our own tables."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("srnn.kernels").setLevel(logging.WARNING)  # the report tells what was chosen
    lightnings = (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*", ".*AccumulateGrad.*")
    for message in lightnings:
        warnings.filterwarnings("ignore", f"(?s){message}")  # the name of a folder may hold a line end
