"""The constant arrays of a C file: packed matrices with 8-bit column gaps, and biases.

A matrix is stored in the order in which a layer reads it: a chunk of units at a time, and of each chunk all gates, so
that a layer needs no memory for the sums of its gates beyond one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srnn.formats import Values
from srnn.sparse import SparseMatrix

WIDEST_GAP = 255  # a column further on is reached by way of blocks of zeros
_C_TYPES = {"fp32": "float", "fp16": "int16_t", "bf16": "int16_t", "int8": "int8_t"}
_NUMPY_TYPES: dict[str, str] = {
    "uint8": "uint8_t",
    "uint16": "uint16_t",
    "uint32": "uint32_t",
    "int8": "int8_t",
    "int16": "int16_t",
    "int32": "int32_t",
}
# Elements of a row, on average: longer ones take a fifth less time with four sums, shorter ones more.
_LONG_ROW = 64
_LINE = 100
WIDE = 64  # values of fewer than 32 bits that a product with blocks widens at a time
INT8_TABLE = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)


@dataclass(frozen=True)
class StoredForm:
    """How a matrix is stored; matrices of one form share a function of the C file.

    Attributes:
        height: rows of a block.
        values: fp32, fp16, bf16 or int8.
        counts: C type of the number of blocks of a row group; None where every column is stored, without gaps.
        long_rows: whether the elements of a row are many, so that more sums pay.
    """

    height: int
    values: Values
    counts: str | None
    long_rows: bool = False

    @property
    def name(self) -> str:
        """A part of C names: ``element_int8``, ``16x1_fp32_all``."""
        shape = "element" if self.height == 1 else f"{self.height}x1"
        every = {None: "_all", "uint8_t": "", "uint16_t": "_long", "uint32_t": "_longer"}[self.counts]
        return f"{shape}_{self.values}{every}" + "_by_4" * self.long_rows

    @property
    def c_type(self) -> str:
        """C type of a stored value."""
        return _C_TYPES[self.values]

    @property
    def by_table(self) -> bool:
        """Whether a value is looked up as a float, in a table of a kilobyte: a single int8 element.

        That takes a tenth less time than to convert it; chips without an FPU convert slowly.
        """
        return self.height == 1 and self.values == "int8"

    @property
    def stack(self) -> int:
        """Bytes of a product's sums, and of the values that it widens at a time."""
        return 4 * (self.height + (WIDE if self.height > 1 and self.values != "fp32" else 0))


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix as its arrays.

    Attributes:
        form: how it is stored.
        rows: of the matrix.
        columns: of the matrix.
        arrays: name -> numbers: ``values``, and where there are any ``gaps``, ``counts``, ``scales``.
        order: the matrix's row groups in the order in which they are stored.
    """

    form: StoredForm
    rows: int
    columns: int
    arrays: dict[str, np.ndarray]
    order: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def multiply_adds(self) -> int:
        """Of a product with one vector, zeros inside blocks included."""
        return int(self.arrays["values"].size)

    @property
    def starts(self) -> np.ndarray:
        """Where the blocks of each row group begin, for an embedding, which reads one row."""
        if self.form.counts is None:
            raise ValueError("a matrix that stores every column needs no starts")
        ends = np.concatenate([[0], np.cumsum(self.arrays["counts"], dtype=np.int64)])
        return ends.astype(smallest_unsigned(int(ends[-1])))


def smallest_unsigned(largest: int) -> np.dtype:
    """The narrowest unsigned type that holds a number."""
    return np.dtype(np.uint8 if largest < 1 << 8 else np.uint16 if largest < 1 << 16 else np.uint32)


def stored_matrix(matrix: SparseMatrix, chunk: int) -> StoredMatrix:
    """A matrix in the order in which a layer of ``chunk`` units at a time reads it.

    All of it is stored, zeros too, where that takes fewer bytes than non-zeros and their columns.

    Args:
        matrix: packed.
        chunk: units; a multiple of the blocks' height, or not less than the rows of a gate.
    """
    order = _order(matrix, chunk)
    pointers = matrix.row_pointers.numpy().astype(np.int64)
    starts, counts = pointers[:-1][order], np.diff(pointers)[order]
    group = np.repeat(np.arange(matrix.groups), counts)  # of each block
    begin = np.cumsum(counts) - counts  # where each group begins in the new order; blocks within a group stay
    block = starts[group] - begin[group] + np.arange(matrix.blocks)
    values, columns = _bits(matrix.values)[block], matrix.columns.to(torch.int64).numpy()[block]
    scales = {} if matrix.scales is None else {"scales": matrix.scales.numpy()[order]}
    gaps = np.diff(columns, prepend=0)
    gaps[begin[counts > 0]] = columns[begin[counts > 0]]
    fillers = np.maximum(0, (gaps - 1) // WIDEST_GAP)
    rows, width = matrix.shape
    taken = (matrix.blocks + int(fillers.sum())) * (1 + matrix.height * values.itemsize) + matrix.groups
    if matrix.groups * width * matrix.height * values.itemsize <= taken:
        every = np.zeros((matrix.groups, width, matrix.height), dtype=values.dtype)
        every[group, columns] = values
        return StoredMatrix(
            StoredForm(matrix.height, matrix.values_name, None),
            rows,
            width,
            {"values": every.reshape(-1)} | scales,
            order,
        )
    counts = counts + np.bincount(group, weights=fillers, minlength=matrix.groups).astype(np.int64)
    arrays = _with_fillers(values, gaps, fillers)
    narrow = smallest_unsigned(int(counts.max(initial=0)))
    long_rows = matrix.height == 1 and matrix.blocks > _LONG_ROW * matrix.groups
    form = StoredForm(matrix.height, matrix.values_name, _NUMPY_TYPES[narrow.name], long_rows)
    return StoredMatrix(form, rows, width, {"counts": counts.astype(narrow)} | arrays | scales, order)


def _with_fillers(values: np.ndarray, gaps: np.ndarray, fillers: np.ndarray) -> dict[str, np.ndarray]:
    """Blocks and gaps with so many blocks of zeros before each block as its gap needs."""
    place = np.cumsum(fillers + 1) - 1
    blocks = int(place[-1]) + 1 if len(place) else 0
    filled = np.zeros((blocks, values.shape[1]), dtype=values.dtype)
    filled[place] = values
    steps = np.full(blocks, WIDEST_GAP, dtype=np.uint8)
    steps[place] = gaps - WIDEST_GAP * fillers
    return {"gaps": steps, "values": filled.reshape(-1)}


def _order(matrix: SparseMatrix, chunk: int) -> np.ndarray:
    """Row groups in the order of reading: chunk after chunk, in each gate after gate."""
    of_gate = matrix.groups // matrix.gates
    numbers = np.arange(matrix.groups).reshape(matrix.gates, of_gate)
    step = max(1, -(-chunk // matrix.height))
    parts = [numbers[:, begin : begin + step].reshape(-1) for begin in range(0, of_gate, step)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _bits(values: Tensor) -> np.ndarray:
    """Values as numpy holds them; the 16-bit floats, which C99 has no type for, as their bits."""
    if values.dtype in (torch.float16, torch.bfloat16):
        return values.view(torch.int16).numpy()
    return values.numpy()


def declaration(name: str, numbers: np.ndarray) -> str:
    """A constant array in C. C has no empty arrays: one that is empty holds a zero that nobody reads."""
    c_type = "float" if numbers.dtype == np.float32 else _NUMPY_TYPES[numbers.dtype.name]
    shown = [_number(value) for value in numbers] if c_type == "float" else list(map(str, numbers.tolist()))
    lines, line = [], ""
    for number in shown or ["0"]:
        if len(line) + len(number) >= _LINE:
            lines.append(line)
            line = ""
        line += f"{number},"
    body = "\n".join([*lines, line.rstrip(",")])
    return f"static const {c_type} {name}[{max(1, len(numbers))}] = {{\n{body}\n}};\n"


def _number(value: np.float32) -> str:
    """The shortest decimal number that is read back as the same float."""
    return f"{np.format_float_scientific(value, unique=True, trim='0', exp_digits=1)}f" if value else "0.0f"
