"""How weights lie in memory for ``recur_slices``: by program, in chunks of blocks of one gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srnn.kernels.triton.arrange import joined
from srnn.kernels.triton.slices.plan import SlicePlan
from srnn.sparse import SparseMatrix


@dataclass(frozen=True)
class SliceLayout:
    """A plan, and the weights as it takes them; the second parts are empty where ``k_2`` is 0.

    Attributes:
        plan: its sizes.
        values: of the blocks of each chunk.
        columns: of these blocks; -1 for none.
        values_2: of the blocks beyond ``k``.
        columns_2: of these blocks.
        units: that a program has.
    """

    plan: SlicePlan
    values: Tensor
    columns: Tensor
    values_2: Tensor
    columns_2: Tensor
    units: Tensor

    def to(self, device: torch.device) -> SliceLayout:
        """On a device."""
        parts = (self.values, self.columns, self.values_2, self.columns_2, self.units)
        return SliceLayout(self.plan, *(part.to(device) for part in parts))


@dataclass(frozen=True)
class DealtBlocks:
    """Where each block of all directions belongs.

    Attributes:
        matrix: of all directions.
        programs: of all directions.
        gate: of each block.
        program: of each block.
        part: of its program's groups, the number of the block's.
        within: number of the block in its row group.
    """

    matrix: SparseMatrix
    programs: int
    gate: np.ndarray
    program: np.ndarray
    part: np.ndarray
    within: np.ndarray

    @classmethod
    def of(cls, matrices: Sequence[SparseMatrix], plan: SlicePlan) -> DealtBlocks:
        """Deal the blocks of matrices, [G, H] of each direction, on the CPU."""
        matrix, directions = joined(matrices), len(matrices)
        groups = matrices[0].groups // matrix.gates
        pointers = matrix.row_pointers.numpy().astype(np.int64)
        counts = np.diff(pointers)
        row = np.repeat(np.arange(len(counts)), counts)  # of each block
        gate, group = row // (directions * groups), row % (directions * groups)
        program = group // groups * plan.programs + group % groups // plan.each
        within = np.arange(len(row)) - pointers[row]
        return cls(matrix, plan.programs * directions, gate, program, group % groups % plan.each, within)


def lay_out_slices(matrices: Sequence[SparseMatrix], plan: SlicePlan, dtype: torch.dtype) -> SliceLayout:
    """Deal the blocks of each row group out to the chunks of its gate.

    Args:
        matrices: [G, H] of each direction, on the CPU.
        plan: of these matrices.
        dtype: of the layers' inputs, which values are rounded to.
    """
    dealt = DealtBlocks.of(matrices, plan)
    if dealt.matrix.gates == 1:
        chunk, k = dealt.within % plan.chunks, dealt.within // plan.chunks
    else:  # a warp's chunks are of one gate: chunk s is warp s % warps's
        share, each = plan.chunks // 4, max(1, plan.warps // 4)
        number, k = dealt.within % share, dealt.within // share
        chunk = number // each * plan.warps + dealt.gate * each + number % each
    layout = placed(dealt, plan, chunk, k, dtype)
    # Of taller chunks products want the values of a row side by side.
    values, values_2 = (part.transpose(1, 2).contiguous() for part in (layout.values, layout.values_2))
    return SliceLayout(plan, values, layout.columns, values_2, layout.columns_2, layout.units)


def placed(dealt: DealtBlocks, plan: SlicePlan, chunk: np.ndarray, k: np.ndarray, dtype: torch.dtype) -> SliceLayout:
    """The k-th block of each chunk at its place.

    Args:
        dealt: the blocks.
        plan: of their matrices.
        chunk: number of each block's in its program.
        k: number of each block in its chunk.
        dtype: that values are rounded to.

    Returns:
        Values are [programs * tiles * chunks, k, N].
    """
    matrix, chunks = dealt.matrix, dealt.programs * plan.chunks
    values, columns = matrix.values.to(dtype), matrix.columns.to(torch.int32).to(torch.int16)

    def filled(chosen: np.ndarray, where: np.ndarray, k: np.ndarray, chunks: int, size: int) -> tuple[Tensor, Tensor]:
        number, at = (torch.from_numpy(part[chosen]) for part in (where, k))
        blocks = torch.zeros(chunks, size, matrix.height, dtype=dtype)
        blocks[number, at] = values[torch.from_numpy(chosen)]
        column = torch.full((chunks, size), -1, dtype=torch.int16)
        column[number, at] = columns[torch.from_numpy(chosen)]
        return blocks, column

    first = k < plan.tiles * plan.k
    tile = np.where(first, k // plan.k, 0)
    place = (dealt.program * plan.tiles + tile) * plan.chunks + chunk
    main = filled(first, place, k % plan.k, chunks * plan.tiles, plan.k)
    rest = filled(~first, dealt.program * plan.chunks + chunk, k - plan.k, chunks, plan.k_2)
    units = torch.arange(plan.programs * plan.each * matrix.height, dtype=torch.int32)
    units = units.view(plan.programs, plan.each, -1).transpose(1, 2).flatten().repeat(dealt.programs // plan.programs)
    return SliceLayout(plan, *main, *rest, units)
