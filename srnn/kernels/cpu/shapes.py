"""Sizes that the compiled loops and their callers share; imports without numba."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# A matrix as the compiled loops take it: these numbers.
#   DOT_AT                   address of its product's code
#   VALUES_AT .. SCALES_AT   addresses of its parts; what they hold is its form's own
#   LANES_OF_GROUP           rows of a row group, whose outputs lie together
#   GROUPS_OF_GATE           row groups of a gate
#   WIDTH_OF_X               0: the product takes x as [columns, streams]. Else as [streams, this width], 64 bytes
#                            aligned, with zeros past the last column
#   ORDER_AT, BASES_AT       addresses, of forms that have them
NUMBERS_OF_MATRIX = 10
DOT_AT, VALUES_AT, COLUMNS_AT, ROW_POINTERS_AT, SCALES_AT = range(5)
LANES_OF_GROUP, GROUPS_OF_GATE, WIDTH_OF_X, ORDER_AT, BASES_AT = range(5, NUMBERS_OF_MATRIX)

# All layers of a network in one call, as numbers: cell, layers, hidden units, gates and inputs; then of each layer
#   units of a chunk and number of chunks, of W_ih and of W_hh; rows that the product with W_ih takes together;
#   addresses of the input's bias and of a GRU's new_bias; and the numbers of W_ih and of W_hh.
# A product as numbers: units of a chunk, number of chunks, rows taken together, gates, outputs, inputs, address of the
#   bias; then the numbers of its matrix.
NUMBERS_OF_PRODUCT = 7
NUMBERS_OF_STACK, NUMBERS_OF_LAYER = 5, 7 + 2 * NUMBERS_OF_MATRIX
DONE, NO_MEMORY, NO_TOKEN = range(3)  # how a compiled call ended

# Hidden units that are worked on together, multiples of every N. A chunk costs about a microsecond beside its
# arithmetic, so few large ones are best, as long as their scratch memory stays in the first cache and every thread
# gets several.
CHUNKS = (256, 128, 64, 32)
SCRATCH = 256  # units times streams of a chunk
ROWS = 16  # rows of an input that are multiplied together; a multiple of every tile
# N -> streams that share a loaded value: so many sums stay in 16 registers of 8 floats.
TILES = {1: 8, 4: 4, 8: 4, 16: 4, 32: 2}
WINDOW = 32  # columns that two registers of 16 floats hold
ALIGNED = 16  # floats of a cache line
ROWS_OF_WINDOWS, SLOTS_OF_WINDOWS = 16, 4  # rows side by side, slots of a turn; see ``element_products``
ROWS_OF_DENSE, SLOTS_OF_DENSE = 16, 4  # of the form that stores zeros, too: rows side by side, columns of a turn


def padded_width(columns: int) -> int:
    """Floats a stream of x takes, so that whole registers can be loaded at any column."""
    return max(WINDOW, -(-columns // ALIGNED) * ALIGNED)


def chunk_size(units: int, streams: int, threads: int, lanes: int = 1) -> int:
    """Units of a chunk, a multiple of ``lanes``."""
    for size in CHUNKS:
        if size * streams <= SCRATCH and (threads == 1 or units >= 4 * size * threads):
            return max(size, lanes)
    return max(CHUNKS[-1], lanes)
