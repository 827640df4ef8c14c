"""``python -m srnn [overrides]``: train, prune, pack, report."""

from __future__ import annotations

import os
import shlex
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from srnn.commands.resume import main as resume_run
from srnn.config.command_line import CommandLine, check_command_line
from srnn.config.composing import compose_settings, conf_folder, connect_hydra, settings_of
from srnn.config.settings import Settings
from srnn.config.sweeps import Job, Sweep, identity, identity_of, outcome
from srnn.errors import JobFailed, UserError, cannot_be_written
from srnn.files import nearest_there, write_atomically
from srnn.registry import register
from srnn.registry.plugins import plugin_folders
from srnn.run_folder import RunFolder
from srnn.terminal import console, logged

_COMMAND = "command.txt"  # in a sweep's folder: what started it
_alone = threading.Lock()  # held by the run of this process
_HELP = """usage: srnn [train] [GROUP=NAME] [GROUP.OPTION=VALUE] ...

Train, prune, pack, measure, report. Everything lands in a folder of its own under outputs/.

  model=gru|lstm|rnn            the network                     pruning=gradual|cubic|block|...    the method
  dataset=NAME                  the data                        kernel=auto|cpu|csr|dense         runs the packed file
  optimizer=adam|adamw|sgd      the optimiser                   trainer=default|cpu|gpu|ddp|fast  the loop
  experiment=NAME               a preset of all of these        tracking.mode=offline|online|disabled
  seed=0                        fixes all that is random        init_from=FILE   start from an existing network

  -m, --multirun                every combination of options with several values: pruning=none,gradual seed=0,1,2;
                                the same command again resumes what is not finished
  --cfg job                     print the config instead of running it
  hydra.run.dir=FOLDER          where the run lands; of a sweep hydra.sweep.dir=FOLDER

`srnn list` shows every name, with its options, their defaults and what is allowed."""


def main(argv: Sequence[str]) -> int:
    """Check every job of the command line, then let Hydra run them. ``resume=FOLDER`` resumes a stopped run."""
    if any(word in ("--help", "-h") for word in argv):
        print(_HELP)
        return 0
    if any(word.startswith("resume=") for word in argv):
        return resume_run(argv)
    if not _alone.acquire(blocking=False):
        raise UserError(
            "another run goes on in this process, and Hydra has one config a process: start each in one of its own, "
            "as `srnn -m seed=0,1 hydra/launcher=joblib` does."
        )
    try:
        return _train(argv)
    finally:
        _alone.release()


def _train(argv: Sequence[str]) -> int:
    line = check_command_line(argv)
    _check_folder(line)
    if line.sweep is not None:
        _check_new_sweep(line.sweep, line.jobs)
        _open_sweep(line.sweep, argv)
    connect_hydra()
    # Without it Hydra reports an error of its own work, such as a folder it cannot make, and exits by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra reads the arguments from there; it must not see the command's name.
    sys.argv = ["srnn", *line.argv]
    job = hydra.main(version_base="1.3", config_path=str(conf_folder().resolve()), config_name="config")(_job)
    there = nearest_there(line.folder)
    try:
        job()
    except JobFailed as failed:
        if isinstance(failed.error, UserError):
            RunFolder(failed.folder).take_back(there)
        raise failed.error from None
    except OSError as error:  # Hydra makes the folder; what a job raises is a JobFailed
        if line.sweep is not None:
            raise
        raise cannot_be_written(line.folder, error, "hydra.run.dir") from None
    return 0


def _check_folder(line: CommandLine) -> None:
    """Refuse to mix a run and a sweep in one folder. Raises UserError."""
    if line.sweep is not None and RunFolder(line.sweep).config.is_file():
        raise UserError(f"hydra.sweep.dir={line.sweep} holds a run, which would be mixed with a sweep: set another.")
    if line.sweep is None and (line.folder / _COMMAND).is_file():
        raise UserError(f"hydra.run.dir={line.folder} holds a sweep, which would be mixed with a run: set another.")


def _check_new_sweep(folder: Path, jobs: Sequence[Job]) -> None:
    """Refuse a sweep of which no job can start, such as one whose teacher is not there. Raises UserError."""
    from srnn.training.run import refuse_what_none_can_do

    runs = [RunFolder(path) for path in Sweep(folder, jobs).folders.values()]
    if not any(run.begun or run.finished for run in runs):  # else one could, and the others are not asked twice
        refuse_what_none_can_do(compose_settings(job.overrides) for job in jobs)


def _open_sweep(folder: Path, argv: Sequence[str]) -> None:
    try:
        write_atomically(folder / _COMMAND, f"{shlex.join(['srnn', *argv])}\n".encode(errors="surrogateescape"))
    except OSError as error:
        raise cannot_be_written(folder, error, "hydra.sweep.dir") from None


def _job(composed: DictConfig) -> float:
    """One job; returns what a sweeper can optimise: the best loss on the validation part."""
    of_hydra = HydraConfig.get()
    folder = Path(of_hydra.runtime.output_dir)
    # Relative paths are those of the folder where srnn was started, also with hydra.job.chdir=true.
    with chdir(of_hydra.runtime.cwd):
        if (wanted := str(composed.srnn.plugins)) != "off":  # a worker of a launcher has not loaded them
            folders = plugin_folders(wanted)
            register.load_plugins(folders)
            if folders:  # the run's config keeps what it used
                composed.srnn.plugins = str(folders[0])
        settings = settings_of(composed)
        if of_hydra.mode == RunMode.MULTIRUN:
            report = _sweep_job(settings, folder, Path(of_hydra.sweep.dir).name)
        else:
            report = _single_job(settings, folder)
    return float(report["scores"]["best"]["loss"])


def _single_job(settings: Settings, folder: Path) -> dict[str, Any]:
    from srnn.training.run import train

    try:
        return train(settings, folder)
    except Exception as error:
        raise JobFailed(error, folder) from error


def _sweep_job(settings: Settings, folder: Path, sweep: str) -> dict[str, Any]:
    """A job that may have been started before. What it prints, and its error, stay in its folder, wherever it runs."""
    from srnn.training.run import resume, train

    run, settings = RunFolder(folder), settings.located()
    run.error.unlink(missing_ok=True)
    one_at_a_time = HydraConfig.get().launcher._target_.endswith(".BasicLauncher")
    try:
        with logged(run.log, folder.name, bar=one_at_a_time):
            if identity_of(run.config) != identity(settings.as_dict()):
                report = train(settings, folder, sweep, command=["srnn", *HydraConfig.get().overrides.task])
            else:
                report = run.read_report() if run.finished else resume(folder)
        score, sparsity, seconds = outcome(report)
        console.print(f"{folder.name}: {score}, {sparsity} sparse, {seconds}", soft_wrap=True)
        return report
    except Exception as error:
        print(f"srnn: {folder}: {error}", file=sys.stderr)
        write_atomically(run.error, traceback.format_exc().encode(errors="surrogateescape"))
        raise
