"""Whether so many rows are multiplied with a sparse matrix or with a dense one, and in what tiles."""

from __future__ import annotations

import torch

from srnn.kernels.triton.arrange import power
from srnn.kernels.triton.tuning import Tuning
from srnn.sparse import SparseMatrix


def few_rows_of(matrix: SparseMatrix, tuning: Tuning) -> int:
    """Rows up to which the matrix-vector form is used; above, dense, or for tall blocks the form of dot products."""
    return tuning.few_rows if matrix.height < 16 else tuning.few_rows_of_blocks


def is_faster_sparse(matrix: SparseMatrix, rows: int, dtype: torch.dtype, tuning: Tuning) -> bool:
    """Whether so many rows are multiplied with the sparse matrix."""
    density = matrix.entries / max(1, matrix.shape[0] * matrix.shape[1])
    tall = matrix.height >= 16 and (dtype == torch.float32 or density * tuning.dense_from <= matrix.height)
    return tall or rows <= few_rows_of(matrix, tuning)


def few_of(matrix: SparseMatrix) -> tuple[int, int]:
    """Row groups of a program of ``multiply_few``, and blocks of a tile; not measured against others."""
    return (8, 64) if matrix.height == 1 else (1, max(64, 2048 // matrix.height))


def tile_of(rows: int, dtype: torch.dtype, tuning: Tuning) -> tuple[int, int]:
    """Rows of a tile of ``multiply_many``, and blocks of it."""
    blocks = tuning.tiles_of_fp32 if dtype == torch.float32 else tuning.tiles_of_16_bits
    tall = min(max(blocks), max(16, power(rows)))
    return tall, next(kt for most, kt in sorted(blocks.items()) if tall <= most)
