"""The teacher of a run: read from another run's folder, one of its checkpoints, a packed file; or the run itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from srnn.audio import Features
from srnn.config.composing import read_settings
from srnn.config.settings import SELF, DistillConfig
from srnn.datasets.base import DataModule
from srnn.errors import UserError
from srnn.inference.packed_file import read
from srnn.inference.unpacking import unpack
from srnn.inference.weights import read_checkpoint, weights_of
from srnn.objectives import Objective
from srnn.objectives.teacher import Several, Teacher
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.training.cuda_graph import Graphed
from srnn.vocabulary import Vocabulary


def teacher_of(chosen: DistillConfig, objective: Objective, example: Tensor | None = None) -> Teacher | None:
    """The teacher that a config names; None if it names none.

    Args:
        chosen: the config.
        objective: of the run that is taught.
        example: inputs of the shape that most batches have, to replay the teacher from a CUDA graph; None calls it
            plainly.

    Raises:
        UserError: there is no network, or it is of other data, or the objective cannot learn from one.
    """
    if not chosen.teacher:
        return None
    if type(objective).imitation is Objective.imitation:
        raise UserError(
            f"distill.teacher={chosen.teacher}: the objective {objective.data.objective} has no `imitation`, so it "
            f"cannot learn from a teacher."
        )
    own = chosen.teacher == SELF
    names = [chosen.teacher] if isinstance(chosen.teacher, str) else chosen.teacher
    models = [copy.deepcopy(objective.model) if own else _read_network(name, objective.data) for name in names]
    for name, model in zip(names, models, strict=True):
        _check_steps(name, model, objective.model)
    model, carried = (models[0], objective.carried) if len(models) == 1 else (Several(models), _each(objective.carried))
    call = Graphed(model, example) if example is not None else None
    teacher = Teacher(model, carried, chosen.temperature, chosen.weight, call)
    teacher.ready = not own
    return teacher


def _each(carried: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """What several networks carry to the next batch."""

    def all_of(states: tuple[Any, ...]) -> tuple[Any, ...] | None:
        kept = tuple(carried(state) for state in states)
        return None if all(state is None for state in kept) else kept

    return all_of


class OwnTeacher(pl.Callback):
    """Makes the best network before pruning the teacher of what is pruned from then on (``distill.teacher=self``).

    Args:
        teacher: waits for the weights it teaches with.
        is_dense: whether no weight has been masked yet.
        path: the best checkpoint taken until then.
    """

    def __init__(self, teacher: Teacher, is_dense: Callable[[], bool], path: Path) -> None:
        self.teacher = teacher
        self.is_dense = is_dense
        self.path = path

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Start to teach with the first batch after the last dense step; in a resumed run at once."""
        if self.teacher.ready or self.is_dense():
            return
        self.teacher.model.load_state_dict(weights_of(read_checkpoint(self.path), self.path))
        self.teacher.ready = True


def check_own_teacher(prunes: bool, pruning_start: int, first_validation: int) -> None:
    """Raise UserError unless a network is validated before it is pruned, so that it can teach itself.

    Args:
        prunes: whether anything is pruned.
        pruning_start: the step up to which no weight is masked; 0 where none is ever dense.
        first_validation: the step after which it is validated for the first time.
    """
    if not prunes:
        raise UserError(
            "distill.teacher=self: the dense network teaches the one that is pruned from it, and this run prunes "
            "nothing: choose a pruning method, or name another teacher."
        )
    if pruning_start < first_validation:
        raise UserError(
            f"distill.teacher=self: nothing is validated before pruning, which starts after step {pruning_start}; the "
            f"first validation is after step {first_validation}. Start later (pruning.start_itr) with a method that "
            f"prunes while training, or name another teacher."
        )


def _read_network(given: str, data: DataModule) -> nn.Module:
    path = Path(given).expanduser()
    if path.is_dir():
        run = RunFolder(path)
        found = [file for file in (run.packed, run.best) if file.is_file()]
        if not found:
            raise UserError(
                f"distill.teacher={given}: this folder is no finished run: it has no packed file.{run.how_to_finish}"
            )
        run.warn_unless_finished("distill.teacher")
        path = found[0]
    if not path.is_file():
        raise UserError(
            f"distill.teacher={given}: no such file; give a run's folder, one of its checkpoints, or a packed file. A "
            f"preset's first lines have the command that trains its teacher; distill.teacher=null learns without one."
        )
    if path.suffix == ".safetensors":
        packed = read(path)
        _check_data(given, packed.supplied, packed.vocabulary, data)
        _check_features(given, packed.about.get("dataset"), data)
        return unpack(packed)
    return _of_checkpoint(given, path, data)


def _of_checkpoint(given: str, path: Path, data: DataModule) -> nn.Module:
    """The network of a run's checkpoint, which its folder's config describes."""
    config = RunFolder(path.resolve().parent.parent).config
    if not config.is_file():
        raise UserError(
            f"distill.teacher={given}: a checkpoint alone does not say which network it is of: give one in a run's "
            f"folder, the folder itself, or a packed file."
        )
    checkpoint = read_checkpoint(path)
    vocabulary = checkpoint.get("vocabulary")
    _check_data(given, data.sizes, Vocabulary.from_dict(vocabulary) if vocabulary else None, data)
    settings = read_settings(config)
    _check_features(given, settings.dataset, data)
    with torch.random.fork_rng(devices=[]):  # its initial weights, which are replaced, take no numbers from the run
        model: nn.Module = register.build("model", settings.model, **data.sizes)
    try:
        model.load_state_dict(weights_of(checkpoint, path))
    except RuntimeError as error:
        raise UserError(
            f"distill.teacher={given}: it is of other data: {str(error).splitlines()[-1].strip()}"
        ) from None
    return model


def _check_data(given: str, sizes: Mapping[str, Any], vocabulary: Vocabulary | None, data: DataModule) -> None:
    """Raise UserError unless the teacher's inputs and outputs mean what this run's do."""
    if dict(sizes) != dict(data.sizes):
        raise UserError(
            f"distill.teacher={given}: it is of other data: its sizes are {dict(sizes)}, this run's {data.sizes}."
        )
    if data.vocabulary is not None and (vocabulary is None or vocabulary.to_dict() != data.vocabulary.to_dict()):
        raise UserError(
            f"distill.teacher={given}: its vocabulary is not this run's: train on the text that it was trained on, or "
            f"take its vocabulary by starting from it (init_from={given})."
        )


def _check_features(given: str, dataset: object, data: DataModule) -> None:
    """Raise UserError if the teacher reads sound in another form."""
    ours, theirs = getattr(data, "audio", None), Features.of(dataset)
    if ours is not None and theirs != ours:
        named = [f"dataset.features={each.kind} dataset.normalise={each.normalise}" for each in (theirs, ours) if each]
        raise UserError(f"distill.teacher={given}: it is of other data: it has {' and this run has '.join(named)}.")


def _check_steps(given: str, teacher: nn.Module, model: nn.Module) -> None:
    """Raise UserError if the two say something at other steps: what each says is compared step by step."""
    frames = torch.arange(1, 101)
    both: list[Any] = [network for network in (teacher, model) if hasattr(network, "output_lengths")]
    counts = [network.output_lengths(frames) for network in both]
    if len(counts) == 2 and not torch.equal(*counts):
        theirs, ours = (int(count[-1]) for count in counts)
        raise UserError(
            f"distill.teacher={given}: it gives {theirs} outputs for 100 frames, this run's network {ours}: a teacher "
            f"must have as many steps as its student."
        )
