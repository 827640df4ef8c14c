"""Calibration: what the matrices of a network multiply, by which int8 scales are chosen."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from srnn.inference.base import InputRecorder, SparseModule
from srnn.inference.packing import Packer
from srnn.inference.sparsify import sparsified
from srnn.registry import register


def record_inputs(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[str, Tensor]:
    """Mean squares of what each matrix multiplies, for ``sparsify(values="int8", energies=...)`` and ``pack``.

    Args:
        model: the network, dense.
        run: runs a model on the data that counts.

    Returns:
        Parameter name -> [columns].

    Example::

        energies = record_inputs(model, lambda network: [network(x) for x in batches])
        small = srnn.sparsify(model, values="int8", energies=energies)
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def recorder_of(prefix: str) -> InputRecorder:
        def record(name: str, x_NI: Tensor) -> None:
            key = f"{prefix}.{name}" if prefix else name
            sums[key] = sums.get(key, 0) + x_NI.double().square().sum(dim=0)
            counts[key] = counts.get(key, 0) + x_NI.shape[0]

        return record

    recording, _ = sparsified(model, Packer("auto", "fp32"), register.rebuild("kernel", {"name": "dense"}))
    for name, module in recording.named_modules():
        if isinstance(module, SparseModule):
            module.recorder = recorder_of(name)
    with torch.inference_mode():
        run(recording)
    return {name: (total / counts[name]).float() for name, total in sums.items()}
