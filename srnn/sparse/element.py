"""The element format: compressed rows of single non-zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Values = Literal["fp32", "fp16"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class ElementMatrix:
    """A sparse matrix in compressed rows.

    Attributes:
        shape: (rows, columns).
        values: the non-zeros, row after row, fp32 or fp16.
        columns: their columns, rising within a row; uint16 where all fit, else int32.
        row_pointers: int32 of rows + 1; row ``i`` owns entries ``row_pointers[i]`` to ``row_pointers[i + 1]``.
    """

    shape: tuple[int, int]
    values: Tensor
    columns: Tensor
    row_pointers: Tensor

    @classmethod
    def from_dense(cls, weight: Tensor, values: Values = "fp32") -> ElementMatrix:
        """Pack the non-zeros of a matrix.

        Raises:
            ValueError: not a matrix, not finite, or out of the range of fp16.
        """
        if weight.ndim != 2:
            raise ValueError(f"a sparse matrix has 2 dimensions, not {weight.ndim}")
        kept = weight.detach().to(DTYPES[values])
        if not bool(kept.isfinite().all()):
            raise ValueError(f"holds values that are not finite in {values}")
        # The pattern is the weight's own: a value that rounds to zero in fp16 is stored, as zero, so that
        # counts stay what pruning made them.
        nonzero = weight.detach() != 0
        rows, columns = nonzero.nonzero(as_tuple=True)
        index_dtype = torch.uint16 if weight.shape[1] <= 1 << 16 else torch.int32
        pointers = torch.zeros(weight.shape[0] + 1, dtype=torch.int32, device=weight.device)
        pointers[1:] = nonzero.sum(dim=1).cumsum(0)
        return cls((weight.shape[0], weight.shape[1]), kept[rows, columns], columns.to(index_dtype), pointers)

    def to_dense(self) -> Tensor:
        """The fp32 matrix back."""
        dense = torch.zeros(self.shape, device=self.values.device)
        dense[self._rows(), self.columns.long()] = self.values.float()
        return dense

    def _rows(self) -> Tensor:
        counts = self.row_pointers.diff().long()
        return torch.repeat_interleave(torch.arange(self.shape[0], device=counts.device), counts)

    @property
    def nnz(self) -> int:
        """Number of stored entries."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of values, columns and row pointers."""
        return sum(t.numel() * t.element_size() for t in (self.values, self.columns, self.row_pointers))

    def check(self) -> None:
        """Raise ``ValueError`` unless every index is in range and every size fits: for data from outside."""
        rows, columns = self.shape
        if rows < 0 or columns < 0:
            raise ValueError("negative shape")
        if self.values.dtype not in DTYPES.values() or self.values.ndim != 1:
            raise ValueError("values must be 1-D fp32 or fp16")
        if self.columns.dtype not in (torch.uint16, torch.int32) or self.columns.shape != self.values.shape:
            raise ValueError("columns must be uint16 or int32, one a value")
        if self.row_pointers.dtype != torch.int32 or self.row_pointers.shape != (rows + 1,):
            raise ValueError(f"row_pointers must be {rows + 1} int32")
        pointers = self.row_pointers.long()
        if pointers[0] != 0 or pointers[-1] != self.nnz or bool((pointers.diff() < 0).any()):
            raise ValueError("row_pointers must rise from 0 to the number of values")
        wide = self.columns.long()
        if self.nnz and not (int(wide.min()) >= 0 and int(wide.max()) < columns):
            raise ValueError("a column is out of range")
        same_row = self._rows().diff() == 0
        if bool((wide.diff()[same_row] <= 0).any()):
            raise ValueError("columns must rise within a row")
        if not bool(self.values.isfinite().all()):
            raise ValueError("a value is not finite")
