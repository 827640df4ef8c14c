"""Sparse matrix formats: dense <-> packed, sizes, slicing. No kernels."""

from srnn.sparse.matrix import (
    DTYPES,
    STRUCTURES,
    SparseMatrix,
    Structure,
    Values,
    cheapest_structure,
    has_structure,
    packed_nbytes,
    stacked,
)

__all__ = [
    "DTYPES",
    "STRUCTURES",
    "SparseMatrix",
    "Structure",
    "Values",
    "cheapest_structure",
    "has_structure",
    "packed_nbytes",
    "stacked",
]
