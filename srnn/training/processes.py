"""Several devices: a process for each. Rank 0 is the run; the other ranks train with it, and write and print nothing.

Rank 0 starts the others from the run's folder, not by repeating its own command: so it works for any job, whether it is
resumed, part of a sweep or run by a launcher. Gradients are averaged by torch's DistributedDataParallel.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_fabric.plugins.environments.lightning import find_free_network_port
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.utilities import rank_zero_only

from srnn.distributed import forget_groups
from srnn.errors import UserError
from srnn.registry import register

GRACE = 3.0  # seconds in which a rank notices by itself that another has failed
READY = 600.0  # seconds in which all ranks have to have read the data and be ready to train
PATIENCE = 60.0  # seconds in which ranks have to end once one has failed or all are done
SET = ("MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")  # by Lightning, in the environment of this process


@dataclass(frozen=True)
class Place:
    """Which process of a run this is.

    Attributes:
        rank: from 0.
        count: processes of the run.
        port: where rank 0 waits for the others.
    """

    rank: int = 0
    count: int = 1
    port: int = 0

    @classmethod
    def first(cls, count: int) -> Place:
        """Rank 0 of a run that starts now."""
        return cls(0, count, find_free_network_port() if count > 1 else 0)

    def trainer_options(self) -> dict[str, Any]:
        """For Lightning's Trainer, which would take its rank from whatever allocation this process runs in.

        A task of ``srun`` or a container may have RANK, LOCAL_RANK or SLURM_PROCID set though it is a run of its own.
        """
        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]  # read from the environment when Lightning is imported
        if self.count == 1:
            return {"devices": 1, "plugins": [_OneHost(self)]}
        strategy = DDPStrategy(cluster_environment=_OneHost(self))
        return {"devices": self.count, "strategy": strategy, "use_distributed_sampler": False}


class _OneHost(LightningEnvironment):
    """Tells Lightning that the processes of this machine have been started."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    @property
    def creates_processes_externally(self) -> bool:
        """Yes: by ``all_ranks``."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Chosen by rank 0."""
        return self.place.port

    def local_rank(self) -> int:
        """The rank."""
        return self.place.rank

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


@contextmanager
def all_ranks(folder: Path, place: Place, resumes: bool) -> Iterator[None]:
    """All processes of a run, ready to train, while inside. Nothing to do where there is one.

    Args:
        folder: the run's, with its ``config.yaml``.
        place: of this process.
        resumes: whether they start from the last checkpoint.

    Raises:
        UserError: in rank 0: another rank failed or was killed.
    """
    if place.count == 1:
        yield
        return
    before, threads = {name: os.environ.get(name) for name in SET}, torch.get_num_threads()
    try:
        with _others(folder, place, resumes) if place.rank == 0 else _announced():
            yield
            _leave()
    finally:
        _leave(alone=True)
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _leave(alone: bool = False) -> None:
    """Leave the group of all ranks, if this one is in it.

    Args:
        alone: not together with the others, of which one failed: NCCL's ranks wait for one another as they leave.
    """
    forget_groups()
    if dist.is_initialized():
        if alone:
            _abort()
        dist.destroy_process_group()


def _abort() -> None:
    """End all that NCCL waits for. Gloo notices by itself that a rank is gone."""
    if dist.is_initialized() and dist.get_backend() == "nccl" and (group := dist.group.WORLD) is not None:
        group.abort()


@contextmanager
def _others(folder: Path, place: Place, resumes: bool) -> Iterator[None]:
    """In rank 0: the other ranks. None of them outlives it, and it does not wait for ever for one that is gone."""
    processes, errors, left = [], [], threading.Event()
    try:
        for rank in range(1, place.count):
            errors.append(tempfile.TemporaryFile())  # noqa: SIM115
            processes.append(_start(folder, Place(rank, place.count, place.port), resumes, errors[-1]))
        deadline = time.monotonic() + READY
        for rank, process in enumerate(processes, start=1):
            _await_ready(rank, process, deadline)
        threading.Thread(target=_watch, args=(processes, left), daemon=True).start()
        yield
        _wait(processes)
    except RuntimeError as error:  # torch's, when a process of its group is gone
        _explain(processes, errors, folder, error)
        raise
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        left.set()
        for file in errors:
            file.close()


def _await_ready(rank: int, process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until a rank has said that it is ready to train.

    Raises:
        RuntimeError: it ended before.
        UserError: it is still not ready at the deadline; a plug-in may hang in its import.
    """
    assert process.stdout is not None
    said = b""
    while said != b"ready":
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise UserError(
                f"rank {rank} was not ready to train within {READY:.0f} seconds; the run is stopped. Does a plug-in "
                f"wait for something when it is imported? SRNN_DEBUG=1 shows all that ranks say."
            )
        some = os.read(process.stdout.fileno(), 64)
        if not some:
            raise RuntimeError("a rank ended before training")
        said += some


def _start(folder: Path, place: Place, resumes: bool, errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a rank. In a session of its own: Ctrl-C asks rank 0 alone, which agrees with the others when to stop."""
    words = [str(folder.resolve()), str(place.rank), str(place.count), str(place.port), str(int(resumes))]
    words += ["off"] if register.plugin_folders is None else map(str, register.plugin_folders)
    shown = None if os.environ.get("SRNN_DEBUG") == "1" else errors
    return subprocess.Popen(
        [sys.executable, "-m", "srnn.training.follower", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=shown, start_new_session=True,
    )  # fmt: skip


def _wait(processes: Sequence[subprocess.Popen[bytes]], seconds: float = PATIENCE) -> None:
    """Until all have ended."""
    deadline = time.monotonic() + seconds
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))


def _explain(
    processes: Sequence[subprocess.Popen[bytes]], errors: Sequence[IO[bytes]], folder: Path, error: Exception
) -> None:
    """Raise UserError if a rank is gone, with what it said."""
    _wait(processes, 3.0)
    # All that are left fail when one is gone: one that was killed, or said something of its own, is the cause.
    failed = [(rank, p.returncode) for rank, p in enumerate(processes, 1) if p.poll()]
    for rank, code in sorted(failed, key=lambda pair: pair[1]):
        errors[rank - 1].seek(0)
        lines = errors[rank - 1].read().decode(errors="replace").strip().splitlines()
        said = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed: {lines[-1] if lines else code}"
        raise UserError(
            f"rank {rank} of trainer.devices={len(processes) + 1} {said}. SRNN_DEBUG=1 shows all it says. If there is "
            f"a checkpoint, resume it: srnn resume {shlex.quote(str(folder))}"
        ) from error


def _watch(processes: Sequence[subprocess.Popen[bytes]], left: threading.Event) -> None:
    """Once a rank has failed, end the wait for it, or this process."""
    while not left.wait(1.0):
        if any(process.poll() for process in processes):
            if not left.wait(GRACE):
                _abort()
            if not left.wait(PATIENCE):
                print("srnn: a rank failed, and the others still wait for it: all are stopped.", file=sys.stderr)
                for process in processes:
                    process.kill()
                os._exit(1)
            return


_channel = 1  # where a rank says that it is ready


def keep_channel() -> None:
    """In another rank, before anything else: keep what was stdout for itself, and print to stderr from now on.

    Plug-ins are anybody's code, and may print: what they say is not to be taken for the rank's own word.
    """
    global _channel
    _channel = os.dup(1)
    os.dup2(2, 1)


@contextmanager
def _announced() -> Iterator[None]:
    """In another rank: tell rank 0 that it is ready, and end when rank 0 is gone."""
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    os.write(_channel, b"ready")
    yield


class OwnRandomNumbers(pl.Callback):
    """Other random numbers in each rank, which have other rows of the batch; Lightning gives all the same."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run's own replace them."""
        if trainer.world_size > 1:
            torch.manual_seed(self.seed + (trainer.global_rank << 32))
