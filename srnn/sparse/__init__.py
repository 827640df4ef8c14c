"""Sparse matrix formats: dense <-> packed, sizes, slicing. No kernels."""

from srnn.formats import DTYPES, PACKED_STRUCTURES, PackedStructure, Values
from srnn.sparse.matrix import SparseMatrix, cheapest_structure, has_structure, packed_nbytes, stacked

__all__ = [
    "DTYPES",
    "PACKED_STRUCTURES",
    "PackedStructure",
    "SparseMatrix",
    "Values",
    "cheapest_structure",
    "has_structure",
    "packed_nbytes",
    "stacked",
]
