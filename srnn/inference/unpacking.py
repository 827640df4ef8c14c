"""Unpacking: a packed network -> a module, on torch's own dense modules or on sparse kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.copying import replaced
from srnn.inference.modules import replaceable, sparse_module
from srnn.inference.packing import PackedModel, matrix_gates
from srnn.kernels.contract import Kernel
from srnn.meta_device import without_memory
from srnn.registry import register
from srnn.sparse import SparseMatrix


def unpack(packed: PackedModel, kernel: Kernel | None = None) -> nn.Module:
    """The network with the packed weights, in eval mode.

    Args:
        packed: what ``pack`` or ``read`` gave.
        kernel: the backend that runs it; nothing is unpacked that it does not need dense. None gives torch's own dense
            modules, trainable.

    Raises:
        UserError: weights and config do not belong together, or the kernel cannot run here.
    """
    if kernel is None:
        return _dense(packed)
    reason = kernel.supports(None, torch.device("cpu"))
    if reason is not None:
        raise UserError(f"the kernel cannot run on this CPU: {reason}.")
    return _sparse(_untied(packed), kernel)


def _dense(packed: PackedModel) -> nn.Module:
    module = _skeleton(packed)
    module.load_state_dict(packed.state_dict(), assign=True)
    for name, source in packed.tied.items():  # assigning made two parameters of one
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, module.get_parameter(source))
    return module.eval()


def _sparse(packed: PackedModel, kernel: Kernel) -> nn.Module:
    skeleton = _skeleton(packed)
    memo: dict[int, Any] = {}
    rest = dict(packed.dense)
    for prefix, module in skeleton.named_modules():
        names = {name: f"{prefix}.{name}" if prefix else name for name in module._parameters}
        if replaceable(module) and any(name in packed.matrices for name in names.values()):
            weights = {name: _weight(packed, full, name, module) for name, full in names.items()}
            memo[id(module)] = sparse_module(module, weights, kernel)
            for full in names.values():
                rest.pop(full, None)
    rest |= {name: m.to_dense() for name, m in packed.matrices.items() if not _inside(name, skeleton, memo)}
    sparse = replaced(skeleton, memo)
    sparse.load_state_dict(rest, strict=False, assign=True)
    return sparse.requires_grad_(False)


def _untied(packed: PackedModel) -> PackedModel:
    """The same with each tied weight under its own name too; no memory is copied."""
    matrices = {n: packed.matrices[s] for n, s in packed.tied.items() if s in packed.matrices}
    dense = {n: packed.dense[s] for n, s in packed.tied.items() if s in packed.dense}
    return replace(packed, matrices=packed.matrices | matrices, dense=packed.dense | dense, tied={})


def _weight(packed: PackedModel, full: str, name: str, module: nn.Module) -> SparseMatrix | Tensor | None:
    if full in packed.matrices:
        return packed.matrices[full]
    weight = packed.dense.get(full)
    if weight is None or weight.ndim != 2:
        return weight
    # A layer runs on sparse kernels as a whole, so what was left dense beside a packed matrix is packed now.
    return SparseMatrix.from_dense(weight, "auto", "fp32", matrix_gates(name, module))


def _inside(name: str, skeleton: nn.Module, memo: Mapping[int, Any]) -> bool:
    return id(skeleton.get_submodule(name.rpartition(".")[0])) in memo


def _skeleton(packed: PackedModel) -> nn.Module:
    """The model without memory for its weights, once these are known to fit."""
    with without_memory():
        module: nn.Module = register.rebuild("model", packed.model, **packed.supplied)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in packed.dense.items()}
    given |= {name: matrix.shape for name, matrix in packed.matrices.items()}
    given |= {name: given[source] for name, source in packed.tied.items() if source in given}
    wrong = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"the packed weights do not fit the model they name: {name} has shape {given.get(name)}, "
            f"{packed.model['name']} wants {wanted.get(name)}."
        )
    for prefix, child in module.named_modules():
        for name in child._parameters:
            matrix = packed.matrices.get(f"{prefix}.{name}" if prefix else name)
            if matrix is not None and matrix.gates != matrix_gates(name, child):
                raise UserError(f"the packed weights do not fit the model they name: gates of {prefix}.{name}.")
    return module
