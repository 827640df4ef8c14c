"""What the plans and layouts of all forms share: directions side by side, sizes in powers of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from srnn.sparse import SparseMatrix, stacked


def joined(matrices: Sequence[SparseMatrix]) -> SparseMatrix:
    """One matrix whose gates hold the row groups of all directions, one after the other."""
    if len(matrices) == 1:
        return matrices[0]
    parts = [matrix.gate(gate) for gate in range(matrices[0].gates) for matrix in matrices]
    rows = sum(part.groups * part.height for part in parts)
    return replace(stacked(parts), gates=matrices[0].gates, shape=(rows, parts[0].shape[1]))


def power(n: int) -> int:
    """The least power of two that is not under n."""
    return 1 << max(0, n - 1).bit_length()


def two_powers(n: int, least: int) -> tuple[int, int]:
    """Two powers of two of at least ``least``, or one and 0, of the smallest sum that holds n."""
    whole = max(least, power(n))
    half, rest = whole // 2, max(least, power(n - whole // 2))
    return (half, rest) if half >= least and half + rest < whole else (whole, 0)
