"""A network whose weights hold zeros -> the same network on sparse kernels, and back."""

from __future__ import annotations

from typing import Any

from torch import nn

from srnn.errors import UserError
from srnn.formats import Values
from srnn.inference.base import SparseModule, Weights
from srnn.inference.copying import replaced
from srnn.inference.modules import replaceable, sparse_module
from srnn.inference.packing import Energies, Packer, WantedStructure, matrix_gates
from srnn.kernels.contract import Kernel
from srnn.registry import register


def sparsify(
    model: nn.Module,
    structure: WantedStructure = "auto",
    values: Values = "fp32",
    kernel: str | Kernel = "auto",
    energies: Energies | None = None,
) -> nn.Module:
    """A copy of a network that runs on sparse kernels: the same call, outputs and states, for inference.

    Every ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, ``nn.Linear`` and ``nn.Embedding`` of which a matrix holds enough zeros
    to be smaller in a sparse format is replaced; the rest is copied. The model itself is left as it is.

    Args:
        model: a trained network; it may be one of these modules itself.
        structure: ``element``, ``4x1``, ``8x1``, ``16x1`` or ``32x1``; ``auto`` takes for each matrix the one of fewest
            bytes.
        values: what non-zeros are stored as: ``fp32``, ``fp16``, ``bf16``, or ``int8`` with a scale a row group.
        kernel: a backend's name or the backend; ``auto`` measures them when the network is first run.
        energies: parameter name -> mean square of what each column multiplies, from ``record_inputs``; for int8.

    Returns:
        The copy, in eval mode. Backward through its outputs raises.

    Raises:
        UserError: a matrix is not pruned in the blocks asked for, holds numbers that are not finite, or the kernel
            cannot run here.

    Example:
        >>> import torch, srnn
        >>> gru = torch.nn.GRU(16, 32)
        >>> for weight in gru.parameters():
        ...     _ = weight.data.mul_(torch.rand_like(weight) < 0.1)
        >>> sparse = srnn.sparsify(gru, kernel="csr")
        >>> x_TBI = torch.randn(5, 2, 16)
        >>> (sparse(x_TBI)[0] - gru(x_TBI)[0]).abs().max().item() < 1e-5
        True
    """
    chosen = register.rebuild("kernel", {"name": kernel}) if isinstance(kernel, str) else kernel
    packer = Packer(structure, values, energies)
    names = {id(weight): name for name, weight in model.named_parameters()}
    memo: dict[int, Any] = {}
    for module in model.modules():
        if replaceable(module) and _is_sparse(module, packer):
            memo[id(module)] = sparse_module(module, _weights(module, packer, names), chosen)
    for made in memo.values():
        for matrix in made.matrices().values():
            reason = chosen.supports(None, matrix.device)
            if reason is not None:
                raise UserError(f"kernel={kernel} cannot run on {matrix.device}: {reason}.")
    return replaced(model, memo)


def desparsify(model: nn.Module) -> nn.Module:
    """A copy with torch's own modules again; weights kept as fp32 are bit for bit what they were.

    Args:
        model: what ``sparsify`` or ``load`` gave.

    Returns:
        The copy, in eval mode, its parameters trainable.

    Raises:
        UserError: a part of the model cannot be copied.

    Example:
        >>> import torch, srnn
        >>> linear = torch.nn.Linear(16, 8)
        >>> _ = linear.weight.data.mul_(torch.rand(8, 16) < 0.1)
        >>> dense = srnn.desparsify(srnn.sparsify(linear, kernel="csr"))
        >>> torch.equal(dense.weight, linear.weight)
        True
    """
    return replaced(model, {id(m): m.original() for m in model.modules() if isinstance(m, SparseModule)})


def _is_sparse(module: nn.Module, packer: Packer) -> bool:
    """Whether any of its matrices is smaller for being sparse, not only for its values' width."""
    weights = module.named_parameters(recurse=False)
    return any(packer.is_worth(weight, matrix_gates(name, module)) for name, weight in weights)


def _weights(module: nn.Module, packer: Packer, names: dict[int, str]) -> Weights:
    """Name -> packed matrix, bias, or None for a bias it does not have."""
    return {
        name: w if w is None or w.ndim != 2 else packer.matrix(names[id(w)], w, matrix_gates(name, module))
        for name, w in module._parameters.items()
    }
