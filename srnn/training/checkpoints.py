"""Checkpoints from which a stopped run is resumed, bit for bit on a CPU."""

from __future__ import annotations

import io
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from srnn.distributed import any_rank, gather, own
from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.inference.weights import read_checkpoint
from srnn.recording.metrics import MetricsFile
from srnn.terminal import console

# What a checkpoint holds without which a run does not go on bit for bit.
_SAVED = ("state_dict", "loops", "optimizer_states", "callbacks", "random", "metrics_rows")


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, and read without running any code in them."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Through memory, then into place."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Onto the CPU. Raises UserError for a damaged file."""
        return read_checkpoint(Path(path))


class StopRequest:
    """Whether somebody asked the run to stop: once asks, twice interrupts at once."""

    asked = False
    interrupt: Any = None  # what handled Ctrl-C before

    def ask(self, number: int, frame: Any) -> None:
        """Handle a signal."""
        if self.asked:
            if callable(self.interrupt):
                self.interrupt(number, frame)
            raise KeyboardInterrupt
        self.asked = True
        with suppress(RuntimeError):  # Python's, where the signal came in the midst of another print
            console.print("stopping after this step; once more stops at once")

    def listen(self) -> dict[Any, Any]:
        """Handle Ctrl-C and SIGTERM from now on; returns what did before."""
        if threading.current_thread() is not threading.main_thread():  # only it may
            return {}
        return {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While inside, Ctrl-C and SIGTERM ask; asked a second time, they interrupt at once."""
    request = StopRequest()
    before = request.listen()
    request.interrupt = before.get(signal.SIGINT)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class LastCheckpoint(Checkpoint):
    """Keeps the checkpoint that a run is resumed from: after every pass, every so many minutes, and when asked to stop.

    Beside what Lightning saves it holds the state of every rank's random generators and the number of rows in
    ``metrics.csv``.

    Attributes:
        stepped: whether there was a batch since training started or went on.

    Args:
        path: the file, replaced each time.
        minutes: a longer pass is saved in between.
        request: a stop it obeys after the step that runs.
        metrics: the run's ``metrics.csv``.
    """

    def __init__(self, path: Path, minutes: float, request: StopRequest, metrics: MetricsFile) -> None:
        self.path = path
        self.minutes = minutes
        self.request = request
        self.metrics = metrics
        self.stepped = False
        self._saved = time.monotonic()
        self._step = 0
        self._random: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note where the run starts, and listen again: Lightning's handler makes ranks wait for each other."""
        self.request.listen()
        self._step = trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        """Before the first step of a resumed run, random numbers go on where they were."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        """Save if it is time: only after a whole step, and not at the end of a pass, whose validation follows."""
        self.stepped = True
        stepped, self._step = trainer.global_step > self._step, trainer.global_step
        due = time.monotonic() - self._saved > 60 * self.minutes
        last = rest[-1] + 1 >= trainer.num_training_batches
        if stepped and not last:
            due, asked = any_rank(due, self.request.asked)
            if due or asked:
                self._save(trainer, asked)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save every pass, after its validation."""
        self._save(trainer, *any_rank(self.request.asked))

    def _save(self, trainer: pl.Trainer, stop: bool) -> None:
        self.metrics.save()
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
        if stop:
            raise KeyboardInterrupt

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Add what Lightning does not save."""
        checkpoint["random"] = gather(random_state())
        checkpoint["metrics_rows"] = len(self.metrics.rows)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Take it up again.

        Raises:
            UserError: something is missing: Lightning passes over what is not there, and would start that anew.
        """
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stateful = [c.state_key for c in callbacks if type(c).state_dict is not pl.Callback.state_dict]
        missing = [key for key in _SAVED if key not in checkpoint or checkpoint[key] in (None, [], {})]
        missing += [key for key in ("lr_schedulers",) if key not in checkpoint]  # there may be none
        if missing := missing or [key for key in stateful if key not in checkpoint["callbacks"]]:
            raise UserError(f"{self.path} is damaged: it has no {missing[0]}.")
        self._random = dict(own(checkpoint["random"]))
        self.metrics.go_on_from(checkpoint["metrics_rows"])


def random_state() -> dict[str, Any]:
    """The state of every random generator, as plain data."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random generator there."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all([part.cpu() for part in state["cuda"]])
