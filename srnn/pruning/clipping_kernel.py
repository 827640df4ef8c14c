"""Clipping by the norm of the gradients that are not pruned: they are masked in the passes that clipping takes anyway.

To mask them first and then clip reads and writes all of them once more: 3 % of a training step of Penn Treebank's large
network on an H200.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srnn.pruning.launches import on_device
from srnn.pruning.mean_squares_kernel import with_step

CLIP_BLOCK = 4096  # gradients of a program
WARPS = 8
# Of a thread in the pass that takes in means. The compiler would take 148, and a multiprocessor of a Hopper GPU would
# hold one program. So it holds two, and one loads while the other stores.
_REGISTERS = 128


@triton.jit
def _block(tables, owners, firsts, BLOCK: tl.constexpr):
    """Of this program: its tensor's row, and places in it."""
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    return tables + owner * 4, (program - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def _kept(row, place):
    """Gradients' addresses, which of them are inside, and which are kept."""
    size = tl.load(row)
    gradients = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    address = tl.load(row + 2)
    inside = place < size
    mask = address.to(tl.pointer_type(tl.uint8)) + place
    return gradients + place, inside, tl.load(mask, mask=inside & (address != 0), other=1) != 0


@triton.jit
def sum_squares(
    tables,  # [M, 4]: of each tensor of gradients its size, its address, that of its mask and of its mean, 0 for none
    owners,  # [programs], the tensor of each
    firsts,  # [M], the first program of each
    sums,  # [programs]
    BLOCK: tl.constexpr,
):
    """Add up the squares of what is kept."""
    row, place = _block(tables, owners, firsts, BLOCK)
    places, inside, kept = _kept(row, place)
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
def scale_kept(tables, owners, firsts, found, decay, MEANS: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply what is kept by the factor, and zero the rest, whatever it is; take that into the means, if any.

    Means are left as they are where the norm is no number, or infinite.
    """
    row, place = _block(tables, owners, firsts, BLOCK)
    places, inside, kept = _kept(row, place)
    value = tl.load(places, mask=inside, other=0.0) * tl.load(found + 1)
    value = tl.where(kept, value, 0.0)
    if MEANS:
        address = tl.load(row + 3)
        means = address.to(tl.pointer_type(tl.float32)) + place
        taken = inside & ((address != 0) & (tl.load(found) < float("inf")))
        # Read before anything is written, so that they come beside the gradients.
        tl.store(means, with_step(tl.load(means, mask=taken, other=0.0), value, decay), mask=taken)
    tl.store(places, value, mask=inside)


def launch_clipping(
    tables: Tensor, owners: Tensor, firsts: Tensor, sums: Tensor, found: Tensor, max_norm: float, decay: float | None
) -> None:
    """Launch all three, for tables as ``sum_squares`` has them; ``decay`` is that of means, None without any."""
    count = len(owners)
    with on_device(tables.device):
        sum_squares[(count,)](tables, owners, firsts, sums, CLIP_BLOCK, num_warps=WARPS)
        find_factor[(1,)](sums, count, max_norm, found, CLIP_BLOCK, num_warps=WARPS)
        given = tables, owners, firsts, found
        if decay is None:
            scale_kept[(count,)](*given, 0.0, False, CLIP_BLOCK, num_warps=WARPS)
        else:
            scale_kept[(count,)](*given, decay, True, CLIP_BLOCK, num_warps=WARPS, maxnreg=_REGISTERS)
