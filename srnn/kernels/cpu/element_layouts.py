"""Single elements laid out for the products of ``element_products``; the packed file stays as it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srnn.kernels.cpu.compiled import code_of, numbers
from srnn.kernels.cpu.shapes import (
    ROWS_OF_DENSE,
    ROWS_OF_WINDOWS,
    SLOTS_OF_DENSE,
    SLOTS_OF_WINDOWS,
    WINDOW,
    Array,
    padded_width,
)
from srnn.sparse import SparseMatrix

# Rows that are sorted by length together. Rows side by side take as many slots as the longest, so that sorting saves a
# tenth of them at 256 units and 90 %; sorting 256 rows saves no more.
SORTED = 128
ROWS_OF_GATHERS, SLOTS_OF_GATHERS = 8, 2


@dataclass(frozen=True)
class ElementLayout:
    """A matrix of single elements, its rows side by side.

    Attributes:
        lanes: rows of a row group, sorted among themselves; the last group of a gate may reach past it.
        order: int32 [rows], where in its group each sorted row came from.
        turns: int32, the turns of the loop that each set of rows side by side begins with.
        values: [slots, rows side by side], as stored in the matrix, zero where a row has no entry.
        columns: of each value; for windows, places as bytes [turns, rows, slots of a turn].
        bases: int32 [slots], first columns of windows; empty for gathers.
        scales: fp32 [rows], of int8 values.
    """

    lanes: int
    order: Tensor
    turns: Tensor
    values: Tensor
    columns: Tensor
    bases: Tensor
    scales: Tensor | None

    @property
    def work(self) -> Array:
        """Entries of each row group, zeros that fill slots included."""
        sets = self.turns.numpy()[:: self.lanes // self._together]
        return np.diff(sets) * (len(self.values) // max(1, int(self.turns[-1]))) * self._together

    @property
    def _together(self) -> int:
        return self.values.shape[1]


def windows(matrix: SparseMatrix) -> ElementLayout:
    """For AVX-512: slots of 16 rows whose columns lie within 32 of each other.

    A window begins at the first column that any of its rows still has to take, to a cache line; rows that have an entry
    in it take one, the others wait. At 90 % two thirds of the slots are filled; fixed tiles of 32 columns fill half.
    """
    lanes, order, rows = _sorted_rows(matrix)
    pointers, columns = matrix.row_pointers.numpy(), matrix.columns.to(torch.int32).numpy()
    last = padded_width(matrix.shape[1]) - WINDOW
    turns = np.zeros(len(rows) // ROWS_OF_WINDOWS + 1, np.int32)
    fill = code_of("fill_windows")
    given = [array.ctypes.data for array in (pointers, columns, rows)] + [len(rows), last, turns.ctypes.data]
    fill(numbers(*given, 0, 0, 0))
    slots = int(turns[-1]) * SLOTS_OF_WINDOWS
    # torch's memory begins at a cache line.
    bases = torch.empty(slots, dtype=torch.int32)
    places = torch.zeros(slots // SLOTS_OF_WINDOWS, ROWS_OF_WINDOWS, SLOTS_OF_WINDOWS, dtype=torch.uint8)
    sources = np.full((slots, ROWS_OF_WINDOWS), matrix.blocks, np.int32)
    fill(numbers(*given, bases.data_ptr(), places.data_ptr(), sources.ctypes.data))
    values = _with_zero(matrix.values)[torch.from_numpy(sources)]
    return ElementLayout(lanes, order, torch.from_numpy(turns), values, places, bases, _scales(matrix, rows))


def gathers(matrix: SparseMatrix) -> ElementLayout:
    """For AVX2: slots of 8 rows, the first entry of each, the second of each, and so on."""
    lanes, order, rows = _sorted_rows(matrix)
    pointers = np.append(matrix.row_pointers.numpy().astype(np.int64), matrix.blocks)  # row -1 begins and ends there
    rows = rows.reshape(-1, ROWS_OF_GATHERS)
    begins = np.where(rows < 0, matrix.blocks, pointers[rows])
    lengths = np.where(rows < 0, 0, pointers[rows + 1] - begins)
    turns = np.append(0, np.cumsum(-(-lengths.max(axis=1) // SLOTS_OF_GATHERS)))
    which = np.repeat(np.arange(len(rows)), np.diff(turns) * SLOTS_OF_GATHERS)
    entry = (np.arange(len(which)) - turns[which] * SLOTS_OF_GATHERS)[:, None]
    sources = torch.from_numpy(np.where(entry < lengths[which], begins[which] + entry, matrix.blocks))
    columns = _with_zero(matrix.columns.view(torch.int16) if matrix.columns.dtype == torch.uint16 else matrix.columns)
    return ElementLayout(
        lanes,
        order,
        torch.from_numpy(turns.astype(np.int32)),
        _with_zero(matrix.values)[sources],
        columns[sources],
        torch.zeros(0, dtype=torch.int32),
        _scales(matrix, rows.reshape(-1)),
    )


def dense(matrix: SparseMatrix) -> ElementLayout:
    """Slots of 16 rows and one column each, zeros included, in fp32; of blocks, too."""
    columns = matrix.shape[1]
    per_gate, turns = -(-matrix.units // ROWS_OF_DENSE), -(-columns // SLOTS_OF_DENSE)
    whole = torch.zeros(matrix.gates, per_gate * ROWS_OF_DENSE, turns * SLOTS_OF_DENSE, dtype=torch.float32)
    whole[:, : matrix.units, :columns] = matrix.to_dense().view(matrix.gates, matrix.units, columns)
    values = whole.view(-1, ROWS_OF_DENSE, turns * SLOTS_OF_DENSE).transpose(1, 2).reshape(-1, ROWS_OF_DENSE)
    begins = torch.arange(matrix.gates * per_gate + 1, dtype=torch.int32) * turns
    none = torch.zeros(0, dtype=torch.int32)
    return ElementLayout(ROWS_OF_DENSE, none, begins, values.contiguous(), none, none, None)


def _sorted_rows(matrix: SparseMatrix) -> tuple[int, Tensor, Array]:
    """Rows of a row group; where in its group each sorted row comes from; and its number in the matrix, -1 for none."""
    sizes = (SORTED >> i for i in range(SORTED.bit_length()))  # the largest that leaves few rows of a group empty
    lanes = next(n for n in sizes if n == ROWS_OF_WINDOWS or -matrix.units % n <= matrix.units // 8)
    per_gate = -(-matrix.units // lanes)
    units = np.full((matrix.gates, per_gate * lanes), -1, np.int64)
    units[:, : matrix.units] = np.arange(matrix.shape[0]).reshape(matrix.gates, matrix.units)
    lengths = np.append(np.diff(matrix.row_pointers.numpy()), -1)  # of no row: sorted last
    units = units.reshape(-1, lanes)
    order = np.argsort(-lengths[units], axis=1, kind="stable")
    return lanes, torch.from_numpy(order.astype(np.int32).ravel()), np.take_along_axis(units, order, 1).ravel()


def _with_zero(values: Tensor) -> Tensor:
    """One more entry, zero, for what has none."""
    return torch.cat([values.reshape(-1), values.new_zeros(1)])


def _scales(matrix: SparseMatrix, rows: Array) -> Tensor | None:
    if matrix.scales is None:
        return None
    return torch.cat([matrix.scales, matrix.scales.new_zeros(1)])[torch.from_numpy(rows)]
