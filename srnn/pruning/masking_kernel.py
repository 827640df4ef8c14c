"""Masking on a GPU: one launch for all weights, and all that goes with them.

torch's own operations launch two kernels a weight, and one of them makes a mask of the opposite.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srnn.pruning.launches import on_device

BLOCK = 1024  # weights of a program
_INTEGERS = {2: tl.int16, 4: tl.int32, 8: tl.int64}  # by bytes: integers of the same size, of which 0 is a zero


@triton.jit
def zero_where_pruned(
    tables,  # [M, 3 + COUNT]: of each mask its address, its size, and those of ``found`` and what it masks; 0 for none
    owners,  # [programs], the mask of each
    firsts,  # [M], the first program of each
    BITS: tl.constexpr,  # integers as large as a weight
    COUNT: tl.constexpr,
    LOOK: tl.constexpr,  # 1 stores only where there is no zero yet, and 2 sets ``found`` if so; else 0
    BLOCK: tl.constexpr,
):
    """Store zeros where masks are zero.

    Single stores among what is kept cost more than to read all and write all, by a third of the time on an H200. Where
    the zeros are there already, as those of weights are between two updates, reading is all. To read only what is kept
    gains nothing there: at 90 % nearly all of the memory's sectors have something of it.
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    table = tables + owner * (3 + COUNT)
    mask = tl.load(table).to(tl.pointer_type(tl.uint8))
    size = tl.load(table + 1)
    place = (program - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    pruned = tl.load(mask + place, mask=inside, other=1) == 0
    zero = tl.zeros((BLOCK,), BITS)
    for index in tl.static_range(COUNT):
        address = tl.load(table + 3 + index)
        values = address.to(tl.pointer_type(BITS)) + place
        if LOOK:
            value = tl.load(values, mask=pruned & (address != 0), other=0)
            written = pruned & (value != 0)
            tl.store(values, zero, mask=written)
            if LOOK == 2:
                found = tl.load(table + 2).to(tl.pointer_type(tl.int32))
                tl.store(found, 1, mask=tl.max(written.to(tl.int32), axis=0) != 0)
        else:
            there = inside & (address != 0)
            tl.store(values, tl.where(pruned, zero, tl.load(values, mask=there, other=0)), mask=there)


def launch(size: int, count: int, look: int, tables: Tensor, owners: Tensor, firsts: Tensor) -> None:
    """Launch it for weights of so many bytes, ``count`` tensors a mask."""
    with on_device(tables.device):
        zero_where_pruned[(len(owners),)](tables, owners, firsts, _INTEGERS[size], count, look, BLOCK)
