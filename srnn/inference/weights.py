"""Weights that others wrote: checkpoints, ``state_dict`` files, packed and plain safetensors files."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from srnn.errors import UserError
from srnn.files import named_in_utf8
from srnn.inference.packed_file import read
from srnn.inference.packing import PackedModel


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights under the model's own names, from a packed file, a checkpoint or a plain ``state_dict`` file.

    Raises:
        UserError: no such file, or none of these.
    """
    if path.suffix == ".safetensors":
        return read_packed_or_plain(path)[0]
    return weights_of(read_checkpoint(path), path)


def read_packed_or_plain(path: Path) -> tuple[dict[str, Tensor], PackedModel | None]:
    """Weights of a packed file and what it holds beside them; of any other safetensors file the weights alone.

    Raises:
        UserError: it is damaged.
    """
    weights = None
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            if "srnn" not in (file.metadata() or {}):
                weights = {_plain(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception:  # of safetensors or torch; `read` says what is wrong
        pass
    if weights is not None:
        _check_kinds(weights, path)
        return weights, None
    packed = read(path)
    return packed.state_dict(), packed


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint or ``state_dict`` file as it is, onto the CPU; no code in it is run.

    Raises:
        UserError: no such file, or damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or packed file.")
    try:
        _check_bits(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything, with advice that is not to be followed
        raise UserError(
            f"{path} is no checkpoint, or damaged, or holds more than weights ({type(error).__name__})."
        ) from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is no checkpoint: it holds a {type(loaded).__name__}, not weights by name.")
    return loaded


def _check_bits(path: Path) -> None:
    """Compare the checksums that torch writes into a file, and passes over when it reads one. Raises BadZipFile."""
    if not zipfile.is_zipfile(path):  # as before torch 1.6
        return
    with zipfile.ZipFile(path) as parts:
        if bad := parts.testzip():
            raise zipfile.BadZipFile(f"{bad} is not what was written")


def weights_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint under the model's own names.

    They are its ``state_dict``; else the tensors of the one other key that holds tensors by name, such as torch's
    tutorials' ``model_state_dict``; else those of the file itself.

    Raises:
        UserError: there are none, or several keys hold some.
    """
    parts = {str(key): part for key, part in checkpoint.items() if _is_weights(key, part)}
    if "state_dict" in checkpoint:
        parts = {key: part for key, part in parts.items() if key == "state_dict"}
    if len(parts) > 1:
        counted = ", ".join(f"{key} ({len(_tensors(part))} weights)" for key, part in parts.items())
        raise UserError(
            f"{path} holds several networks, or a network in parts: {counted}. Save the one that is meant alone: "
            f"torch.save(torch.load('{path.name}')['{next(iter(parts))}'], 'weights.pt')."
        )
    weights = _tensors(next(iter(parts.values()), {} if "state_dict" in checkpoint else checkpoint))
    if not weights:
        keys = ", ".join(str(key) for key in list(checkpoint)[:6]) or "nothing"
        raise UserError(f"{path} is no checkpoint: it holds no weights by name, but {keys}.")
    _check_kinds(weights, path)
    return weights


def _check_kinds(weights: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that no weight can be. Raises UserError."""
    for name, weight in weights.items():
        if weight.layout != torch.strided or weight.is_meta or weight.is_complex() or weight.is_quantized:
            kind = "meta" if weight.is_meta else str(weight.layout if weight.layout != torch.strided else weight.dtype)
            raise UserError(
                f"{path}: {name} is a {kind.removeprefix('torch.')} tensor: save it dense, of real numbers."
            )


def _is_weights(key: object, part: object) -> bool:
    # A module's own extra state may be a mapping, too, beside the weights of a plain file.
    return isinstance(part, Mapping) and not str(key).endswith("_extra_state") and bool(_tensors(part))


def _tensors(part: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {_plain(name): w for name, w in part.items() if isinstance(name, str) and isinstance(w, Tensor)}


def _plain(name: object) -> str:
    """A weight's name without what wrappers put before it."""
    plain = str(name)
    while (head := plain.partition(".")[0]) in ("model", "module", "_orig_mod") and head != plain:
        plain = plain.partition(".")[2]
    return plain
