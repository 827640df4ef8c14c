"""The packed model file: non-zeros only, and all that rebuilds the model.

A safetensors file. A pruned matrix ``name`` is stored as ``name.values``, ``name.columns``, ``name.row_pointers`` and,
for int8, ``name.scales``, as ``srnn.sparse.SparseMatrix`` explains them; every other tensor under its own name, in
fp32, but for buffers that fp32 cannot hold. The file's metadata has one key, ``srnn``: JSON with the format's version,
the model's config, the vocabulary, the shape, gates, structure and values of each matrix, and a SHA-256 over all of it
and every tensor. There is no code in it.

Versions: 4 has buffers in their own types, and files without a config, and is written for these alone; 3 has tied
weights; 2 N x 1 blocks, bf16 and int8; 1 single elements in fp32 or fp16. All are read.
docs/packed_format.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from srnn.audio import Features
from srnn.errors import UserError
from srnn.files import expanded, named_in_utf8, write_atomically
from srnn.inference.checking import check_network, kernel_given
from srnn.inference.packing import PackedModel, matrix_gates
from srnn.inference.unpacking import unpack
from srnn.kernels.contract import Kernel
from srnn.meta_device import without_memory
from srnn.registry import register
from srnn.sparse import SparseMatrix
from srnn.vocabulary import Vocabulary

FORMAT = 4
_LONGEST_NAME = 200  # of a model


def write(path: str | Path, packed: PackedModel) -> None:
    """Write the file atomically. Raises OSError if it cannot be written; an older file is still there then."""
    tensors = packed.tensors()
    header: dict[str, Any] = {
        # The oldest version that holds it, so that older srnn read it too.
        "format": 3 if packed.model and all(t.dtype == torch.float32 for t in packed.dense.values()) else FORMAT,
        "model": packed.model,
        "supplied": packed.supplied,
        "matrices": {name: _describe(matrix) for name, matrix in packed.matrices.items()},
        "vocabulary": packed.vocabulary.to_dict() if packed.vocabulary else None,
        "about": packed.about,
        "tied": packed.tied,
    }
    header["sha256"] = _checksum(header, tensors)
    write_atomically(expanded(path), to_safetensors(tensors, {"srnn": json.dumps(header)}))


def _describe(matrix: SparseMatrix) -> dict[str, Any]:
    return {
        "structure": matrix.structure,
        "values": matrix.values_name,
        "shape": list(matrix.shape),
        "gates": matrix.gates,
    }


def read(path: str | Path) -> PackedModel:
    """Read and check a packed file. Tensors stay mapped to the file, so that processes share their memory.

    Raises:
        UserError: no such file, not a packed file, of a newer format, truncated or damaged.
    """
    path = expanded(path)
    if path.is_dir():
        there = ", ".join(str(file) for file in sorted(path.glob("*.safetensors"))[:3])
        raise UserError(
            f"{path} is a folder: give a packed file, {there or 'RUN/model.safetensors of a finished run'}."
        )
    if not path.is_file():
        raise UserError(f"{path}: no such packed model file.")
    try:
        with named_in_utf8(path) as name, safe_open(name, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        if zipfile.is_zipfile(path):  # what torch.save writes is an archive
            raise UserError(
                f"{path} is a file of torch.save, such as a checkpoint, and no packed model: give its run's "
                "model.safetensors. srnn.save writes one of any module."
            ) from None
        raise UserError(_unreadable(path, error)) from None
    try:
        header = json.loads(metadata["srnn"])
        version = header["format"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(
            f"{path} is no packed model of srnn: it has no srnn header. srnn.save writes one of any module."
        ) from None
    if version not in range(1, FORMAT + 1) or isinstance(version, bool | float):
        raise UserError(f"{path} is of format {str(version)[:40]}; this srnn reads 1 to {FORMAT}: upgrade srnn.")
    try:
        if header.pop("sha256") != _checksum(header, tensors):
            raise ValueError("its checksum does not match")
        return _from_header(header, tensors)
    except UserError:
        raise
    except Exception as error:  # whatever a header made by hand brings about
        why = f"it lacks {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UserError(f"{path} is damaged: {why[:300]}. Take it again from where it was made.") from None


def _unreadable(path: Path, error: Exception) -> str:
    # What safetensors says is of its own parts, a header and offsets, or that there is no file where it is refused one.
    if isinstance(error, OSError):
        try:
            path.open("rb").close()
        except OSError as found:
            error = found
        return f"{path} cannot be read: {error.strerror or error}."
    return (
        f"{path} is damaged or no packed model: its {path.stat().st_size:,} bytes were cut short or changed, or are "
        "another kind of file. Take it again from where it was made."
    )


def load(
    path: str | Path, kernel: str | Kernel = "auto", into: nn.Module | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """The network of a packed file, on sparse kernels.

    A language model is called as ``logits_BTV, state = model(tokens_BT, state)`` for sequences and as
    ``logits_BV, state = model.step(tokens_B, state)`` for a stream; ``model.generate(...)`` writes, and
    ``model.vocabulary`` translates. One that writes speech down has ``model.transcriber()``. Calls from several threads
    are safe, each with a state of its own.

    Args:
        path: the file.
        kernel: a backend's name or the backend; ``auto`` measures them on the whole network, for one stream, and
            keeps what it found in the cache folder.
        into: a network with the names and shapes of the file's weights, for a file of ``srnn.save``, which holds no
            config. It is left as it is.
        device: where it runs, such as ``cuda``: ``auto`` measures there, and a language model's step is replayed from a
            CUDA graph.

    Returns:
        The network, or a copy of ``into`` with the file's weights, in eval mode; backward through its outputs raises.

    Raises:
        UserError: no such file, not a packed file, truncated or damaged, no such device, the kernel cannot run there,
            or ``into`` has other names or shapes.

    Example:
        >>> import tempfile, torch, srnn
        >>> from srnn.inference.packed_file import write
        >>> from srnn.inference.packing import pack
        >>> from srnn.models import gru
        >>> config, sizes = {"name": "gru", "hidden_size": 16, "embedding_size": 8}, {"vocabulary_size": 50}
        >>> path = tempfile.mkdtemp() + "/model.safetensors"
        >>> write(path, pack(gru(16, 8, **sizes), config, sizes))
        >>> model = srnn.load(path, kernel="dense")
        >>> logits_BV, state = model.step(torch.tensor([7]))
        >>> logits_BV.shape
        torch.Size([1, 50])
    """
    if into is not None:
        check_network(into, "srnn.load(into=...)")
    packed = read(path)
    chosen = kernel_given(kernel, "srnn.load")
    model = unpack(packed, chosen, into, _usable(device))
    if into is not None and packed.vocabulary is None:
        return model
    model.vocabulary = packed.vocabulary  # type: ignore[assignment]
    if hasattr(model, "transcriber"):
        model.audio = Features.of(packed.about.get("dataset"))  # type: ignore[assignment]
    return model


def _usable(device: str | torch.device) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # the latter of a torch without CUDA
        raise UserError(f"srnn.load: device={str(device)!r} cannot be used: {str(error).splitlines()[0]}.") from None
    return where


def _from_header(header: dict[str, Any], tensors: dict[str, Tensor]) -> PackedModel:
    _check_header(header)
    matrices = {name: _matrix(name, entry, header["format"], tensors) for name, entry in header["matrices"].items()}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 and header["format"] < 4:
            raise ValueError(f"{name} is {tensor.dtype}, not fp32")
    vocabulary = Vocabulary.from_dict(header["vocabulary"]) if header["vocabulary"] else None
    if vocabulary is not None and header["supplied"].get("vocabulary_size", len(vocabulary)) != len(vocabulary):
        raise ValueError(f"its vocabulary has {len(vocabulary)} tokens, not as many as the network")
    tied = header["tied"] if header["format"] > 2 else {}
    if not all(isinstance(n, str) and s in matrices.keys() | tensors.keys() for n, s in tied.items()):
        raise ValueError("a weight is tied to one that is not there")
    packed = PackedModel(header["model"], header["supplied"], matrices, tensors, vocabulary, header["about"], tied)
    # Rows and columns without an entry take no bytes in the file, and all of them in the network.
    dense = 4 * sum(matrix.shape[0] * matrix.shape[1] for matrix in matrices.values())
    if dense > packed.allowance:
        raise ValueError(f"its matrices would take {dense:,} bytes, far more than it holds")
    return packed if header["format"] > 1 else _with_gates(packed)


def _check_header(header: dict[str, Any]) -> None:
    kinds = {"model": dict, "supplied": dict, "matrices": dict, "about": dict, "vocabulary": dict | None}
    for key, kind in (kinds | ({"tied": dict} if header["format"] > 2 else {})).items():
        if not isinstance(header[key], kind):
            raise ValueError(f"its {key} is a {type(header[key]).__name__}")
    if not header["model"] and header["format"] > 3:
        return  # of srnn.save, which knows no config
    name = header["model"].get("name")
    if not isinstance(name, str) or len(name) > _LONGEST_NAME:
        raise ValueError("its model has no name")


def _matrix(name: str, entry: dict[str, Any], version: int, tensors: dict[str, Tensor]) -> SparseMatrix:
    """A matrix of its parts, which are taken out of ``tensors``. Raises ValueError or KeyError if it is none."""
    rows, columns = entry["shape"]
    gates = entry["gates"] if version > 1 else 1
    if not all(type(number) is int for number in (rows, columns, gates)):
        raise ValueError(f"{name} has a shape or gates that are no numbers")
    parts = {part: tensors.pop(f"{name}.{part}") for part in ("values", "columns", "row_pointers")}
    if version == 1:
        parts["values"] = parts["values"][:, None]
    elif entry["values"] == "int8":
        parts["scales"] = tensors.pop(f"{name}.scales")
    matrix = SparseMatrix((rows, columns), gates, **parts)
    matrix.check()
    if matrix.structure != entry["structure"] or (version > 1 and entry["values"] != matrix.values_name):
        raise ValueError(f"{name} is {matrix.structure} {matrix.values_name}, not what its header says")
    return matrix


def _with_gates(packed: PackedModel) -> PackedModel:
    """Format 1 did not say which gates rows belong to; for single elements that changes nothing but the number."""
    with without_memory(packed.calls):
        module: nn.Module = register.rebuild("model", packed.model, **packed.supplied)
    for prefix, child in module.named_modules():
        for name in child._parameters:
            full = f"{prefix}.{name}" if prefix else name
            if full in packed.matrices:
                packed.matrices[full] = replace(packed.matrices[full], gates=matrix_gates(name, child))
    return packed


def _checksum(header: dict[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
