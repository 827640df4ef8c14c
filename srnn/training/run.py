"""One run: open its folder, prepare, fit, pack, check, report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from srnn.config.composing import read_settings
from srnn.config.settings import Settings, teachers_of
from srnn.errors import UserError, cannot_be_written
from srnn.files import write_atomically
from srnn.inference.weights import read_weights
from srnn.interrupts import interruptible
from srnn.kernels import Kernel
from srnn.recording import environment
from srnn.recording.console import print_folder, print_report, print_way_back, print_ways_on
from srnn.recording.plots import plot_run
from srnn.recording.recorder import Recorder
from srnn.recording.report import build_report, milestones, recurrent_matrix, run_beside, transcripts
from srnn.recording.summary import summary_of
from srnn.recording.wandb import carefully, define_scores, log_results, wandb_run
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.terminal import console
from srnn.training.fitting import check_devices, fit, quiet
from srnn.training.preparing import Run, prepare
from srnn.training.processes import Place
from srnn.training.prune_only import prune_only
from srnn.training.verifying import pack_and_verify, rehearse, score


def train(
    settings: Settings, folder: Path, group: str | None = None, command: Sequence[str] | None = None
) -> dict[str, Any]:
    """Do a whole run and return its report.

    Args:
        settings: the checked config.
        folder: the run's folder; made if needed.
        group: the sweep the run belongs to.
        command: what to record as the command that started it; None takes that of this process.

    Raises:
        UserError: the data or the schedule cannot be used, or the folder cannot be written or is in use.
        KeyboardInterrupt: the user stopped it; the folder holds the last checkpoint.
    """
    tracking = replace(settings.tracking, group=settings.tracking.group or group)
    settings = replace(settings, tracking=tracking).located()
    home = RunFolder(folder)
    if home.begun:
        raise UserError(f"{folder} holds a run already, which would be mixed with this one; set another hydra.run.dir.")
    with ExitStack() as stack:
        try:
            stack.enter_context(home.locked())
            write_atomically(home.config, OmegaConf.to_yaml(settings.as_dict()).encode())
            environment.write_environment(
                home, environment.environment(command or ["srnn", *sys.argv[1:]], settings.as_dict())
            )
        except OSError as error:
            raise cannot_be_written(folder, error, "hydra.run.dir") from None
        return _run(settings, home, None)


def resume(folder: Path) -> dict[str, Any]:
    """Resume a run that was stopped, as it was configured, and return its report.

    Raises:
        UserError: the folder holds no run, or one that is finished or still trains, or its files are damaged.
    """
    home = RunFolder(folder)
    if not home.config.is_file():
        raise UserError(f"resume: {folder}: no run is there: it has no config.yaml.")
    if home.finished:
        with suppress(UserError, OSError), home.locked():  # takes away what a kill after the report left
            pass
        raise UserError(
            f"resume: {folder}: this run is finished. "
            f"To train its network further, start a run with init_from={folder}."
        )
    home = RunFolder(folder.resolve())
    with ExitStack() as stack:
        try:
            stack.enter_context(home.locked())
        except OSError as error:
            raise UserError(f"resume: {folder}: this folder cannot be written: {error.strerror}.") from None
        settings = read_settings(home.config)
        if not environment.read_environment(home):
            environment.write_environment(
                home, environment.environment(["srnn", "resume", str(folder)], settings.as_dict())
            )
        with environment.started_in(home):
            return _run(settings, home, _last_checkpoint(home))


def refuse_what_none_can_do(jobs: Iterable[Settings]) -> None:
    """Prepare one job after another until one can be: a mistake that all share is told before the first is started.

    Args:
        jobs: of a sweep.

    Raises:
        UserError: what the first job says, where each of them is refused.
    """
    first: UserError | None = None
    for settings in jobs:
        try:
            _prepared(settings.located(), None)
            return
        except UserError as error:
            first = first or error
        except Exception:  # of this job alone, perhaps: it is told when the job runs, and stops no other
            return
    if first is not None:
        raise first


def _prepared(settings: Settings, checkpoint: Path | None) -> Run:
    """What a run is, once devices and kernel are known to be there."""
    quiet()
    place = Place.first(settings.trainer.devices)
    check_devices(settings.trainer, place)
    _check_kernel(settings.kernel)
    return prepare(settings, place, checkpoint)


def _last_checkpoint(folder: RunFolder) -> Path | None:
    """What a stopped run is resumed from; None, and a word on it, if there is nothing."""
    if folder.last.exists():
        return folder.last
    others = ", ".join(sorted(path.name for path in folder.checkpoints.glob("*.ckpt")))
    last = folder.last.relative_to(folder.path)
    why = f"{last} is not there, only {others}" if others else "It was stopped before its first checkpoint"
    console.print(f"{why}: it starts from the beginning.")
    return None


def _run(settings: Settings, folder: RunFolder, checkpoint: Path | None) -> dict[str, Any]:
    """A run from the beginning, or from a checkpoint of its own."""
    began = time.perf_counter()
    run = _prepared(settings, checkpoint)
    environment.record_data(folder, run.data)
    rehearse(run, folder)
    print_folder(folder)
    tags = [run.config[group]["name"] for group in ("model", "dataset", "pruning")]
    with wandb_run(run.tracking, folder.path, run.config, "train", tags) as wandb:
        if wandb is not None:
            with carefully("which scores count"):
                define_scores(wandb, run.data.objective)
        try:
            with interruptible():
                recorder = fit(run, folder, wandb) if run.trainer.epochs else prune_only(run, folder, wandb)
                report = _finish(run, folder, recorder)
                report["seconds"]["total"] = time.perf_counter() - began
                matrix = recurrent_matrix(run.model, recorder.pruner)
                plots = plot_run(folder, report["phases"], report["layers"], matrix, run.objective.loss_name)
                write_atomically(folder.report, json.dumps(report, indent=2).encode())
        except KeyboardInterrupt:
            print_way_back(folder)
            raise
        if wandb is not None:
            tables = {"layers": report["layers"], "examples": transcripts(report)}
            log_results(wandb, folder, summary_of(report), tables, plots)
    print_report(report)
    print_ways_on(folder, run.data)
    return report


def _finish(run: Run, folder: RunFolder, recorder: Recorder) -> dict[str, Any]:
    """Pack the best network, score it from its file, and say what became of the run."""
    if not folder.best.exists():
        raise UserError(f"no checkpoint reached the sparsity asked for; see {folder.metrics}.")
    run.model.load_state_dict(read_weights(folder.best))
    packed = pack_and_verify(run, folder)
    test_scores, latency = score(run, packed)
    scores = milestones(recorder.validations) | test_scores
    packed_bytes = folder.packed.stat().st_size
    report = build_report(run.config, run.data.objective, run.model, packed, packed_bytes, scores, recorder)
    token = run.data.vocabulary.level.removesuffix("s") if run.data.vocabulary else None
    learned_from = next(iter(teachers_of(run.config["distill"]["teacher"])), run.config["init_from"])
    return (
        report
        | {"latency": latency, "init_from": run.match, "limits": dict(run.data.limits), "token": token}
        | {
            "unit": run.data.unit,
            "left_out": run.data.left_out,
            "beside": run_beside(learned_from, folder),
        }
    )


def _check_kernel(config: Mapping[str, Any]) -> None:
    """Refuse now, and not after the training, a backend that cannot run the packed model."""
    kernel: Kernel = register.build("kernel", config)
    cpu = torch.device("cpu")  # where the packed network is checked and scored
    reason = kernel.supports(None, cpu)
    if reason is not None:
        raise UserError(f"kernel={config['name']} cannot run on the {cpu}: {reason}.")
