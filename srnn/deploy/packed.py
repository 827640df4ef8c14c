"""The packed model file: non-zeros only, and all that rebuilds the model.

A safetensors file. A pruned matrix ``name`` is stored as ``name.values``, ``name.columns`` and
``name.row_pointers``; every other tensor under its own name, in fp32. The file's metadata has one key, ``srnn``: JSON
with the format's version, the model's config, the vocabulary, the shape and structure of each matrix, and a SHA-256
over all of it and every tensor. There is no code in it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.registry import register
from srnn.sparse import ElementMatrix, Values
from srnn.vocabulary import Vocabulary

FORMAT = 1
_PARTS = ("values", "columns", "row_pointers")


@dataclass(frozen=True)
class PackedModel:
    """A model as the packed file holds it.

    Attributes:
        model: the config that builds it, ``name`` and options.
        supplied: what a run supplied to build it, such as ``vocabulary_size``.
        matrices: name -> packed matrix.
        dense: name -> tensor left dense (biases, and matrices that packing would not shrink).
        vocabulary: of a language model; else None.
        about: free-form facts of the run (metrics, sparsity); plain data.
    """

    model: dict[str, Any]
    supplied: dict[str, Any]
    matrices: dict[str, ElementMatrix]
    dense: dict[str, Tensor]
    vocabulary: Vocabulary | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_state(
        cls,
        state: Mapping[str, Tensor],
        model: Mapping[str, Any],
        supplied: Mapping[str, Any],
        values: Values = "fp32",
        vocabulary: Vocabulary | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> PackedModel:
        """Pack a ``state_dict``: each matrix that gets smaller by it.

        Raises:
            UserError: a weight is not finite, or too large for fp16 values.
        """
        matrices, dense = {}, {}
        for name, tensor in state.items():
            weight = tensor.detach().cpu().float()
            if weight.ndim == 2 and (packed := _pack(name, weight, values)).nbytes < weight.nbytes:
                matrices[name] = packed
            else:
                dense[name] = weight.contiguous().clone()
        return cls(dict(model), dict(supplied), matrices, dense, vocabulary, dict(about or {}))

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, dense, fp32, under the model's own names."""
        return self.dense | {name: matrix.to_dense() for name, matrix in self.matrices.items()}

    def build(self) -> nn.Module:
        """The model with these weights, on torch's own dense modules, in eval mode.

        Raises:
            UserError: weights and config do not belong together.
        """
        with torch.device("meta"):  # no memory and no time for weights that are replaced at once
            module: nn.Module = register.build("model", self.model, **self.supplied)
        try:
            module.load_state_dict(self.state_dict(), assign=True)
        except RuntimeError as error:
            raise UserError(f"the packed weights do not fit the model they name: {error}") from None
        return module.eval()

    @property
    def nonzeros(self) -> dict[str, int]:
        """Matrix name -> stored entries."""
        return {name: matrix.nnz for name, matrix in self.matrices.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything the file stores, by the name it stores it under."""
        parts = {f"{name}.{part}": getattr(m, part) for name, m in self.matrices.items() for part in _PARTS}
        return self.dense | parts


def _pack(name: str, weight: Tensor, values: Values) -> ElementMatrix:
    try:
        return ElementMatrix.from_dense(weight, values)
    except ValueError as error:
        advice = "; use packed.values=fp32" if values != "fp32" else ", so the training has diverged"
        raise UserError(f"{name} {error}{advice}.") from None


def write(path: Path, packed: PackedModel) -> None:
    """Write the file atomically."""
    tensors = packed.tensors()
    header: dict[str, Any] = {
        "format": FORMAT,
        "model": packed.model,
        "supplied": packed.supplied,
        "matrices": {name: {"structure": "element", "shape": list(m.shape)} for name, m in packed.matrices.items()},
        "vocabulary": packed.vocabulary.to_dict() if packed.vocabulary else None,
        "about": packed.about,
    }
    header["sha256"] = _checksum(header, tensors)
    write_atomically(Path(path), to_safetensors(tensors, {"srnn": json.dumps(header)}))


def read(path: Path) -> PackedModel:
    """Read and check a packed file.

    Raises:
        UserError: no such file, not a packed file, of a newer format, truncated or damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such packed model file.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no packed model: {error}.") from None
    try:
        header = json.loads(metadata["srnn"])
        version = header["format"]
    except (KeyError, ValueError, TypeError):
        raise UserError(f"{path} is no packed model of srnn: it has no srnn header.") from None
    if version != FORMAT:
        raise UserError(f"{path} is of format {version}; this srnn reads format {FORMAT}: upgrade srnn.")
    try:
        if header.pop("sha256") != _checksum(header, tensors):
            raise ValueError("its checksum does not match")
        return _from_header(header, tensors)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error}. Take it again from where it was made.") from None


def load(path: str | Path) -> nn.Module:
    """The model of a packed file, ready to call: ``logits_BTV, state = model(tokens_BT, state)``.

    Raises:
        UserError: no such file, not a packed file, truncated or damaged.
    """
    return read(Path(path)).build()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Weights under the model's own names, from a packed file, a checkpoint or a plain ``state_dict`` file.

    Raises:
        UserError: no such file, or none of these.
    """
    if path.suffix == ".safetensors":
        return read(path).state_dict()
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint or packed file.")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = loaded.get("state_dict", loaded)
        return {
            str(name).removeprefix("model."): weight for name, weight in state.items() if isinstance(weight, Tensor)
        }
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        AttributeError,
        ValueError,
        KeyError,
    ) as error:
        raise UserError(f"{path} is no checkpoint, or damaged: {str(error).splitlines()[0]}") from None


def _from_header(header: dict[str, Any], tensors: dict[str, Tensor]) -> PackedModel:
    matrices = {}
    for name, entry in header["matrices"].items():
        if entry["structure"] != "element":
            raise ValueError(f"{name} has the unknown structure {entry['structure']!r}")
        rows, columns = entry["shape"]
        matrix = ElementMatrix((rows, columns), *(tensors.pop(f"{name}.{part}") for part in _PARTS))
        matrix.check()
        matrices[name] = matrix
    vocabulary = Vocabulary.from_dict(header["vocabulary"]) if header["vocabulary"] else None
    return PackedModel(header["model"], header["supplied"], matrices, tensors, vocabulary, header["about"])


def _checksum(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes())
    return digest.hexdigest()
