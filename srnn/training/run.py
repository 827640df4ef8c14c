"""One run: config -> train and prune -> pack -> read back -> report."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

import srnn
from srnn.config.settings import Settings
from srnn.datasets.base import DataModule
from srnn.errors import UserError, cannot_be_written
from srnn.files import write_atomically
from srnn.inference.latency import STEPS, latencies
from srnn.inference.packed_file import read as read_packed
from srnn.inference.packed_file import write as write_packed
from srnn.inference.packing import PackedModel
from srnn.inference.weights import read_checkpoint, read_weights
from srnn.kernels import Auto, Dense, Kernel
from srnn.objectives.base import Objective
from srnn.pruning.callback import PruningCallback
from srnn.pruning.methods import PruningMethod
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength
from srnn.recording import environment
from srnn.recording.console import RunProgress, print_report
from srnn.recording.metrics import MetricsFile, WandbCurves
from srnn.recording.plots import plot_run
from srnn.recording.recorder import BestWhile, Recorder
from srnn.recording.report import build_report, milestones, recurrent_matrix
from srnn.recording.summary import summary_of
from srnn.recording.wandb import carefully, define_scores, log_results, sync_command, wandb_run
from srnn.registry import register
from srnn.terminal import console
from srnn.training.checkpoints import LAST, AtomicCheckpoints, LastCheckpoint, stop_requests
from srnn.training.cuda_graph import Graphed
from srnn.training.processes import OwnRandomNumbers, Place, all_ranks
from srnn.training.start_from import Initial, load_weights, read_initial
from srnn.vocabulary import Vocabulary

CPU = torch.device("cpu")  # where the packed model is checked and scored
FIRST = ("config.yaml", environment.FILE)  # of a run's files: written before it is known whether it can start
LOGGED_POINTS = 300  # about so many points of the training loss over a run
CALIBRATION_BATCHES = 20  # of validation data, for int8
# How far the outputs of sparse kernels may be from the dense modules' with the same weights, as a relative norm: both
# are off by rounding.
READ_BACK_TOLERANCE = 1e-4


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
        UserError: the data or the schedule cannot be used, or the folder cannot be written.
        KeyboardInterrupt: the user stopped it; the folder holds the last checkpoint.
    """
    tracking = replace(settings.tracking, group=settings.tracking.group or group)
    settings = replace(settings, tracking=tracking)
    _open_folder(folder, settings, command or ["srnn", *sys.argv[1:]])
    return _run(settings, folder, None)


def resume(folder: Path) -> dict[str, Any]:
    """Go on with a run that was stopped, as it was configured, and return its report.

    Raises:
        UserError: the folder holds no run, or one that is finished, or its files are damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"resume={folder}: no run is there: it has no config.yaml.")
    if (folder / "report.json").is_file():
        raise UserError(
            f"resume={folder}: this run is finished. To train its network further, start a run with init_from={folder}."
        )
    settings = read_settings(folder)
    if not environment.read(folder):
        environment.note(folder, environment.environment(["srnn", f"resume={folder}"]))
    if not (folder / LAST).exists():
        others = ", ".join(sorted(path.name for path in (folder / LAST).parent.glob("*.ckpt")))
        why = f"{LAST} is not there, only {others}" if others else "It was stopped before its first checkpoint"
        console.print(f"{why}: it starts from the beginning.")
        return _run(settings, folder, None)
    return _run(settings, folder, folder / LAST)


def read_settings(folder: Path) -> Settings:
    """The config of a run's folder. Raises UserError if it is damaged."""
    path = folder / "config.yaml"
    try:
        config = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__}.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no options.")
    return Settings.check({str(key): value for key, value in config.items()})


def plan(settings: Settings) -> Pruner:
    """The pruner that a run of this config would start with, without training.

    Raises:
        UserError: the data or the schedule cannot be used.
    """
    method: PruningMethod = register.build("pruning", settings.pruning)
    reference = read_weights(Path(method.reference_path)) if method.reference_path else None
    initial = read_initial(settings.init_from) if settings.init_from else None
    data = _build_data(settings, initial, None)
    model = _build_model(settings, data.sizes)
    if initial:
        _start_from(model, initial)
    return Pruner(model, method, run_length(settings, data), reference=reference)


def run_length(settings: Settings, data: DataModule) -> RunLength:
    """Optimiser steps of a run."""
    steps = -(-len(data.train_dataloader()) // settings.trainer.accumulate_grad_batches)
    return RunLength(steps * settings.trainer.epochs, steps)


def follow(settings: Settings, folder: Path, place: Place, resumes: bool) -> None:
    """Train as a rank other than the first, for the run of this folder, and write nothing.

    Raises:
        UserError: the ranks have diverged, or cannot go on from this checkpoint.
        KeyboardInterrupt: all were asked to stop.
    """
    quiet()
    checkpoint = folder / LAST if resumes else None
    _fit(settings, folder, _prepare(settings, folder, checkpoint, place), None, checkpoint)


@dataclass(frozen=True)
class _Training:
    """What a process trains, and what watches it.

    Attributes:
        match: what came from ``init_from``.
    """

    place: Place
    method: PruningMethod
    module: Objective
    pruning: PruningCallback
    recorder: Recorder
    match: dict[str, Any] | None


def _prepare(settings: Settings, folder: Path, checkpoint: Path | None, place: Place) -> _Training:
    """All that training needs, the same in every rank but for its rows of each batch."""
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    method: PruningMethod = register.build("pruning", settings.pruning)
    reference = read_weights(Path(method.reference_path)) if method.reference_path else None
    initial = read_initial(settings.init_from) if settings.init_from and checkpoint is None else None
    data = _build_data(settings, initial, checkpoint)
    if place.rank == 0:
        environment.note_data(folder, data)
    data.share(place.rank, place.count)
    model = _build_model(settings, data.sizes)
    match = _start_from(model, initial) if initial else None
    if checkpoint is not None:  # for methods that look at the weights
        model.load_state_dict(read_weights(checkpoint))
    # A first look at the schedule, before anything is started; the callback makes the pruner that counts.
    length = run_length(settings, data)
    Pruner(model, method, length, reference=reference)
    call = Graphed(model, data.batches("train").fetch(0, 0)[0]) if settings.trainer.cuda_graph else None
    objective: Any = register.get("objective", data.objective).factory
    module: Objective = objective(model, settings.optimizer, data, call)
    pruning = PruningCallback(method, model, reference)
    recorder = Recorder(pruning, max(1, length.total_steps // LOGGED_POINTS))
    return _Training(place, method, module, pruning, recorder, match)


def _run(settings: Settings, folder: Path, checkpoint: Path | None) -> dict[str, Any]:
    """A run from the beginning, or from a checkpoint of its own."""
    began = time.perf_counter()
    quiet()
    place = Place.first(settings.trainer.devices)
    _check_devices(settings, place)
    kernel = _build_kernel(settings)
    training = _prepare(settings, folder, checkpoint, place)
    module, recorder = training.module, training.recorder
    model, data = module.model, module.data
    tags = [part["name"] for part in (settings.model, settings.dataset, settings.pruning)]
    with wandb_run(settings.tracking, folder, settings.as_dict(), "train", tags) as wandb:
        if wandb is not None:
            with carefully("which scores count"):
                define_scores(wandb, data.objective)
        try:
            _fit(settings, folder, training, wandb, checkpoint)
        except KeyboardInterrupt:
            console.print(f"Go on with it: srnn resume={folder}", soft_wrap=True)
            raise
        best = folder / "checkpoints" / "best.ckpt"
        if not best.exists():
            raise UserError(f"no checkpoint reached the sparsity asked for; see {folder / 'metrics.csv'}.")
        model.load_state_dict(read_weights(best))
        packed = _pack(settings, folder, model, data)
        test_scores, latency = _score_packed(type(module), model, packed, kernel, data)
        scores = milestones(recorder.validations) | test_scores
        report = build_report(settings, data.objective, folder, model, packed, scores, recorder) | {"latency": latency}
        report |= {"init_from": training.match, "limits": dict(data.limits)}
        report["seconds"]["total"] = time.perf_counter() - began
        plots = plot_run(folder, report["phases"], report["layers"], recurrent_matrix(model, training.method))
        # Last of the run's own files: it says that the run is finished.
        write_atomically(folder / "report.json", json.dumps(report, indent=2).encode())
        if wandb is not None:
            log_results(wandb, folder, summary_of(report), report["layers"], plots)
    print_report(report)
    _print_ways_on(folder, data)
    return report


def _build_data(settings: Settings, initial: Initial | None, checkpoint: Path | None) -> DataModule:
    """The data, with the vocabulary of the network that goes on, if there is one."""
    data: DataModule = register.build("dataset", settings.dataset)
    vocabulary = initial.vocabulary if initial else None
    if checkpoint is not None and "vocabulary" in (saved := read_checkpoint(checkpoint)):
        vocabulary = Vocabulary.from_dict(saved["vocabulary"])
    data.setup(vocabulary=vocabulary)
    if settings.trainer.limit_train_batches is not None:
        data.limits["train"] = settings.trainer.limit_train_batches
    if settings.trainer.limit_eval_batches is not None:
        data.limits |= {"valid": settings.trainer.limit_eval_batches, "test": settings.trainer.limit_eval_batches}
    return data


def _start_from(model: nn.Module, initial: Initial) -> dict[str, Any]:
    match = load_weights(model, initial)
    console.print(f"init_from {initial.path}: {match.lines()[0]}", soft_wrap=True)
    for line in match.lines()[1:]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    return {"path": str(initial.path), **vars(match)}


def _build_model(settings: Settings, sizes: dict[str, int]) -> nn.Module:
    try:
        model: nn.Module = register.build("model", settings.model, **sizes)
    except RuntimeError as error:
        if "allocate" not in str(error):
            raise
        raise UserError(f"model={settings.model['name']} does not fit into memory: lower model.hidden_size.") from None
    return model


def _build_kernel(settings: Settings) -> Kernel:
    """The backend that will run the packed model; refused now, not after the training, if it cannot."""
    kernel: Kernel = register.build("kernel", settings.kernel)
    reason = kernel.supports(None, CPU)
    if reason is not None:
        raise UserError(f"kernel={settings.kernel['name']} cannot run on the {CPU}: {reason}.")
    return kernel


def quiet() -> None:
    """Lightning speaks of itself on every run; what matters to a user is in our own tables."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("srnn.kernels").setLevel(logging.WARNING)  # the report tells what was chosen
    lightnings = (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*", ".*AccumulateGrad.*")
    for message in lightnings:
        warnings.filterwarnings("ignore", message)


def _open_folder(folder: Path, settings: Settings, command: Sequence[str]) -> None:
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run already, which would be mixed with this one; set another hydra.run.dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(settings.as_dict()).encode())
        environment.note(folder, environment.environment(command))
    except OSError as error:
        raise cannot_be_written(folder, error, "hydra.run.dir") from None


def take_back(folder: Path, there: Path) -> None:
    """Remove the folder of a run that was refused, and the parents made with it: as if it had not been started.

    Args:
        folder: the run's. It stays if it holds more than a run's first files.
        there: what was there of its path before the run; it stays, whatever it holds.
    """
    folder = Path(os.path.abspath(folder))
    if folder == there or not {path.name for path in folder.iterdir()} <= set(FIRST):
        return
    for name in FIRST:
        (folder / name).unlink(missing_ok=True)
    for made in itertools.takewhile(lambda path: path != there, (folder, *folder.parents)):
        try:
            made.rmdir()
        except OSError:  # something else has come into it
            return


def trainer_for(settings: Settings, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:
    """Lightning's Trainer of a config. Raises UserError for what cannot be used here."""
    chosen = settings.trainer
    try:
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
            **({"devices": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False} | options),
        )
    except MisconfigurationException as error:
        asked = f"trainer.accelerator={chosen.accelerator}"
        asked += f" trainer.devices={chosen.devices}" if chosen.devices > 1 else ""
        raise UserError(f"{asked} cannot be used here: {' '.join(str(error).split())}") from None
    _check_graph(settings, trainer)
    return trainer


def _fit(settings: Settings, folder: Path, training: _Training, wandb: Any, checkpoint: Path | None) -> None:
    """Train in all ranks. Rank 0 alone writes, logs and prints."""
    place, module, pruning, recorder = training.place, training.module, training.pruning, training.recorder
    checkpoints = str(folder / "checkpoints")
    metrics = MetricsFile(folder / "metrics.csv")
    first = place.rank == 0
    with stop_requests() as request:
        callbacks: list[pl.Callback] = [
            pruning,
            recorder,
            *([RunProgress(pruning)] if first else []),
            BestWhile(recorder.is_dense, checkpoints, "best-dense"),
            BestWhile(recorder.is_finished, checkpoints, "best"),
            LastCheckpoint(folder / LAST, settings.trainer.checkpoint_minutes, request, metrics),
            OwnRandomNumbers(settings.seed),
        ]
        trainer = trainer_for(
            settings,
            callbacks,
            logger=[metrics, *([WandbCurves(wandb)] if wandb is not None else [])],
            enable_checkpointing=True,
            enable_progress_bar=first,
            plugins=[AtomicCheckpoints()],
            **place.trainer_options(),
        )
        with all_ranks(folder, place, checkpoint is not None):
            try:
                trainer.fit(module, datamodule=module.data, ckpt_path=checkpoint, weights_only=True)
            except SystemExit:  # what Lightning makes of Ctrl-C
                if trainer.interrupted:
                    raise KeyboardInterrupt from None
                raise
    if pruning.pruner is None:  # it was stopped after its last step: there was nothing left to train
        pruning.on_train_start(trainer, module)
    module.model.to("cpu")


def _check_devices(settings: Settings, place: Place) -> None:
    """Before data are read and anything is written. Raises UserError."""
    chosen = settings.trainer
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
    trainer_for(settings, [], **place.trainer_options())


def _check_graph(settings: Settings, trainer: pl.Trainer) -> None:
    if not settings.trainer.cuda_graph:
        return
    if trainer.strategy.root_device.type != "cuda":
        raise UserError("trainer.cuda_graph=true needs a CUDA GPU, and this run is on the CPU: leave it at false.")
    if settings.trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"trainer.cuda_graph=true cannot add up gradients "
            f"(trainer.accumulate_grad_batches={settings.trainer.accumulate_grad_batches}): choose one of the two."
        )


def _pack(settings: Settings, folder: Path, model: nn.Module, data: DataModule) -> PackedModel:
    """Write the packed file, read it back, and make sure that it is the model."""
    about = {"dataset": data.located(settings.dataset), "pruning": settings.pruning, "srnn": srnn.__version__}

    def calibrate(network: nn.Module) -> None:
        for inputs, _ in itertools.islice(data.val_dataloader(), CALIBRATION_BATCHES):
            network(inputs)

    wanted = PackedModel.from_model(
        model, settings.model, data.sizes, settings.packed.values, settings.packed.structure, data.vocabulary, about,
        calibrate,
    )  # fmt: skip
    write_packed(folder / "model.safetensors", wanted)
    packed = read_packed(folder / "model.safetensors")
    weights, rounded = model.state_dict(), packed.state_dict()
    for name, weight in wanted.state_dict().items():
        if not torch.equal(rounded[name], weight):
            raise RuntimeError(f"{name} is not in the packed file as it was written")
    for name, matrix in packed.matrices.items():
        count = int((weights[name] != 0).sum())
        if matrix.structure == "element" and matrix.entries != count:
            raise RuntimeError(f"the packed file holds {matrix.entries} weights of {name}, not {count}")
    return packed


def _score_packed(
    objective: type[Objective], model: nn.Module, packed: PackedModel, kernel: Kernel, data: DataModule
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The best checkpoint and its packed form on the whole test part, and how fast the packed form is."""
    dense, sparse = packed.build_sparse(Dense()), packed.build_sparse(kernel)
    inputs, _ = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        wanted, got = packed.build()(inputs)[0], sparse(inputs)[0]
    error = float((got - wanted).norm() / wanted.norm())
    if not error <= max(READ_BACK_TOLERANCE, kernel.tolerance):
        raise RuntimeError(f"the sparse kernels' outputs are {error:.2g} away from the dense ones'")
    scores = {"test": objective.score(model, data, "test"), "test_packed": objective.score(sparse, data, "test")}
    stream_T = inputs.reshape(-1) if data.objective == "next_token" else inputs[0]
    latency: dict[str, Any] = latencies({"torch": packed.build(), "best": dense, "sparse": sparse}, stream_T)
    for times in latency.values():  # torch's own network, or its layers by the dense backends: what is faster
        times["dense"] = min(times.pop("torch"), times.pop("best"))
    latency |= {"threads": torch.get_num_threads(), "steps": min(STEPS, len(stream_T)), "read_back_error": error}
    latency["choices"] = [str(choice) for choice in kernel.choices.values()] if isinstance(kernel, Auto | Dense) else []
    return scores, latency


def _print_ways_on(folder: Path, data: DataModule) -> None:
    console.print(f"Everything is in {folder}", soft_wrap=True)
    if data.vocabulary is not None:
        console.print(f"Try it: srnn generate --run {folder} --prompt 'def f(x):'", soft_wrap=True)
    if command := sync_command(folder):
        console.print(f"Upload to W&B: {command}", soft_wrap=True)
