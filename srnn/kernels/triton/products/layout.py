"""A matrix made ready for products with rows of inputs."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.kernels.triton.chip import current
from srnn.kernels.triton.products.plan import few_rows_of, is_faster_sparse
from srnn.kernels.triton.tuning import Tuning
from srnn.sparse import SparseMatrix


class TritonProduct:
    """``y_MO = x_MI W' + bias``: sparse for few rows, and for many of tall blocks; else dense.

    Args:
        matrix: W, [O, I], on the device.
        bias: [O] on the device, or None.
        dtype: of inputs and outputs.
        precision: ``ieee`` or ``tf32``, of products of fp32 with many rows.
        tuning: of the device.
    """

    def __init__(
        self, matrix: SparseMatrix, bias: Tensor | None, dtype: torch.dtype, precision: str, tuning: Tuning
    ) -> None:
        if matrix.shape[1] > torch.iinfo(matrix.columns.dtype).max:  # to name the row after the last
            matrix = replace(matrix, columns=matrix.columns.to(torch.int32))
        self.matrix, self.bias, self.dtype = matrix, bias, dtype
        self.precision, self.tuning = precision, tuning

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """[O, I] and the bias, for many rows of short blocks."""
        return self.matrix.to_dense().to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)

    def __call__(self, x_MI: Tensor, streams_together: bool = False) -> Tensor:
        """y_MO, whose columns lie one after the other in memory if the M rows of an output are to lie together."""
        matrix, rows = self.matrix, x_MI.shape[0]
        if not rows:
            return x_MI.new_empty(0, matrix.shape[0])
        if not self.is_sparse_for(rows, x_MI.dtype):
            weight, bias = self.dense
            if not streams_together:
                return F.linear(x_MI, weight, bias)
            return (weight @ x_MI.T if bias is None else torch.addmm(bias[:, None], weight, x_MI.T)).T
        y_MO = x_MI.new_empty(matrix.shape[0], rows).T if streams_together else x_MI.new_empty(rows, matrix.shape[0])
        with current(x_MI.device):
            self._multiply(x_MI, y_MO)
        return y_MO

    def is_sparse_for(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether so many rows are multiplied with the sparse matrix."""
        return is_faster_sparse(self.matrix, rows, dtype, self.tuning)

    def _multiply(self, x_MI: Tensor, y_MO: Tensor) -> None:
        # Here, because Triton may be missing.
        from srnn.kernels.triton.products.kernel import multiply_with_few, multiply_with_many

        if x_MI.shape[0] <= few_rows_of(self.matrix, self.tuning):
            multiply_with_few(self.matrix, self.bias, x_MI, y_MO)
        else:
            multiply_with_many(self.matrix, self.bias, x_MI, y_MO, self.precision, self.tuning)
