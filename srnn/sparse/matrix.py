"""Sparse matrices in compressed rows: single elements, or N x 1 blocks that N consecutive rows share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from srnn.formats import DTYPES, PACKED_STRUCTURES, PackedStructure, Values, block_height

# Shares of the largest value that are tried as the largest representable one, 1 to 0.5: clipping a few outliers makes
# the steps of int8 finer for the rest.
CLIPS = tuple(1 - i / 20 for i in range(11))


@dataclass(frozen=True)
class SparseMatrix:
    """A sparse matrix of blocks N x 1; N = 1 is the element format.

    The rows of each gate are cut into groups of N consecutive rows; the last group of a gate may reach past it, and
    its values there are zero. A block is one column of a group.

    Example:
        >>> import torch
        >>> weight = torch.tensor([[0.0, 1.0, 0.0, 2.0], [0.0, 0.0, 3.0, 0.0]])
        >>> matrix = SparseMatrix.from_dense(weight)
        >>> matrix.blocks, matrix.columns.tolist(), matrix.row_pointers.tolist()
        (3, [1, 3, 2], [0, 2, 3])
        >>> torch.equal(matrix.to_dense(), weight)
        True

    Attributes:
        shape: (rows, columns).
        gates: parts the rows fall into, as torch stacks the gates of a GRU (3) or LSTM (4); rows are a multiple.
        values: [blocks, N], group after group, fp32, fp16, bf16 or int8.
        columns: [blocks], rising within a group; uint16 where all columns fit, else int32. Indices are most of what a
            sparse matrix costs beside its values, and what a kernel reads for each block.
        row_pointers: int32 of groups + 1; group ``i`` owns blocks ``row_pointers[i]`` to ``row_pointers[i + 1]``.
        scales: fp32 of groups, which int8 values are multiplied by; None for other values.
    """

    shape: tuple[int, int]
    gates: int
    values: Tensor
    columns: Tensor
    row_pointers: Tensor
    scales: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # As signed numbers of the same bits: torch writes unsigned ones into a plain pickle, and cannot read them.
        signed = self.columns.view(torch.int16) if self.columns.dtype == torch.uint16 else self.columns
        return self.__dict__ | {"columns": signed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        columns = state["columns"]
        self.__dict__.update(state)
        if columns.dtype == torch.int16:
            self.__dict__["columns"] = columns.view(torch.uint16)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        structure: PackedStructure | Literal["auto"] = "element",
        values: Values = "fp32",
        gates: int = 1,
        energy: Tensor | None = None,
    ) -> SparseMatrix:
        """Pack the non-zeros of a matrix; a block is stored if any of its entries is not zero.

        Args:
            weight: [rows, columns].
            structure: ``"auto"`` takes the one of fewest bytes.
            values: what they are stored as. int8 has a scale a row group.
            gates: parts the rows fall into; blocks do not cross them.
            energy: [columns], the mean square of what the matrix is multiplied with. int8 scales are then chosen for
                the least error of the product; without it each column counts the same.

        Raises:
            ValueError: not a matrix, rows no multiple of ``gates``, values that are NaN, infinite or out of the range
                of ``values``.
        """
        if weight.ndim != 2:
            raise ValueError(f"a sparse matrix has 2 dimensions, not {weight.ndim}")
        if weight.shape[0] % gates:
            raise ValueError(f"{weight.shape[0]} rows do not fall into {gates} gates")
        weight = weight.detach()
        if structure == "auto":
            structure = cheapest_structure(weight, values, gates)
        height = block_height(structure)
        # int8 is made from fp32 below, by group; the others are rounded here, so that what overflows is seen at once.
        kept = weight.float() if values == "int8" else weight.to(DTYPES[values])
        if not bool(kept.isfinite().all()):
            raise ValueError(f"holds values that are not finite in {values}")
        # The pattern is the weight's own: what rounds to zero is stored, as zero, so that counts stay what
        # pruning made them.
        used = _grouped(weight != 0, gates, height).any(dim=1)
        # Row by row, which is the order that compressed rows have.
        groups, columns = used.nonzero(as_tuple=True)
        pointers = torch.zeros(used.shape[0] + 1, dtype=torch.int32, device=weight.device)
        pointers[1:] = used.sum(dim=1).cumsum(0)
        blocks = _grouped(kept, gates, height)[groups, :, columns]
        scales = None
        if values == "int8":
            wide = torch.nn.functional.pad(kept.abs(), (0, 1))  # a maximum needs a column
            largest = _grouped(wide, gates, height).amax(dim=(1, 2))
            scales = _scales(blocks, groups, largest, None if energy is None else energy.float()[columns])
            blocks = _quantised(blocks, scales[groups, None]).to(torch.int8)
        index_dtype = torch.uint16 if weight.shape[1] <= 1 << 16 else torch.int32
        shape = (weight.shape[0], weight.shape[1])
        return cls(shape, gates, blocks.contiguous(), columns.to(index_dtype), pointers, scales)

    def to_dense(self) -> Tensor:
        """The matrix back, fp32 [rows, columns]: exact but for the rounding to the type of the values."""
        groups = self._groups_of_blocks()
        blocks = self.values.float() if self.scales is None else self.values.float() * self.scales[groups, None]
        grouped = torch.zeros(self.groups, self.height, self.shape[1], device=self.device, dtype=torch.float32)
        grouped[groups, :, self.columns.long()] = blocks
        # Without the rows by which the last group of each gate reaches past it.
        units = grouped.view(self.gates, self.groups // self.gates * self.height, self.shape[1])[:, : self.units]
        return units.reshape(self.shape).contiguous()

    def rows(self, numbers: Tensor) -> Tensor:
        """These rows of a matrix of one gate, dense: an embedding of these tokens.

        Args:
            numbers: row numbers, an integer tensor of one dimension, on the matrix's device.

        Returns:
            fp32 [len(numbers), columns].
        """
        if len(numbers) == 1:  # a stream, where each operation counts
            group, lane = divmod(int(numbers), self.height)
            first, last = self.row_pointers[group : group + 2].tolist()
            one = self.values[first:last, lane].float()
            row = torch.zeros(1, self.shape[1], device=self.device, dtype=torch.float32)
            row[0, self.columns[first:last].long()] = one if self.scales is None else one * self.scales[group]
            return row
        # All rows without a loop: how many blocks each has, then one list of (row, block) pairs for all of them.
        groups, lanes = numbers.long() // self.height, numbers.long() % self.height
        starts = self.row_pointers.long()[groups]
        counts = self.row_pointers.long()[groups + 1] - starts
        row = torch.repeat_interleave(torch.arange(len(numbers), device=self.device), counts)
        # counts.cumsum(0) - counts is where a row begins in that list; starts, where it begins in the matrix.
        block = torch.arange(len(row), device=self.device) + (starts + counts - counts.cumsum(0))[row]
        values = self.values[block, lanes[row]].float()
        dense = torch.zeros(len(numbers), self.shape[1], device=self.device, dtype=torch.float32)
        # As signed numbers, because torch cannot index unsigned ones on a GPU; the remainder makes 65,535 of -1 again.
        columns = self.columns.view(torch.int16) if self.columns.dtype == torch.uint16 else self.columns
        column = columns[block].long() % (1 << 8 * columns.element_size())
        dense[row, column] = values if self.scales is None else values * self.scales[groups[row]]
        return dense

    @property
    def height(self) -> int:
        """N: rows of a block."""
        return self.values.shape[1]

    @property
    def units(self) -> int:
        """Rows of a gate."""
        return self.shape[0] // self.gates

    @property
    def groups(self) -> int:
        """Row groups of all gates."""
        return self.gates * -(-self.units // self.height)

    @property
    def structure(self) -> PackedStructure:
        """``element`` or ``Nx1``."""
        return "element" if self.height == 1 else f"{self.height}x1"  # type: ignore[return-value]

    @property
    def values_name(self) -> Values:
        """fp32, fp16, bf16 or int8."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.values.dtype)

    @property
    def device(self) -> torch.device:
        """Where it lives."""
        return self.values.device

    @property
    def parts(self) -> dict[str, Tensor]:
        """Its tensors by name, ``scales`` only where there are any."""
        parts = {"values": self.values, "columns": self.columns, "row_pointers": self.row_pointers}
        return parts if self.scales is None else parts | {"scales": self.scales}

    @property
    def blocks(self) -> int:
        """Stored blocks."""
        return self.values.shape[0]

    @property
    def entries(self) -> int:
        """Stored values, padding and zeros inside blocks included."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def to(self, device: torch.device | str) -> SparseMatrix:
        """The same matrix on a device."""
        parts: dict[str, Any] = {name: part.to(device) for name, part in self.parts.items()}
        return replace(self, **parts)

    def gate(self, index: int) -> SparseMatrix:
        """The rows of one gate, as a matrix of one gate; shares memory. Raises IndexError where there is none."""
        if not 0 <= index < self.gates:
            raise IndexError(f"gate {index} of {self.gates}")
        per_gate = self.groups // self.gates
        return self._slice(index * per_gate, (index + 1) * per_gate, self.units)

    def __getitem__(self, rows: slice) -> SparseMatrix:
        """Consecutive rows within one gate, from and to a boundary of a row group; shares the memory of values.

        Raises:
            TypeError: not a slice.
            ValueError: rows that cut through a group or reach into another gate, or a step.
        """
        if not isinstance(rows, slice):
            raise TypeError("a sparse matrix is sliced by rows: matrix[16:32]")
        start, stop, step = rows.indices(self.shape[0])
        stop = max(start, stop)
        gate, first = divmod(start, self.units) if self.units else (0, 0)
        last = stop - gate * self.units
        if step != 1 or first % self.height or (last % self.height and last != self.units) or last > self.units:
            raise ValueError(f"rows {start} to {stop} do not lie on the row groups of {self.height} within a gate")
        begin = gate * (self.groups // self.gates) + first // self.height
        return self._slice(begin, begin + -(-(stop - start) // self.height), stop - start)

    def _slice(self, begin: int, end: int, rows: int) -> SparseMatrix:
        # Blocks of consecutive groups lie together, so a slice of rows is a slice of blocks; only pointers are new.
        first, last = int(self.row_pointers[begin]), int(self.row_pointers[end])
        return SparseMatrix(
            (rows, self.shape[1]),
            1,
            self.values[first:last],
            self.columns[first:last],
            self.row_pointers[begin : end + 1] - first,
            None if self.scales is None else self.scales[begin:end],
        )

    def _groups_of_blocks(self) -> Tensor:
        counts = self.row_pointers.diff().long()
        groups = torch.arange(self.groups, device=counts.device)
        return torch.repeat_interleave(groups, counts, output_size=self.blocks)

    def check(self) -> None:
        """Check data from outside, before kernels that check nothing read memory by its indices.

        Raises:
            ValueError: a size, type, index or value that ``from_dense`` cannot have made; says which.
        """
        rows, columns = self.shape
        if rows < 0 or columns < 0 or self.gates < 1 or rows % self.gates:
            raise ValueError(f"rows {rows}, columns {columns} and gates {self.gates} do not fit")
        if self.values.dtype not in DTYPES.values() or self.values.ndim != 2 or self.structure not in PACKED_STRUCTURES:
            raise ValueError("values must be [blocks, N] of fp32, fp16, bf16 or int8, N 1, 4, 8, 16 or 32")
        if self.columns.dtype not in (torch.uint16, torch.int32) or self.columns.shape != (self.blocks,):
            raise ValueError("columns must be uint16 or int32, one a block")
        if self.row_pointers.dtype != torch.int32 or self.row_pointers.shape != (self.groups + 1,):
            raise ValueError(f"row_pointers must be {self.groups + 1} int32")
        pointers = self.row_pointers.long()
        if pointers[0] != 0 or pointers[-1] != self.blocks or bool((pointers.diff() < 0).any()):
            raise ValueError("row_pointers must rise from 0 to the number of blocks")
        wide = self.columns.long()  # torch has no minimum of uint16
        if self.blocks and not (int(wide.min()) >= 0 and int(wide.max()) < columns):
            raise ValueError("a column is out of range")
        # Twice the same column would count twice in a product, and once in ``to_dense``.
        if bool((wide.diff()[self._groups_of_blocks().diff() == 0] <= 0).any()):
            raise ValueError("columns must rise within a row group")
        self._check_values()

    def _check_values(self) -> None:
        if (self.values.dtype == torch.int8) != (self.scales is not None):
            raise ValueError("int8 values, and only they, have scales")
        if self.scales is not None:
            if self.scales.dtype != torch.float32 or self.scales.shape != (self.groups,):
                raise ValueError(f"scales must be {self.groups} fp32")
            if not bool((self.scales.isfinite() & (self.scales > 0)).all()):
                raise ValueError("a scale is not a positive number")
        elif not bool(self.values.isfinite().all()):
            raise ValueError("a value is not finite")
        beyond = self.units % self.height
        if beyond:
            # Kernels add up whole blocks, so what reaches past a gate must not count.
            last = (self._groups_of_blocks() + 1) % (self.groups // self.gates) == 0
            if bool((self.values[last, beyond:] != 0).any()):
                raise ValueError("a value past the end of a gate is not zero")


def stacked(matrices: Sequence[SparseMatrix]) -> SparseMatrix:
    """Matrices below each other, which must have the same columns, structure and values; each keeps its gates."""
    first = matrices[0]
    pointers = [first.row_pointers]
    for matrix in matrices[1:]:
        pointers.append(matrix.row_pointers[1:] + pointers[-1][-1])
    return SparseMatrix(
        (sum(matrix.shape[0] for matrix in matrices), first.shape[1]),
        sum(matrix.gates for matrix in matrices),
        torch.cat([matrix.values for matrix in matrices]),
        # By way of int32, because torch has few operations on uint16.
        torch.cat([matrix.columns.to(torch.int32) for matrix in matrices]).to(first.columns.dtype),
        torch.cat(pointers),
        None if first.scales is None else torch.cat([m.scales for m in matrices if m.scales is not None]),
    )


def cheapest_structure(weight: Tensor, values: Values = "fp32", gates: int = 1) -> PackedStructure:
    """The structure that stores a matrix in the fewest bytes; the tallest of equals."""
    return min(reversed(PACKED_STRUCTURES), key=lambda structure: packed_nbytes(weight, structure, values, gates))


def packed_nbytes(weight: Tensor, structure: PackedStructure, values: Values = "fp32", gates: int = 1) -> int:
    """Bytes that ``SparseMatrix.from_dense`` with the same arguments would take, without making it."""
    height = block_height(structure)
    used = _grouped(weight.detach() != 0, gates, height).any(dim=1)
    index_bytes = 2 if weight.shape[1] <= 1 << 16 else 4
    block_bytes = height * torch.empty((), dtype=DTYPES[values]).element_size() + index_bytes
    return int(used.sum()) * block_bytes + 4 * (used.shape[0] + 1) + (4 * used.shape[0] if values == "int8" else 0)


def has_structure(weight: Tensor, structure: PackedStructure, values: Values = "fp32", gates: int = 1) -> bool:
    """Whether a matrix is pruned in these blocks: they cost no more bytes than its single elements would."""
    return packed_nbytes(weight, structure, values, gates) <= packed_nbytes(weight, "element", values, gates)


def _grouped(weight: Tensor, gates: int, height: int) -> Tensor:
    """[groups, N, columns], the end of each gate filled up with zeros."""
    units, columns = weight.shape[0] // gates, weight.shape[1]
    per_gate = weight.reshape(gates, units, columns)
    beyond = -units % height
    if beyond:
        per_gate = torch.cat([per_gate, per_gate.new_zeros(gates, beyond, columns)], dim=1)
    return per_gate.reshape(gates * ((units + beyond) // height), height, columns)


def _quantised(blocks: Tensor, scales: Tensor) -> Tensor:
    # -128 is left out, so that the steps are symmetric and the negative of a value has the same size.
    return (blocks / scales).round().clamp(-127, 127)


def _scales(blocks: Tensor, groups: Tensor, largest: Tensor, energy: Tensor | None) -> Tensor:
    """The scale of each group, of those that clip at a share of its largest value, with the least squared error."""
    # Groups of zeros only, and those of numbers so small that the division would overflow.
    largest = largest.clamp(min=256 * torch.finfo(torch.float32).tiny)
    best = torch.full_like(largest, torch.inf)
    scales = largest / 127
    # The best clip is found by trying: the error has no closed form, and 11 passes are cheap, once a packing. Strictly
    # less, so that of equals the first stays, which clips nothing.
    for clip in CLIPS:
        tried = largest * clip / 127
        error = (blocks - _quantised(blocks, tried[groups, None]) * tried[groups, None]).square().sum(dim=1)
        sums = torch.zeros_like(largest)
        sums.index_add_(0, groups, error if energy is None else error * energy)
        better = sums < best
        scales, best = torch.where(better, tried, scales), torch.where(better, sums, best)
    return scales
