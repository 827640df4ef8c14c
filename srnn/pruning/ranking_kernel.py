"""Counting scores by their bits on a GPU, in one pass: torch's histogram takes three, and two copies of all scores."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTED = 4096  # scores at a time
_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200; each goes through many scores
_WARPS = 8


@triton.jit(do_not_specialize=["size", "base", "shift"])  # compiled once, whatever they are
def count_bits(
    bits,  # [size], int32
    size,
    base,
    shift,
    counts,  # [BINS], int32
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add to the counts how often each bin is ``bits - base >> shift``; others are left out."""
    own = tl.zeros((BINS,), tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        value = tl.load(bits + places, mask=places < size, other=-1)  # a negative number has a negative one for bits
        place = (value - base) >> shift
        own += tl.histogram(place, BINS, mask=(value >= base) & (place < BINS))
    tl.atomic_add(counts + tl.arange(0, BINS), own, mask=own > 0)


def count_in_bins(bits: Tensor, base: int, shift: int, counts: Tensor) -> None:
    """Add to the counts, int32 [bins], how often each bin is ``bits - base >> shift``.

    Args:
        bits: [U], int32.
        base: at least 0: smaller ones are not counted.
        shift: to the right.
        counts: of a power of two of bins.
    """
    programs = min(_PROGRAMS, -(-len(bits) // COUNTED))
    if programs:
        with torch.cuda.device(bits.device) if bits.is_cuda else nullcontext():  # a CPU's is the interpreter
            count_bits[(programs,)](bits, len(bits), base, shift, counts, len(counts), COUNTED, num_warps=_WARPS)
