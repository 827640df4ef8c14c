"""``kernel=csr``: torch's own sparse matrices, the way the paper measured (there cuSPARSE)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from srnn.kernels.contract import LayerWeights, Product
from srnn.kernels.dense import StepLoopKernel
from srnn.registry import register
from srnn.sparse import SparseMatrix


@register.kernel("csr")
class Csr(StepLoopKernel):
    """``torch.sparse`` in compressed rows with 32-bit indices, which are twice as fast as its 64-bit ones."""

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """CPU in fp32, where torch has MKL; GPUs."""
        if device.type == "cpu":
            if not torch.backends.mkl.is_available():
                return "torch.sparse needs MKL on a CPU, and this torch was built without"
            return None if dtype == torch.float32 else f"torch.sparse multiplies in fp32 on a CPU, not in {dtype}"
        return None if device.type == "cuda" else f"torch.sparse has no compressed rows on {device.type}"

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """``W x'``, turned around."""
        with warnings.catch_warnings():  # "beta state" and "invariant checks are off", once a process
            warnings.simplefilter("ignore")
            weight = matrix.to_dense().to(device, dtype).to_sparse_csr()
            weight = torch.sparse_csr_tensor(
                weight.crow_indices().int(), weight.col_indices().int(), weight.values(), matrix.shape
            )
        bias = None if bias is None else bias.to(device, dtype)

        def multiply(x_NI: Tensor) -> Tensor:
            if not weight.values().numel() or not x_NI.numel():
                y_NO = x_NI.new_zeros(x_NI.shape[0], matrix.shape[0])
            elif x_NI.shape[0] == 1:
                y_NO = torch.mv(weight, x_NI[0])[None]
            else:
                y_NO = torch.mm(weight, x_NI.T).T
            return y_NO if bias is None else y_NO + bias

        return multiply
