"""Sparse matrix formats: dense <-> packed. No kernels."""

from srnn.sparse.element import DTYPES, ElementMatrix, Values

__all__ = ["DTYPES", "ElementMatrix", "Values"]
