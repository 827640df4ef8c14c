"""Which form runs several streams at a time: ``slices``, with weights in registers or in the cache, or ``gates``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from srnn.kernels.triton.chip import Chip
from srnn.kernels.triton.gates.layout import lay_out_gates
from srnn.kernels.triton.gates.plan import GatePlan, gates_are_faster, plan_gates
from srnn.kernels.triton.slices.layout import SliceLayout, lay_out_slices
from srnn.kernels.triton.slices.plan import SlicePlan, Workload, plan_from_cache, plan_slices
from srnn.sparse import SparseMatrix


def plan_streams(work: Workload, chip: Chip) -> SlicePlan:
    """Sizes for matrices of 16x1 or 32x1 blocks; whether they fit the device is still to be asked."""
    by_gate, slices = plan_gates(work, chip), plan_slices(work, chip)
    if slices is not None:
        return by_gate if by_gate is not None and gates_are_faster(work, slices, chip) else slices
    if by_gate is not None and work.streams > chip.tuning.one_by_one:
        return by_gate
    return plan_from_cache(work, chip)


def lay_out_streams(matrices: Sequence[SparseMatrix], plan: SlicePlan, dtype: torch.dtype) -> SliceLayout:
    """The weights of a plan, as its kernel takes them; see ``lay_out_slices`` and ``lay_out_gates``."""
    if isinstance(plan, GatePlan):
        return lay_out_gates(matrices, plan, dtype)
    return lay_out_slices(matrices, plan, dtype)
