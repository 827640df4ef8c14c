"""Preparing: a config -> the run it describes, built once. After it no function takes a config."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf
from torch import Tensor, nn

from srnn.config.settings import SELF, PackedConfig, Settings, TrackingConfig, TrainerConfig
from srnn.datasets.base import DataModule
from srnn.errors import UserError
from srnn.files import expanded
from srnn.inference.packed_file import read
from srnn.inference.packing import PackedModel
from srnn.inference.weights import read_checkpoint, read_weights, weights_of
from srnn.kernels import Kernel
from srnn.meta_device import TooMuchError, memory_here, within_memory
from srnn.objectives import Objective
from srnn.pruning.methods import PruningMethod
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import RunLength
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.terminal import console
from srnn.training.cuda_graph import Graphed
from srnn.training.init_vocabulary import TokenRows, read_tokens, unread
from srnn.training.moments import Moments
from srnn.training.processes import Place
from srnn.training.running_averages import RunningAverage
from srnn.training.start_from import Initial, check_recurrence, load_weights, read_initial
from srnn.training.step_size import attach
from srnn.training.teaching import check_own_teacher, teacher_of
from srnn.vocabulary import ORDER, UNKNOWN, Vocabulary


@dataclass(frozen=True)
class Run:
    """All that a run is.

    Attributes:
        config: the whole config as plain data, as ``config.yaml`` has it.
        data: the data set, read, with this rank's rows.
        model: the network, with the weights that training starts from.
        method: the pruning method.
        kernel: the backend that will run the packed network.
        objective: the Lightning module that trains the model on the data.
        length: optimiser steps, and those of an epoch; one step in a run without training, which takes none.
        trainer, tracking, packed: options of the loop, of W&B, of the packed file.
        place: which of the run's processes this is.
        reference: a dense model's weights by name, for a method that wants one.
        match: what was taken from ``init_from``; None without.
        checkpoint: what a resumed run starts from; None for a new one.
        averaging: what averages the weights; None for the weights as they are.
    """

    config: Mapping[str, Any]
    data: DataModule
    model: nn.Module
    method: PruningMethod
    kernel: Kernel
    objective: Objective
    length: RunLength
    trainer: TrainerConfig
    tracking: TrackingConfig
    packed: PackedConfig
    place: Place = field(default_factory=Place)
    reference: Mapping[str, Tensor] | None = None
    match: Mapping[str, Any] | None = None
    checkpoint: Path | None = None
    averaging: RunningAverage | None = None

    @property
    def seed(self) -> int:
        """Fixes all that is random."""
        return int(self.config["seed"])

    def pruner(self) -> Pruner:
        """The pruner that the run starts with. Raises UserError if its schedule cannot run."""
        return Pruner(self.model, self.method, self.length, reference=self.reference)


def prepare(settings: Settings, place: Place | None = None, checkpoint: Path | None = None) -> Run:
    """Build all that a run is, the same in every rank but for its rows of each batch.

    Random draws: the seed is set first; then the data may draw, then the model's initial weights.

    Args:
        settings: the checked config.
        place: of this process among the run's; None for the only one.
        checkpoint: of the same run, to resume from.

    Raises:
        UserError: data, network, pruning or kernel cannot be used as they are configured.
    """
    place = place or Place()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    method: PruningMethod = register.build("pruning", settings.pruning)
    _check_training(settings, method)
    reference = _reference(method, settings.pruning)
    initial, rows = _initial(settings) if checkpoint is None else (None, None)
    data = build_data(settings.dataset, _vocabulary(initial, checkpoint))
    _limit(data, settings.trainer)
    data.share(place.rank, place.count)
    model = _build_model(settings.model, data.sizes)
    match = _start_from(model, initial, settings, rows, data) if initial else None
    if checkpoint is not None:  # for methods that look at the weights
        _go_on_from(model, checkpoint)
    example = data.batches("train").fetch(0, 0)[0] if settings.trainer.cuda_graph else None
    call = Graphed(model, example) if example is not None else None
    objective: Any = register.get("objective", data.objective).factory
    run = Run(
        config=settings.as_dict(),
        data=data,
        model=model,
        method=method,
        kernel=register.build("kernel", settings.kernel),
        objective=objective(model, settings.optimizer, data, call),
        length=_length(data, settings.trainer),
        trainer=settings.trainer,
        tracking=settings.tracking,
        packed=settings.packed,
        place=place,
        reference=reference,
        match=match,
        checkpoint=checkpoint,
    )
    run.pruner()  # a first look: from now on the method knows its steps; the callback makes the pruner that counts
    moments, batches = Moments.of(method, run.length), len(data.train_dataloader())
    if settings.distill.teacher == SELF:
        check_own_teacher(bool(method.layer_types), moments.pruning_start, round(run.length.steps_per_epoch))
    schedule = register.build("schedule", settings.schedule, moments=moments, batches=batches)
    run.objective.schedule = partial(attach, schedule) if schedule is not None else None
    run.objective.configure_optimizers()  # a first look, too: nothing of it is kept
    run.objective.teacher = teacher_of(settings.distill, run.objective, example)
    return replace(run, averaging=register.build("averaging", settings.averaging, moments=moments))


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, read back from its packed file: what it takes to score or export it.

    Attributes:
        packed: the network.
        data: the data set it was trained on, read.
        objective: the class that scores it.
    """

    packed: PackedModel
    data: DataModule
    objective: type[Objective]


def read_back(path: Path) -> TrainedRun:
    """The run of a packed file. Raises UserError if the file does not say which data it is of.

    Sets the run's seed, as ``prepare`` did: data may be drawn at random, and the order of training data is.
    """
    packed = read(path)
    if not isinstance(packed.about.get("dataset"), Mapping):
        raise UserError(f"{path} does not say which data it was trained on.")
    if (seed := _seed_of(packed, path)) is not None:
        pl.seed_everything(seed, workers=True, verbose=False)
    data = build_data(packed.about["dataset"], packed.vocabulary, from_file=True)
    objective: Any = register.get("objective", data.objective).factory
    return TrainedRun(packed, data, objective)


def _seed_of(packed: PackedModel, path: Path) -> int | None:
    """The seed of a packed file's run; of a file that does not say it, as older ones, the one in the run's config."""
    seed = packed.about.get("seed")
    if "seed" not in packed.about:
        with suppress(Exception):  # a config that is not there, or was damaged since
            seed = OmegaConf.load(RunFolder(path.parent).config).seed
    return seed if type(seed) is int and 0 <= seed < 2**32 else None


def build_data(config: Mapping[str, Any], vocabulary: Vocabulary | None = None, from_file: bool = False) -> DataModule:
    """A data set of its config, read.

    Args:
        config: its name and options.
        vocabulary: a trained network's own.
        from_file: whether the config comes out of a packed file, which may be anybody's.
    """
    data: DataModule = register.build("dataset", config)
    data.from_file = from_file
    data.setup(vocabulary=vocabulary)
    return data


def _vocabulary(initial: Initial | None, checkpoint: Path | None) -> Vocabulary | None:
    """The vocabulary of the network that is trained further, if there is one."""
    if checkpoint is not None and "vocabulary" in (saved := read_checkpoint(checkpoint)):
        try:
            return Vocabulary.from_dict(saved["vocabulary"])
        except ValueError as error:
            raise UserError(f"{checkpoint} is damaged: {error}.") from None
    return initial.vocabulary if initial else None


def _check_training(settings: Settings, method: PruningMethod) -> None:
    """Refuse a run without training that needs some. Raises UserError."""
    if settings.trainer.epochs:
        return
    if method.needs_training:
        raise UserError(
            f"trainer.max_epochs=0 trains nothing, and pruning={settings.pruning['name']} prunes while a network "
            f"trains: to prune a trained one as it is, `srnn prune init_from=FILE pruning.sparsity=0.9`."
        )
    if not settings.init_from:
        raise UserError("trainer.max_epochs=0 trains nothing: name the trained network, init_from=FILE.")


def _reference(method: PruningMethod, config: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The dense weights that a method wants to see; of a run's folder those of its network. Raises UserError."""
    if not (given := method.reference_path):
        return None
    path = expanded(given)
    if path.is_dir():
        run = RunFolder(path)
        path = next((file for file in (run.best, run.packed) if file.is_file()), path)
    if not path.is_file():
        option = next((key for key, value in config.items() if value == given), "reference")
        raise UserError(
            f"pruning.{option}={given}: no such checkpoint or packed file; give one of a dense run, or its folder."
        )
    return read_weights(path)


def _go_on_from(model: nn.Module, checkpoint: Path) -> None:
    saved = read_checkpoint(checkpoint)
    if "current_model_state" in saved:  # there where `state_dict` is an average
        saved = {"state_dict": saved["current_model_state"]}
    try:
        model.load_state_dict(weights_of(saved, checkpoint))
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit the network of its run: {' '.join(str(error).split())}") from None


def _limit(data: DataModule, trainer: TrainerConfig) -> None:
    if trainer.limit_train_batches is not None:
        data.limits["train"] = trainer.limit_train_batches
    if trainer.limit_eval_batches is not None:
        data.limits |= {"valid": trainer.limit_eval_batches, "test": trainer.limit_eval_batches}


def _length(data: DataModule, trainer: TrainerConfig) -> RunLength:
    steps = -(-len(data.train_dataloader()) // trainer.accumulate_grad_batches)
    return RunLength(max(1, steps * trainer.epochs), steps)


def _build_model(config: Mapping[str, Any], sizes: Mapping[str, int]) -> nn.Module:
    there = memory_here()
    try:
        with within_memory(0.75 * there):  # masks need a byte for each weight of four, to train it needs more
            model: nn.Module = register.build("model", config, **sizes)
    except (RuntimeError, TooMuchError) as error:
        if not isinstance(error, TooMuchError) and "allocate" not in str(error):
            raise
        lower = " or model.".join(key for key in ("hidden_size", "num_layers") if key in config)
        raise UserError(
            f"model={config['name']} does not fit into memory, {there / 2**30:.0f} GB here: lower model.{lower}."
        ) from None
    return model


def _initial(settings: Settings) -> tuple[Initial | None, TokenRows | None]:
    """The network to start from, and the tokens of its rows where a file says so. Raises UserError."""
    if not settings.init_from:
        given = {"init_map": settings.init_map, "init_vocabulary": settings.init_vocabulary}
        for key, value in given.items():
            if value:
                raise UserError(f"{key}={value} is about the network to start from: name it, init_from=FILE.")
        return None, None
    initial = read_initial(settings.init_from)
    if not settings.init_vocabulary:
        return initial, None
    if initial.vocabulary is not None:
        raise UserError(f"init_vocabulary: {initial.path} has a vocabulary of its own; leave it out.")
    rows = read_tokens(settings.init_vocabulary, settings.dataset.get("level"))
    return replace(initial, vocabulary=rows.vocabulary), rows


def _start_from(
    model: nn.Module, initial: Initial, settings: Settings, rows: TokenRows | None, data: DataModule
) -> dict[str, Any]:
    unknown = rows.check(data, settings.init_partly) if rows else unread(data) if initial.vocabulary else None
    match = load_weights(model, initial, settings.init_partly, settings.init_map, rows)
    check_recurrence(initial, match, model, settings.model)
    vocabulary = data.vocabulary
    console.print(f"init_from {initial.path}: {match.lines()[0]}", soft_wrap=True)
    for line in match.lines()[1:]:
        console.print(f"  {line}", soft_wrap=True)
    if unknown:
        console.print(f"  {unknown}", soft_wrap=True)
    # Bytes have one order only.
    if initial.vocabulary is None and vocabulary is not None and vocabulary.level != "bytes":
        console.print(
            f"  warning: the file has no vocabulary, so row n of its embedding is taken for token n of this text (0 is "
            f"{UNKNOWN}, then {ORDER[vocabulary.level]}). If it was trained with another order, its scores are wrong: "
            f"init_vocabulary=FILE says the order.",
            soft_wrap=True,
            markup=False,
        )
    return {"path": str(initial.path), **vars(match)}
