"""A network whose weights hold zeros -> the same network on sparse kernels, and back: what to pack, and how."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srnn.cells import CELL_TYPES, GATES
from srnn.errors import UserError
from srnn.inference.modules import Recorder, SparseModule, Weights, replaceable, sparse_module
from srnn.kernels.contract import Kernel
from srnn.registry import register
from srnn.sparse import (
    DTYPES,
    PACKED_STRUCTURES,
    PackedStructure,
    SparseMatrix,
    Values,
    cheapest_structure,
    has_structure,
    packed_nbytes,
)

Wanted = PackedStructure | Literal["auto"]
Energies = Mapping[str, Tensor]


def sparsify(
    model: nn.Module,
    structure: Wanted = "auto",
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

    Raises:
        UserError: a matrix is not pruned in the blocks asked for, holds numbers that are not finite, or the kernel
            cannot run here.
    """
    chosen = register.rebuild("kernel", {"name": kernel}) if isinstance(kernel, str) else kernel
    packer = _Packer(model, structure, values, energies or {})
    memo: dict[int, Any] = {}
    for module in model.modules():
        if packer.is_sparse(module):
            memo[id(module)] = sparse_module(module, packer.weights(module), chosen)
    for made in memo.values():
        for matrix in made.matrices().values():
            reason = chosen.supports(None, matrix.device)
            if reason is not None:
                raise UserError(f"kernel={kernel} cannot run on {matrix.device}: {reason}.")
    return replaced(model, memo)


def desparsify(model: nn.Module) -> nn.Module:
    """A copy with torch's own modules again; weights kept as fp32 are bit for bit what they were."""
    return replaced(model, {id(m): m.original() for m in model.modules() if isinstance(m, SparseModule)})


def replaced(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in which the modules with these ids are others. What is replaced is not copied first."""
    copied: nn.Module = memo[id(model)] if id(model) in memo else copy.deepcopy(model, memo)
    return copied.eval()


def record_inputs(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """Mean squares of what each matrix multiplies, for ``sparsify(values="int8", energies=...)``.

    Args:
        model: the network, dense.
        run: runs a model on the data that counts.

    Returns:
        Parameter name -> [columns].
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def recorder_of(prefix: str) -> Recorder:
        def record(name: str, x_NI: Tensor) -> None:
            key = f"{prefix}.{name}" if prefix else name
            sums[key] = sums.get(key, 0) + x_NI.double().square().sum(dim=0)
            counts[key] = counts.get(key, 0) + x_NI.shape[0]

        return record

    recording = sparsify(model, kernel="dense")
    for name, module in recording.named_modules():
        if isinstance(module, SparseModule):
            module.recorder = recorder_of(name)
    with torch.inference_mode():
        run(recording)
    return {name: (total / counts[name]).float() for name, total in sums.items()}


class _Packer:
    """Packs the weights of a model's modules; a weight that two of them share is packed once."""

    def __init__(self, model: nn.Module, structure: Wanted, values: Values, energies: Energies) -> None:
        if structure not in (*PACKED_STRUCTURES, "auto"):
            raise UserError(f"structure={structure!r}: there are auto, {', '.join(PACKED_STRUCTURES)}.")
        if values not in DTYPES:
            raise UserError(f"values={values!r}: there are {', '.join(DTYPES)}.")
        self.structure, self.values, self.energies = structure, values, energies
        self.names = {id(weight): name for name, weight in model.named_parameters()}
        self.done: dict[tuple[int, int], SparseMatrix] = {}

    def is_sparse(self, module: nn.Module) -> bool:
        """Whether any of its matrices is smaller for being sparse, not only for its values' width."""
        return replaceable(module) and any(
            worth_packing(weight, self.values, matrix_gates(name, module))
            for name, weight in module.named_parameters(recurse=False)
        )

    def weights(self, module: nn.Module) -> Weights:
        """Name -> packed matrix, bias, or None for a bias it does not have."""
        return {
            name: w if w is None or w.ndim != 2 else self._pack(w, matrix_gates(name, module))
            for name, w in module._parameters.items()
        }

    def _pack(self, weight: Tensor, gates: int) -> SparseMatrix:
        key, name = (id(weight), gates), self.names[id(weight)]
        if key not in self.done:
            self.done[key] = pack(name, weight, self.structure, self.values, gates, self.energies.get(name))
        return self.done[key]


def matrix_gates(name: str, module: nn.Module) -> int:
    """Gates that the rows of a module's matrix fall into."""
    layers: dict[Any, int] = {
        kind.layer: GATES[cell] for cell, kind in CELL_TYPES.items()
    }  # not what derives from them
    return 1 if name.startswith("weight_hr") else layers.get(type(module), 1)


def worth_packing(weight: Tensor, values: Values, gates: int) -> bool:
    """Whether a matrix is smaller for its zeros, not only for the width of its values."""
    if weight.ndim != 2:
        return False
    width = torch.empty((), dtype=DTYPES[values]).element_size()
    return packed_nbytes(weight, cheapest_structure(weight, values, gates), values, gates) < width * weight.numel()


def pack(
    name: str, weight: Tensor, structure: Wanted, values: Values, gates: int, energy: Tensor | None = None
) -> SparseMatrix:
    """``SparseMatrix.from_dense`` that refuses blocks a weight is not pruned in.

    Raises:
        UserError: names the weight.
    """
    weight = weight.detach().float()
    if structure != "auto" and not has_structure(weight, structure, values, gates):
        taken = packed_nbytes(weight, structure, values, gates)
        least = packed_nbytes(weight, "element", values, gates)
        raise UserError(
            f"{name} is not pruned in {structure} blocks: they would take {taken:,} bytes, its single elements "
            f"{least:,}. Use structure=element, or auto."
        )
    try:
        return SparseMatrix.from_dense(weight, structure, values, gates, energy)
    except ValueError as error:
        diverged = "the training has probably diverged"
        advice = f", at most 65,504: {diverged}; else use values=fp32 or bf16" if values == "fp16" else f": {diverged}"
        raise UserError(f"{name} {error}{advice}.") from None
