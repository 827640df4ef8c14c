"""Finding thresholds on a GPU, and masks under them, without a word from the host.

A score is looked at by its bits: of numbers from 0 up they are in the same order. Four passes count them into 256 bins,
each of the bin that the one before has found. Scores are read from the weights themselves and never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srnn.pruning.launches import on_device
from srnn.pruning.scores import RankedBy

CUT_BLOCK = 4096  # scores at a time
CUT_BINS = 256
SCORES, MAGNITUDES, SALIENCIES = (tl.constexpr(int(kind)) for kind in RankedBy)
SHIFTS = (23, 15, 7, 0)  # of the passes
_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200; each goes through many blocks
_WARPS = 8
MINUS_ONE = tl.constexpr(-0x40800000)  # the bits of -1.0, the score of what is pruned
_INFINITE = tl.constexpr(0x7F800000)
_NOTHING = tl.constexpr(0x7FFFFFFF)  # a bin's first number where nothing is to be counted any more
# Of a search, int32: the first number of its bin, how many are below, how many are equal, and the result, if known.
_BASE, _BELOW, _EQUAL, _FOUND, FIELDS = (tl.constexpr(place) for place in (0, 1, 2, 3, 4))
_OPEN = tl.constexpr(-1)  # as a result: not known yet; the bits of a NaN
# Of a cut, int32: the threshold's bits, how many of its equals are kept, and whether these are not all.
_THRESHOLD, _LEFT, _TIED, DECISION = (tl.constexpr(place) for place in (0, 1, 2, 3))


@triton.jit
def _block(tables, owners, firsts, block, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of a block's scores, which of them are there, and where their masks go."""
    owner = tl.load(owners + block)
    table = tables + owner * 5
    size = tl.load(table)
    place = (block - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    bits = tl.load(tl.load(table + 1).to(tl.pointer_type(tl.int32)) + place, mask=inside, other=0)
    if KIND == SCORES:  # -0.0 is a zero
        bits = tl.where(bits >= 0, bits, tl.where(bits == -0x80000000, 0, MINUS_ONE))
    else:
        bits = bits & 0x7FFFFFFF
        if KIND == SALIENCIES:
            moment = tl.load(tl.load(table + 4).to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
            score = bits.to(tl.float32, bitcast=True) * tl.sqrt_rn(tl.sqrt_rn(moment))
            bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # a NaN may be negative
        mask = tl.load(table + 2)
        kept = tl.load(mask.to(tl.pointer_type(tl.uint8)) + place, mask=inside & (mask != 0), other=1)
        bits = tl.where(kept != 0, bits, MINUS_ONE)
    return bits, inside, tl.load(table + 3).to(tl.pointer_type(tl.uint8)) + place


@triton.jit(do_not_specialize=["blocks", "shift", "first"])  # compiled once, whatever they are
def count_bins(
    tables,  # [M, 5], int64: of each tensor its size, and the addresses of it, its mask or 0, new masks, and moments
    owners,  # [blocks], the tensor of each
    firsts,  # [M], the first block of each
    blocks,
    searches,  # [2, FIELDS]
    counts,  # [2, BINS], int32, and how many are negative, and whether one is infinite or NaN
    shift,
    first,  # whether it is the first pass
    KIND: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the scores in the bins of both searches; in those of the first alone where they look at the same ones."""
    base0 = tl.where(first != 0, 1, tl.load(searches + _BASE))
    base1 = tl.where(first != 0, 1, tl.load(searches + FIELDS + _BASE))
    own0 = tl.zeros((BINS,), tl.int32)
    own1 = tl.zeros((BINS,), tl.int32)
    negative, nonfinite = 0, 0
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        bits, inside, _ = _block(tables, owners, firsts, block, KIND, BLOCK)
        place = (bits - base0) >> shift
        own0 += tl.histogram(place, BINS, mask=inside & (bits >= base0) & (place < BINS))
        if base1 != base0:
            other = (bits - base1) >> shift
            own1 += tl.histogram(other, BINS, mask=inside & (bits >= base1) & (other < BINS))
        if first:
            negative += tl.sum((inside & (bits < 0)).to(tl.int32), axis=0)
            nonfinite = tl.maximum(nonfinite, tl.max((inside & (bits >= _INFINITE)).to(tl.int32), axis=0))
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + bins, own0, mask=own0 > 0)
    tl.atomic_add(counts + BINS + bins, own1, mask=own1 > 0)
    if first:
        tl.atomic_add(counts + 2 * BINS, negative)
        tl.atomic_max(counts + 2 * BINS + 1, nonfinite)


@triton.jit
def _pick_bin(search, counted, rank, units, negative, shift, first, BINS: tl.constexpr):
    """Find the bin of a search that holds the rank."""
    bins = tl.arange(0, BINS)
    in_none = units - tl.sum(counted, axis=0)  # at the first pass: zeros, and what is pruned
    base = tl.where(first != 0, 1, tl.load(search + _BASE))
    below = tl.where(first != 0, in_none, tl.load(search + _BELOW))
    found = tl.load(search + _FOUND)
    equal = tl.load(search + _EQUAL)
    if first:
        found = tl.where(rank <= negative, MINUS_ONE, tl.where(rank <= in_none, 0, _OPEN))
    if found == _OPEN:
        sums = tl.cumsum(counted, axis=0)
        place = tl.sum((sums < rank - below).to(tl.int32), axis=0)
        below += tl.sum(tl.where(bins < place, counted, 0), axis=0)
        equal = tl.sum(tl.where(bins == place, counted, 0), axis=0)
        base += place << shift
    elif first:
        equal = tl.where(found == 0, in_none - negative, negative)
        below = tl.where(found == 0, negative, 0)
        base = _NOTHING
    if shift == 0:
        found = tl.where(found == _OPEN, base, found)
    tl.debug_barrier()
    tl.store(search + _BASE, base)
    tl.store(search + _BELOW, below)
    tl.store(search + _EQUAL, equal)
    tl.store(search + _FOUND, found)


@triton.jit
def _decide(searches, wanted, units, decision, epsilon):
    """The threshold, from what both searches have found."""
    quantile = tl.load(searches + _FOUND)
    boundary = tl.load(searches + FIELDS + _FOUND)
    equal = tl.load(searches + FIELDS + _EQUAL)
    left = tl.load(wanted + 2).to(tl.int32) - (units - tl.load(searches + FIELDS + _BELOW) - equal)
    before = tl.load(epsilon)
    now = before
    # An infinite score is of what has to stay, and says nothing of the rest; nor does -1, whose product may be -0.0.
    if (quantile > 0) & (quantile < _INFINITE):
        now = tl.maximum(before, quantile.to(tl.float32, bitcast=True).to(tl.float64) * tl.load(wanted + 4))
    threshold = now.to(tl.float32).to(tl.int32, bitcast=True)
    if (tl.load(wanted + 3) != 0) | (threshold > boundary):
        if boundary < _INFINITE:
            least = tl.where(tl.load(wanted + 5) != 0, before, 0.0)
            now = tl.maximum(least, boundary.to(tl.float32, bitcast=True).to(tl.float64))
        else:
            now = before
        threshold = boundary
    else:
        left = _NOTHING
        equal = 0
    tl.debug_barrier()
    tl.store(epsilon, now)
    tl.store(decision + _THRESHOLD, threshold)
    tl.store(decision + _LEFT, left)
    tl.store(decision + _TIED, (left < equal).to(tl.int32))


@triton.jit(do_not_specialize=["units", "shift", "first"])
def pick_bins(
    searches,  # [2, FIELDS]
    counts,  # as in ``count_bins``
    wanted,  # [6], fp64: both ranks, from 1; units to keep; whether by rank at any rate; the factor; whether it rises
    units,  # how many scores there are
    decision,  # [DECISION]
    epsilon,  # [1], fp64: the threshold of the last cut, and then of this one
    nonfinite,  # [1], in memory of the host, set where a weight is infinite or NaN
    shift,
    first,
    KIND: tl.constexpr,
    BINS: tl.constexpr,
):
    """Find the bins that hold the wanted ranks, empty all for the next pass, and decide after the last. One program."""
    bins = tl.arange(0, BINS)
    counted = tl.load(counts + bins)
    apart = (first == 0) & (tl.load(searches + _BASE) != tl.load(searches + FIELDS + _BASE))
    other = tl.where(apart, tl.load(counts + BINS + bins), counted)
    negative = tl.load(counts + 2 * BINS)
    if tl.load(counts + 2 * BINS + 1) != 0 and KIND != SCORES:
        tl.store(nonfinite, 1)
    tl.debug_barrier()
    tl.store(counts + bins, tl.zeros((BINS,), tl.int32))
    tl.store(counts + BINS + bins, tl.zeros((BINS,), tl.int32))
    tl.store(counts + 2 * BINS + tl.arange(0, 2), tl.zeros((2,), tl.int32))
    _pick_bin(searches, counted, tl.load(wanted).to(tl.int32), units, negative, shift, first, BINS)
    _pick_bin(searches + FIELDS, other, tl.load(wanted + 1).to(tl.int32), units, negative, shift, first, BINS)
    if shift == 0:
        tl.debug_barrier()
        _decide(searches, wanted, units, decision, epsilon)


@triton.jit
def count_equals(tables, owners, firsts, decision, equals, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores of each block are equal to the threshold, [blocks]; where not all of them are kept."""
    if tl.load(decision + _TIED) != 0:
        block = tl.program_id(0)
        bits, inside, _ = _block(tables, owners, firsts, block, KIND, BLOCK)
        same = inside & (bits == tl.load(decision + _THRESHOLD))
        tl.store(equals + block, tl.sum(same.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["blocks"])
def add_up(decision, equals, blocks, BLOCK: tl.constexpr):
    """Of each block, how many are equal in those before it. One program."""
    if tl.load(decision + _TIED) != 0:
        before = 0
        for start in range(0, blocks, BLOCK):
            places = start + tl.arange(0, BLOCK)
            own = tl.load(equals + places, mask=places < blocks, other=0)
            sums = tl.cumsum(own, axis=0)
            tl.store(equals + places, before + sums - own, mask=places < blocks)
            before += tl.sum(own, axis=0)


@triton.jit
def write_masks(tables, owners, firsts, decision, equals, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Keep what is above the threshold, and the first of its equals."""
    block = tl.program_id(0)
    bits, inside, out = _block(tables, owners, firsts, block, KIND, BLOCK)
    threshold = tl.load(decision + _THRESHOLD)
    keep = bits >= threshold
    if tl.load(decision + _TIED) != 0:
        same = inside & (bits == threshold)
        place = tl.load(equals + block) + tl.cumsum(same.to(tl.int32), axis=0)  # from 1
        keep = (bits > threshold) | (same & (place <= tl.load(decision + _LEFT)))
    tl.store(out, keep.to(tl.uint8), mask=inside)


def launches(
    blocks: tuple[Tensor, Tensor, Tensor], wanted: Tensor, epsilon: Tensor, nonfinite: Tensor, units: int, kind: int
) -> Iterator[Callable[[], None]]:
    """Those of a cut.

    Args:
        blocks: ``tables``, ``owners`` and ``firsts`` of ``count_bins``.
        wanted: as ``pick_bins`` has it, like the rest.
        epsilon: the threshold.
        nonfinite: the flag that is set where a weight is infinite or NaN.
        units: how many scores there are.
        kind: of ``RankedBy``.
    """
    device, count = wanted.device, len(blocks[1])
    searches = torch.zeros(2, FIELDS.value, dtype=torch.int32, device=device)
    counts = torch.zeros(2 * CUT_BINS + 2, dtype=torch.int32, device=device)
    decision = torch.zeros(DECISION.value, dtype=torch.int32, device=device)
    equals = torch.zeros(count, dtype=torch.int32, device=device)
    grid = (min(_PROGRAMS, count),)
    for shift in SHIFTS:
        now = shift, int(shift == SHIFTS[0])
        yield partial(_on, device, count_bins, grid, *blocks, count, searches, counts, *now, kind, CUT_BINS, CUT_BLOCK)
        picked = searches, counts, wanted, units, decision, epsilon, nonfinite
        yield partial(_on, device, pick_bins, (1,), *picked, *now, kind, CUT_BINS)
    yield partial(_on, device, count_equals, (count,), *blocks, decision, equals, kind, CUT_BLOCK)
    yield partial(_on, device, add_up, (1,), decision, equals, count, CUT_BLOCK)
    yield partial(_on, device, write_masks, (count,), *blocks, decision, equals, kind, CUT_BLOCK)


def _on(device: torch.device, kernel: Any, grid: tuple[int], *arguments: Any) -> None:
    with on_device(device):
        kernel[grid](*arguments, num_warps=_WARPS)
