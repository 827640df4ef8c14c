"""Compiled: which entry of a matrix goes to which slot of the form ``windows``; see ``element_layouts``."""

from __future__ import annotations

from numba import njit

from srnn.kernels.cpu.multiplying import COMPILED
from srnn.kernels.cpu.shapes import ALIGNED, ROWS_OF_WINDOWS, SLOTS_OF_WINDOWS, WINDOW
from srnn.kernels.cpu.vector_code import bytes_at, free_memory, integers, integers_32, number, take_memory


@njit(**COMPILED)
def fill_windows(at):
    """The turns that each set of rows begins with, and what fills them.

    Args:
        at: of the addresses of the matrix's row pointers and columns, int32, and of the rows in their order, int64;
            the number of these; the largest first column of a window; and the addresses of the turns, which are
            filled, and of bases, places and sources. While these three are 0, only turns are filled.

    Returns:
        0.
    """
    rows, last = number(at, 3), number(at, 4)
    fills, groups = number(at, 6) != 0, rows // ROWS_OF_WINDOWS
    turns = integers_32(number(at, 5), groups + 1)
    memory = take_memory(16 * ROWS_OF_WINDOWS)
    turns[0] = 0
    for group in range(groups):
        first = number(at, 2) + 8 * group * ROWS_OF_WINDOWS
        slot = turns[group] * SLOTS_OF_WINDOWS
        slot = _fill_group(number(at, 0), number(at, 1), first, last, memory, slot, fills, at + 8 * 6)
        turns[group + 1] = slot // SLOTS_OF_WINDOWS
    free_memory(memory)
    return 0


@njit(**COMPILED)
def _fill_group(pointers_at, columns_at, rows_at, last, memory, slot, fills, filled):
    """The slots of sixteen rows; the one after them. ``memory`` holds the next entry of each row and its last."""
    heads, ends = integers(memory, ROWS_OF_WINDOWS), integers(memory + 8 * ROWS_OF_WINDOWS, ROWS_OF_WINDOWS)
    pointers, columns = integers_32(pointers_at, 1), integers_32(columns_at, 1)
    rows = integers(rows_at, ROWS_OF_WINDOWS)
    for lane in range(ROWS_OF_WINDOWS):
        row = rows[lane]
        heads[lane], ends[lane] = (pointers[row], pointers[row + 1]) if row >= 0 else (0, 0)
    bases, places = integers_32(number(filled, 0), 1), bytes_at(number(filled, 1), 1)
    sources = integers_32(number(filled, 2), 1)
    while True:
        first = -1
        for lane in range(ROWS_OF_WINDOWS):
            if heads[lane] < ends[lane] and (first < 0 or columns[heads[lane]] < first):
                first = columns[heads[lane]]
        if first < 0 and slot % SLOTS_OF_WINDOWS == 0:
            return slot
        base = min(max(first, 0) // ALIGNED * ALIGNED, last)
        if fills:
            bases[slot] = base
        turn, part = slot // SLOTS_OF_WINDOWS, slot % SLOTS_OF_WINDOWS
        for lane in range(ROWS_OF_WINDOWS):
            head = heads[lane]
            if head < ends[lane] and columns[head] < base + WINDOW:
                if fills:
                    places[(turn * ROWS_OF_WINDOWS + lane) * SLOTS_OF_WINDOWS + part] = columns[head] - base
                    sources[slot * ROWS_OF_WINDOWS + lane] = head
                heads[lane] += 1
        slot += 1
