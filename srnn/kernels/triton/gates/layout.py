"""How weights lie in memory for ``recur_gates``: by program, all blocks of a gate of a group side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srnn.kernels.triton.gates.plan import GatePlan
from srnn.kernels.triton.slices.layout import DealtBlocks, SliceLayout, placed
from srnn.sparse import SparseMatrix


def lay_out_gates(matrices: Sequence[SparseMatrix], plan: GatePlan, dtype: torch.dtype) -> SliceLayout:
    """Each row group is a chunk of its own; those of a gate that a program has two groups of are neighbours.

    Args:
        matrices: [G, H] of each direction, on the CPU.
        plan: of these matrices.
        dtype: of the layers' inputs, which values are rounded to.
    """
    dealt = DealtBlocks.of(matrices, plan)
    return placed(dealt, plan, dealt.gate * plan.each + dealt.part, dealt.within, dtype)
