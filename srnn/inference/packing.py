"""A network's weights as the packed file holds them: packed, and unpacked into a dense or a sparse network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.meta_device import without_memory
from srnn.inference.modules import replaceable, sparse_module
from srnn.inference.sparsify import Wanted, matrix_gates, pack, record_inputs, replaced, worth_packing
from srnn.kernels.contract import Kernel
from srnn.registry import register
from srnn.sparse import SparseMatrix, Values
from srnn.vocabulary import Vocabulary


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
