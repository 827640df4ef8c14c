"""One run: config -> train and prune -> pack -> read back -> report."""

from __future__ import annotations

import io
import json
import logging
import shlex
import sys
import time
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, Logger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import nn

import srnn
from srnn.bench.models import STEPS, latencies
from srnn.config import Settings
from srnn.datasets.text import Text, TextStreams
from srnn.deploy.packed import PackedModel, read_weights
from srnn.deploy.packed import read as read_packed
from srnn.deploy.packed import write as write_packed
from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.kernels import Auto, Dense, Kernel
from srnn.pruning.callback import PruningCallback
from srnn.pruning.methods import PruningMethod
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength
from srnn.registry import register
from srnn.tracking.console import RunProgress, console, print_report
from srnn.tracking.plots import plot_run
from srnn.tracking.record import BestWhile, Recorder
from srnn.tracking.report import build_report, milestones, recurrent_matrix, wandb_summary
from srnn.tracking.wandb import log_results, sync_command, wandb_logger
from srnn.training.next_token import NextToken, evaluate

CPU = torch.device("cpu")  # where the packed model is checked and scored
LOGGED_POINTS = 300  # about so many points of the training loss over a run
CALIBRATION_BATCHES = 20  # of validation data, for int8
# How far the outputs of sparse kernels may be from the dense modules' with the same weights, as a relative norm: both
# are off by rounding.
READ_BACK_TOLERANCE = 1e-4


class AtomicCheckpoints(TorchCheckpointIO):
    """Checkpoints that are written whole or not at all, so that a killed run leaves the last good one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Through memory, then into place."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


def train(settings: Settings, folder: Path, group: str | None = None) -> dict[str, Any]:
    """Do a whole run and return its report.

    Args:
        settings: the checked config.
        folder: the run's folder; made if needed.
        group: the sweep the run belongs to.

    Raises:
        UserError: the data or the schedule cannot be used, or the folder cannot be written.
        KeyboardInterrupt: the user stopped it; the folder holds the last checkpoint.
    """
    began = time.perf_counter()
    _quiet()
    _open_folder(folder, settings)
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    method: PruningMethod = register.build("pruning", settings.pruning)
    reference = read_weights(Path(method.reference_path)) if method.reference_path else None
    kernel = _build_kernel(settings)
    data: TextStreams = register.build("dataset", settings.dataset)
    data.setup()
    supplied = {"vocabulary_size": len(data.vocabulary)}
    model = _build_model(settings, supplied)
    # A first look at the schedule, before anything is started; the callback makes the pruner that counts.
    batches = min(len(data.train_dataloader()), settings.trainer.limit_train_batches or sys.maxsize)
    Pruner(model, method, RunLength(batches * settings.trainer.max_epochs, batches), reference=reference)
    ratio = data.tokens["train"] / data.characters["train"]
    module = NextToken(model, settings.optimizer, ratio, data.characters["valid"])
    pruning = PruningCallback(method, model, reference)
    recorder = Recorder(pruning)
    with wandb_logger(settings.tracking, folder, settings.as_dict(), group) as wandb:
        _fit(settings, folder, batches, data, module, pruning, recorder, wandb)
        best = folder / "checkpoints" / "best.ckpt"
        if not best.exists():
            raise UserError(f"no checkpoint reached the sparsity asked for; see {folder / 'metrics.csv'}.")
        model.load_state_dict(read_weights(best))
        packed = _pack(settings, folder, model, supplied, data)
        test_scores, latency = _score_packed(model, packed, kernel, data)
        scores = milestones(recorder.validations) | test_scores
        report = build_report(settings, folder, model, packed, scores, recorder) | {"latency": latency}
        report["seconds"]["total"] = time.perf_counter() - began
        write_atomically(folder / "report.json", json.dumps(report, indent=2).encode())
        plots = plot_run(folder, report["phases"], report["layers"], recurrent_matrix(model, method))
        if wandb is not None:
            log_results(wandb, wandb_summary(report), report["layers"], plots, folder / "model.safetensors")
    print_report(report)
    _print_ways_on(folder)
    return report


def _build_model(settings: Settings, supplied: dict[str, Any]) -> nn.Module:
    try:
        model: nn.Module = register.build("model", settings.model, **supplied)
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


def _quiet() -> None:
    """Lightning speaks of itself on every run; what matters to a user is in our own tables."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("srnn.kernels").setLevel(logging.WARNING)  # the report tells what was chosen
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*exists and is not empty.*"):
        warnings.filterwarnings("ignore", message)


def _open_folder(folder: Path, settings: Settings) -> None:
    if (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run already, which would be mixed with this one; set another hydra.run.dir.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(settings.as_dict()).encode())
        write_atomically(folder / "command.txt", f"{shlex.join(['srnn', *sys.argv[1:]])}\n".encode())
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be written: {error.strerror}; set hydra.run.dir=FOLDER."
        ) from None


def _trainer(**options: Any) -> pl.Trainer:
    try:
        return pl.Trainer(**options)
    except MisconfigurationException as error:
        raise UserError(f"trainer.accelerator={options['accelerator']} cannot be used here: {error}") from None


def _fit(
    settings: Settings,
    folder: Path,
    batches: int,
    data: TextStreams,
    module: NextToken,
    pruning: PruningCallback,
    recorder: Recorder,
    wandb: Logger | None,
) -> None:
    checkpoints = str(folder / "checkpoints")
    loggers = [CSVLogger(str(folder), name="", version=""), *([wandb] if wandb is not None else [])]
    trainer = _trainer(
        accelerator=settings.trainer.accelerator,
        devices=1,
        max_epochs=settings.trainer.max_epochs,
        gradient_clip_val=settings.trainer.gradient_clip_val,
        limit_train_batches=batches,
        logger=loggers,
        log_every_n_steps=max(1, batches * settings.trainer.max_epochs // LOGGED_POINTS),
        num_sanity_val_steps=0,
        enable_model_summary=False,
        callbacks=[
            pruning,
            recorder,
            RunProgress(pruning),
            BestWhile(recorder.is_dense, checkpoints, "best-dense"),
            BestWhile(recorder.is_finished, checkpoints, "best"),
            ModelCheckpoint(checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False),
        ],
        plugins=[AtomicCheckpoints()],
    )
    try:
        trainer.fit(module, datamodule=data)
    except SystemExit:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise
    module.model.to("cpu")


def _pack(
    settings: Settings, folder: Path, model: nn.Module, supplied: dict[str, Any], data: TextStreams
) -> PackedModel:
    """Write the packed file, read it back, and make sure that it is the model."""
    # The path as the data set understood it, absolute, so that it is found from any folder.
    dataset = settings.dataset | ({"path": data.path} if isinstance(data, Text) else {})
    about = {"dataset": dataset, "pruning": settings.pruning, "srnn": srnn.__version__}

    def calibrate(network: nn.Module) -> None:
        for inputs_BT, _ in islice(data.val_dataloader(), CALIBRATION_BATCHES):
            network(inputs_BT)

    wanted = PackedModel.from_model(
        model, settings.model, supplied, settings.packed.values, settings.packed.structure, data.vocabulary, about,
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
    model: nn.Module, packed: PackedModel, kernel: Kernel, data: TextStreams
) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """The best checkpoint and its packed form on the whole test text, and how fast the packed form is."""
    dense, sparse = packed.build_sparse(Dense()), packed.build_sparse(kernel)
    inputs_BT, _ = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        wanted, got = packed.build()(inputs_BT)[0], sparse(inputs_BT)[0]
    error = float((got - wanted).norm() / wanted.norm())
    if not error <= max(READ_BACK_TOLERANCE, kernel.tolerance):
        raise RuntimeError(f"the sparse kernels' outputs are {error:.2g} away from the dense ones'")
    characters = data.characters["test"]
    scores = {
        "test": vars(evaluate(model, data.test_dataloader(), characters, CPU)),
        "test_packed": vars(evaluate(sparse, data.test_dataloader(), characters, CPU)),
    }
    latency: dict[str, Any] = latencies(
        {"torch": packed.build(), "best": dense, "sparse": sparse}, inputs_BT.reshape(-1)
    )
    for times in latency.values():  # torch's own network, or its layers by the dense backends: what is faster
        times["dense"] = min(times.pop("torch"), times.pop("best"))
    latency |= {"threads": torch.get_num_threads(), "steps": STEPS, "read_back_error": error}
    latency["choices"] = [str(choice) for choice in kernel.choices.values()] if isinstance(kernel, Auto | Dense) else []
    return scores, latency


def _print_ways_on(folder: Path) -> None:
    console.print(f"Everything is in {folder}", soft_wrap=True)
    console.print(f"Try it: srnn generate --run {folder} --prompt 'def f(x):'", soft_wrap=True)
    if command := sync_command(folder):
        console.print(f"Upload to W&B: {command}", soft_wrap=True)
