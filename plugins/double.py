"""Example plug-in: a kernel backend, as ``kernel=double``.

Products in float64: to see how much rounding matters to a network. A backend says what it ``supports`` and makes
products and recurrences ready to run; ``StepLoopKernel`` makes the recurrence of any product, a step at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from srnn.kernels import LayerWeights, Product, StepLoopKernel
from srnn.registry import register
from srnn.sparse import SparseMatrix


@register.kernel("double")
class Double(StepLoopKernel):
    """Dense products in float64, rounded to the type of their inputs."""

    unasked = False  # never fast: `auto` need not try it

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """Wherever there is float64."""
        return "there is no float64 on mps" if device.type == "mps" else None

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """``y_NO = x_NI W' + bias``."""
        weight_OI = matrix.to_dense().to(device, torch.float64)
        bias_O = torch.zeros(matrix.shape[0]) if bias is None else bias
        bias_O = bias_O.to(device, torch.float64)

        def multiply(x_NI: Tensor) -> Tensor:
            return torch.addmm(bias_O, x_NI.double(), weight_OI.T).to(x_NI.dtype)

        return multiply
