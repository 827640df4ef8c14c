"""The packed model file: non-zeros only, and all that rebuilds the model.

A safetensors file. A pruned matrix ``name`` is stored as ``name.values``, ``name.columns``, ``name.row_pointers`` and,
for int8, ``name.scales``, as ``srnn.sparse.SparseMatrix`` explains them; every other tensor under its own name, in
fp32. The file's metadata has one key, ``srnn``: JSON with the format's version, the model's config, the vocabulary, the
shape, gates, structure and values of each matrix, and a SHA-256 over all of it and every tensor. There is no code in
it.

Versions: 3 has tied weights; 2 N x 1 blocks, bf16 and int8; 1 single elements in fp32 or fp16. All are read.
docs/packed_format.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from srnn.deploy.modules import replaceable, sparse_module
from srnn.deploy.sparsify import Wanted, matrix_gates, pack, record_inputs, replaced, worth_packing
from srnn.errors import UserError
from srnn.files import write_atomically
from srnn.kernels.contract import Kernel
from srnn.meta import without_memory
from srnn.registry import register
from srnn.sparse import SparseMatrix, Values
from srnn.vocabulary import Vocabulary

FORMAT = 3


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
        tied: name -> the name whose weight it shares; stored once.
    """

    model: dict[str, Any]
    supplied: dict[str, Any]
    matrices: dict[str, SparseMatrix]
    dense: dict[str, Tensor]
    vocabulary: Vocabulary | None = None
    about: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_model(
        cls,
        module: nn.Module,
        model: Mapping[str, Any],
        supplied: Mapping[str, Any],
        values: Values = "fp32",
        structure: Wanted = "auto",
        vocabulary: Vocabulary | None = None,
        about: Mapping[str, Any] | None = None,
        calibrate: Callable[[nn.Module], object] | None = None,
    ) -> PackedModel:
        """Pack a network: each matrix that gets smaller for its zeros.

        Args:
            module: the network, dense.
            model: the config that builds it.
            supplied: what the run supplied to build it.
            values: what non-zeros are stored as.
            structure: the blocks of every packed matrix; ``auto`` takes the fewest bytes for each.
            vocabulary: of a language model.
            about: facts to keep in the file.
            calibrate: runs a model on data; int8 scales are then chosen for the least error on it.

        Raises:
            UserError: a weight is not finite, too large for fp16 values, or not pruned in these blocks.
        """
        energies = record_inputs(module, calibrate) if calibrate is not None and values == "int8" else {}
        gates = {
            f"{prefix}.{name}" if prefix else name: matrix_gates(name, child)
            for prefix, child in module.named_modules()
            for name, _ in child.named_parameters(recurse=False)
        }
        matrices, dense = {}, {}
        tied = tied_names(module)
        for name, tensor in module.state_dict().items():
            if name in tied:
                continue
            weight, parts = tensor.detach().cpu().float(), gates.get(name, 1)
            if worth_packing(weight, values, parts):
                matrices[name] = pack(name, weight, structure, values, parts, energies.get(name))
            else:
                dense[name] = weight.contiguous().clone()
        return cls(dict(model), dict(supplied), matrices, dense, vocabulary, dict(about or {}), tied)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, dense, fp32, under the model's own names."""
        once = self.dense | {name: matrix.to_dense() for name, matrix in self.matrices.items()}
        return once | {name: once[source] for name, source in self.tied.items()}

    @property
    def _untied(self) -> PackedModel:
        """The same with each tied weight under its own name too; no memory is copied."""
        matrices = {n: self.matrices[s] for n, s in self.tied.items() if s in self.matrices}
        dense = {n: self.dense[s] for n, s in self.tied.items() if s in self.dense}
        return replace(self, matrices=self.matrices | matrices, dense=self.dense | dense, tied={})

    def build(self) -> nn.Module:
        """The network with these weights, on torch's own dense modules, in eval mode.

        Raises:
            UserError: weights and config do not belong together.
        """
        module = self._skeleton()
        module.load_state_dict(self.state_dict(), assign=True)
        for name, source in self.tied.items():  # assigning made two parameters of one
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, module.get_parameter(source))
        return module.eval()

    def build_sparse(self, kernel: Kernel) -> nn.Module:
        """The network on sparse kernels, in eval mode. Nothing is unpacked that a kernel does not need dense.

        Raises:
            UserError: weights and config do not belong together, or the kernel cannot run here.
        """
        reason = kernel.supports(None, torch.device("cpu"))
        if reason is not None:
            raise UserError(f"the kernel cannot run on this CPU: {reason}.")
        if self.tied:
            return self._untied.build_sparse(kernel)
        skeleton = self._skeleton()
        memo: dict[int, Any] = {}
        rest = dict(self.dense)
        for prefix, module in skeleton.named_modules():
            names = {name: f"{prefix}.{name}" if prefix else name for name in module._parameters}
            if replaceable(module) and any(name in self.matrices for name in names.values()):
                weights = {name: self._weight(full, name, module) for name, full in names.items()}
                memo[id(module)] = sparse_module(module, weights, kernel)
                for full in names.values():
                    rest.pop(full, None)
        rest |= {name: m.to_dense() for name, m in self.matrices.items() if not _inside(name, skeleton, memo)}
        sparse = replaced(skeleton, memo)
        sparse.load_state_dict(rest, strict=False, assign=True)
        return sparse.requires_grad_(False)

    def _weight(self, full: str, name: str, module: nn.Module) -> SparseMatrix | Tensor | None:
        if full in self.matrices:
            return self.matrices[full]
        weight = self.dense.get(full)
        if weight is None or weight.ndim != 2:
            return weight
        return SparseMatrix.from_dense(weight, "auto", "fp32", matrix_gates(name, module))

    def _skeleton(self) -> nn.Module:
        """The model without memory for its weights, once these are known to fit."""
        with without_memory():
            module: nn.Module = register.rebuild("model", self.model, **self.supplied)
        wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        given = {name: tuple(tensor.shape) for name, tensor in self.dense.items()}
        given |= {name: matrix.shape for name, matrix in self.matrices.items()}
        given |= {name: given[source] for name, source in self.tied.items() if source in given}
        wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
        if wrong:
            name = wrong[0]
            raise UserError(
                f"the packed weights do not fit the model they name: {name} has shape {given.get(name)}, "
                f"{self.model['name']} wants {wanted.get(name)}."
            )
        for prefix, child in module.named_modules():
            for name in child._parameters:
                matrix = self.matrices.get(f"{prefix}.{name}" if prefix else name)
                if matrix is not None and matrix.gates != matrix_gates(name, child):
                    raise UserError(f"the packed weights do not fit the model they name: gates of {prefix}.{name}.")
        return module

    @property
    def nonzeros(self) -> dict[str, int]:
        """Matrix name -> stored entries; of blocks all, whatever their value."""
        return {name: matrix.entries for name, matrix in self.matrices.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything the file stores, by the name it stores it under."""
        return self.dense | {f"{name}.{part}": t for name, m in self.matrices.items() for part, t in m.parts.items()}


def _inside(name: str, skeleton: nn.Module, memo: Mapping[int, Any]) -> bool:
    return id(skeleton.get_submodule(name.rpartition(".")[0])) in memo


def tied_names(module: nn.Module) -> dict[str, str]:
    """Name of each parameter that is another one's -> that one's name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }


def write(path: Path, packed: PackedModel) -> None:
    """Write the file atomically."""
    tensors = packed.tensors()
    header: dict[str, Any] = {
        "format": FORMAT,
        "model": packed.model,
        "supplied": packed.supplied,
        "matrices": {name: _describe(matrix) for name, matrix in packed.matrices.items()},
        "vocabulary": packed.vocabulary.to_dict() if packed.vocabulary else None,
        "about": packed.about,
        "tied": packed.tied,
    }
    header["sha256"] = _checksum(header, tensors)
    write_atomically(Path(path), to_safetensors(tensors, {"srnn": json.dumps(header)}))


def _describe(matrix: SparseMatrix) -> dict[str, Any]:
    return {
        "structure": matrix.structure,
        "values": matrix.values_name,
        "shape": list(matrix.shape),
        "gates": matrix.gates,
    }


def read(path: Path) -> PackedModel:
    """Read and check a packed file. Tensors stay mapped to the file, so that processes share their memory.

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
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{path} is damaged or no packed model: {error}.") from None
    try:
        header = json.loads(metadata["srnn"])
        version = header["format"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is no packed model of srnn: it has no srnn header.") from None
    if version not in range(1, FORMAT + 1) or isinstance(version, bool | float):
        raise UserError(f"{path} is of format {version!r}; this srnn reads 1 to {FORMAT}: upgrade srnn.")
    try:
        if header.pop("sha256") != _checksum(header, tensors):
            raise ValueError("its checksum does not match")
        return _from_header(header, tensors)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}. Take it again from where it was made.") from None


def load(path: str | Path, kernel: str | Kernel = "auto") -> nn.Module:
    """The network of a packed file, on sparse kernels.

    A language model is called as ``logits_BTV, state = model(tokens_BT, state)`` for sequences and as
    ``logits_BV, state = model.step(tokens_B, state)`` for a stream; ``model.generate(...)`` writes, and
    ``model.vocabulary`` translates. Calls from several threads are safe, each with a state of its own.

    Args:
        path: the file.
        kernel: a backend's name or the backend; ``auto`` measures them at the first call and keeps what it found.

    Raises:
        UserError: no such file, not a packed file, truncated or damaged, or the kernel cannot run here.
    """
    packed = read(Path(path))
    model = packed.build_sparse(register.rebuild("kernel", {"name": kernel}) if isinstance(kernel, str) else kernel)
    model.vocabulary = packed.vocabulary  # type: ignore[assignment]
    return model


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


def _from_header(header: dict[str, Any], tensors: dict[str, Tensor]) -> PackedModel:
    matrices = {}
    for name, entry in header["matrices"].items():
        rows, columns = (int(size) for size in entry["shape"])
        parts = {part: tensors.pop(f"{name}.{part}") for part in ("values", "columns", "row_pointers")}
        if header["format"] == 1:
            parts["values"] = parts["values"][:, None]
            entry |= {"gates": 1, "values": None}
        elif entry["values"] == "int8":
            parts["scales"] = tensors.pop(f"{name}.scales")
        matrix = SparseMatrix((rows, columns), int(entry["gates"]), **parts)
        matrix.check()
        if matrix.structure != entry["structure"] or entry["values"] not in (None, matrix.values_name):
            raise ValueError(f"{name} is {matrix.structure} {matrix.values_name}, not what its header says")
        matrices[name] = matrix
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} is {tensor.dtype}, not fp32")
    vocabulary = Vocabulary.from_dict(header["vocabulary"]) if header["vocabulary"] else None
    tied = header["tied"] if header["format"] > 2 else {}
    if not all(isinstance(n, str) and s in matrices.keys() | tensors.keys() for n, s in tied.items()):
        raise ValueError("a weight is tied to one that is not there")
    packed = PackedModel(header["model"], header["supplied"], matrices, tensors, vocabulary, header["about"], tied)
    return packed if header["format"] > 1 else _with_gates(packed)


def _with_gates(packed: PackedModel) -> PackedModel:
    """Format 1 did not say which gates rows belong to; for single elements that changes nothing but the number."""
    with without_memory():
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
