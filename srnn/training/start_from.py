"""Starting from an existing network: ``init_from``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.weights import read_checkpoint, read_packed_or_plain, weights_of
from srnn.run_folder import RunFolder
from srnn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Initial:
    """An existing network: its weights by name, and its vocabulary if it is known."""

    path: Path
    weights: dict[str, Tensor]
    vocabulary: Vocabulary | None


@dataclass
class Match:
    """What became of the weights of a file.

    Attributes:
        loaded: names that are the same in both.
        renamed: the model's name -> the file's.
        fresh: weights of the model that the file does not have in this shape; they start as always.
        unused: weights of the file that the model has no place for.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"{len(self.loaded) + len(self.renamed)} weights loaded"]
        shown += [f"{name}: taken from {source}" for name, source in self.renamed.items()]
        shown += [f"{name}: not there, starts anew" for name in self.fresh]
        return shown + [f"{name}: has no place in this model" for name in self.unused]


def read_initial(path: str) -> Initial:
    """Read a checkpoint, a packed file, a plain ``state_dict`` file, or the best checkpoint of a run's folder.

    Raises:
        UserError: no such file, or none of these.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        run = RunFolder(file)
        found = [path for path in (run.best, run.packed) if path.is_file()]
        if not found:
            raise UserError(f"init_from={path}: this folder is no finished run: it has no best checkpoint.")
        file = found[0]
    if not file.is_file():
        raise UserError(f"init_from={path}: no such file; give a checkpoint, a packed file or a state_dict.")
    if file.suffix == ".safetensors":
        return Initial(file, *read_packed_or_plain(file))
    checkpoint = read_checkpoint(file)
    vocabulary = checkpoint.get("vocabulary")
    return Initial(file, weights_of(checkpoint, file), Vocabulary.from_dict(vocabulary) if vocabulary else None)


@torch.no_grad()
def load_weights(model: nn.Module, initial: Initial) -> Match:
    """Copy into the model what fits: by name and shape, else the only weight of that last name and shape in both.

    Raises:
        UserError: nothing fits.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    left = dict(initial.weights)
    match = Match()
    for name, parameter in parameters.items():
        if name in left and left[name].shape == parameter.shape:
            parameter.copy_(left.pop(name))
            match.loaded.append(name)
    for name in (n for n in parameters if n not in match.loaded):
        here = [n for n in parameters if n not in match.loaded and _alike(n, parameters, name, parameters)]
        there = [n for n in left if _alike(n, left, name, parameters)]
        if len(here) == len(there) == 1:
            match.renamed[name] = there[0]
        else:
            match.fresh.append(name)
    for name, source in match.renamed.items():
        parameters[name].copy_(left.pop(source))
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    match.unused = [name for name in left if name not in tied]
    if not match.loaded and not match.renamed:
        some = ", ".join(f"{name} {_shape(weight)}" for name, weight in list(initial.weights.items())[:6])
        raise UserError(
            f"init_from={initial.path}: none of its weights fits the model; it has {some or 'none'}, and the model "
            f"{', '.join(f'{name} {_shape(p)}' for name, p in list(parameters.items())[:6])}."
        )
    return match


def _alike(name: str, weights: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> bool:
    same_name = name.rpartition(".")[2] == other.rpartition(".")[2]
    return same_name and weights[name].shape == others[other].shape


def _shape(weight: Any) -> str:
    return "x".join(map(str, weight.shape))
