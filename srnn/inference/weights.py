"""Weights that others wrote: checkpoints, ``state_dict`` files, packed and plain safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srnn.errors import UserError
from srnn.inference.packed_file import read
from srnn.vocabulary import Vocabulary


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights under the model's own names, from a packed file, a checkpoint or a plain ``state_dict`` file.

    Raises:
        UserError: no such file, or none of these.
    """
    if path.suffix == ".safetensors":
        return read_packed_or_plain(path)[0]
    return weights_of(read_checkpoint(path), path)


def read_packed_or_plain(path: Path) -> tuple[dict[str, Tensor], Vocabulary | None]:
    """Weights and vocabulary of a packed file; of any other safetensors file the weights. Raises UserError."""
    try:
        with safe_open(path, framework="pt") as file:
            if "srnn" not in (file.metadata() or {}):
                return {_plain(name): file.get_tensor(name) for name in file.keys()}, None  # noqa: SIM118
    except (SafetensorError, OSError):
        pass  # `read` says what is wrong
    packed = read(path)
    return packed.state_dict(), packed.vocabulary


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint or ``state_dict`` file as it is, onto the CPU; no code in it is run.

    Raises:
        UserError: no such file, or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or packed file.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything, with advice that is not to be followed
        raise UserError(
            f"{path} is no checkpoint, or damaged, or holds more than weights ({type(error).__name__})."
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(loaded).__name__}, not weights by name.")
    return loaded


def weights_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint under the model's own names. Raises UserError if there are none."""
    state = checkpoint.get("state_dict", checkpoint)
    weights = {_plain(name): w for name, w in state.items() if isinstance(w, Tensor)} if hasattr(state, "items") else {}
    if not weights:
        raise UserError(f"{path} is no checkpoint: it holds no weights by name.")
    return weights


def _plain(name: object) -> str:
    """A weight's name without what wrappers put before it."""
    plain = str(name)
    while (head := plain.partition(".")[0]) in ("model", "module", "_orig_mod") and head != plain:
        plain = plain.partition(".")[2]
    return plain
