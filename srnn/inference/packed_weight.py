"""What sparse modules hold: a packed matrix, of several where layers of a network share it; biases they share."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from srnn.sparse import SparseMatrix


class PackedWeight(nn.Module):
    """A sparse matrix as buffers, so that it is part of its module's ``state_dict``.

    Attributes:
        owners: the sparse modules that hold it; several where layers of the network share a weight.
    """

    def __init__(self, matrix: SparseMatrix) -> None:
        super().__init__()
        self.shape, self.gates = matrix.shape, matrix.gates
        self.owners: WeakSet[Any] = WeakSet()
        for name in ("values", "columns", "row_pointers", "scales"):
            self.register_buffer(name, matrix.parts.get(name))

    @property
    def matrix(self) -> SparseMatrix:
        """The matrix; shares memory."""
        b = self._buffers
        values, columns, pointers = b["values"], b["columns"], b["row_pointers"]
        assert values is not None
        assert columns is not None
        assert pointers is not None
        return SparseMatrix(self.shape, self.gates, values, columns, pointers, b["scales"])

    def __getstate__(self) -> dict[str, Any]:
        # As signed numbers of the same bits: torch writes unsigned ones into a plain pickle, and cannot read them.
        state = dict(self.__dict__) | {"owners": None}
        columns = state["_buffers"]["columns"]
        if columns is not None and columns.dtype == torch.uint16:
            state["_buffers"] = state["_buffers"] | {"columns": columns.view(torch.int16)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.owners = WeakSet()  # each adds itself again
        columns = self._buffers["columns"]
        if columns is not None and columns.dtype == torch.int16:
            self._buffers["columns"] = columns.view(torch.uint16)

    def extra_repr(self) -> str:
        """Shape, format, density."""
        matrix, (rows, columns) = self.matrix, self.shape
        density = matrix.entries / max(1, rows * columns)
        return f"{rows}x{columns}, {matrix.structure}, {matrix.values_name}, density={density:.3f}"


class Tied:
    """The sparse modules of a network that share biases, which stay one tensor each, as shared parameters do.

    Attributes:
        owners: the modules.
    """

    def __init__(self) -> None:
        self.owners: WeakSet[Any] = WeakSet()

    def __reduce__(self) -> tuple[type[Tied], tuple[()]]:
        return Tied, ()  # a copy's owners are the copied modules, which add themselves
