"""Clipping by the norm of the gradients that are not pruned: they are masked in the passes that clipping takes anyway.

To mask them first and then clip reads and writes all of them once more: 3 % of a training step of Penn Treebank's large
network on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srnn.pruning.launches import on_device

CLIP_BLOCK = 4096  # gradients of a program
WARPS = 8


@triton.jit
def _kept(tables, owners, firsts, BLOCK: tl.constexpr):
    """Of this program: its gradients' addresses, which of them are inside, and which are kept."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    size = tl.load(tables + owner * 3)
    gradients = tl.load(tables + owner * 3 + 1).to(tl.pointer_type(tl.float32))
    address = tl.load(tables + owner * 3 + 2)
    place = (program - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    mask = address.to(tl.pointer_type(tl.uint8)) + place
    return gradients + place, inside, tl.load(mask, mask=inside & (address != 0), other=1) != 0


@triton.jit
def sum_squares(
    tables,  # [M, 3]: of each tensor of gradients its size, its address, and that of its mask, 0 for none
    owners,  # [programs], the tensor of each
    firsts,  # [M], the first program of each
    sums,  # [programs]
    BLOCK: tl.constexpr,
):
    """Add up the squares of what is kept."""
    places, inside, kept = _kept(tables, owners, firsts, BLOCK)
    # Loaded whatever the mask says, beside the mask and not after it; what is pruned may be NaN.
    value = tl.where(kept, tl.load(places, mask=inside, other=0.0), 0.0)
    tl.store(sums + tl.program_id(0), tl.sum(value * value, axis=0))


@triton.jit
def find_factor(
    sums,  # [count]
    count,
    max_norm,
    found,  # [2]: the norm, and the factor
    BLOCK: tl.constexpr,
):
    """What gradients are multiplied by: as ``clip_grad_norm_`` has it, NaN included. One program."""
    places = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(sums + start + places, mask=start + places < count, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(total, axis=0)).to(tl.float32)
    factor = max_norm / (norm + 1e-6)
    tl.store(found, norm)
    tl.store(found + 1, tl.where(factor > 1.0, 1.0, factor))


@triton.jit
def scale_kept(tables, owners, firsts, found, BLOCK: tl.constexpr):
    """Multiply what is kept by the factor, and zero the rest, whatever it is."""
    places, inside, kept = _kept(tables, owners, firsts, BLOCK)
    value = tl.load(places, mask=inside, other=0.0) * tl.load(found + 1)
    tl.store(places, tl.where(kept, value, 0.0), mask=inside)


def launch_clipping(
    tables: Tensor, owners: Tensor, firsts: Tensor, sums: Tensor, found: Tensor, max_norm: float
) -> None:
    """Launch all three, for tables as ``sum_squares`` has them."""
    count = len(owners)
    with on_device(tables.device):
        sum_squares[(count,)](tables, owners, firsts, sums, CLIP_BLOCK, num_warps=WARPS)
        find_factor[(1,)](sums, count, max_norm, found, CLIP_BLOCK, num_warps=WARPS)
        scale_kept[(count,)](tables, owners, firsts, found, CLIP_BLOCK, num_warps=WARPS)
