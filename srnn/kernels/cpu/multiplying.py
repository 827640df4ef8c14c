"""Compiled products of a matrix, which comes as the numbers that ``shapes`` lists, with rows or columns of another.

All by addresses, those of a matrix's numbers included: views of an array count who holds its memory, by atomic adds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from srnn.kernels.cpu.shapes import (
    ALIGNED,
    DONE,
    DOT_AT,
    GROUPS_OF_GATE,
    LANES_OF_GROUP,
    NO_MEMORY,
    ROWS,
    WIDTH_OF_X,
    WINDOW,
)
from srnn.kernels.cpu.vector_code import (
    add,
    call_dot,
    clear,
    copy,
    floats,
    free_memory,
    integers_32,
    number,
    take_memory,
)

COMPILED: Any = {"nogil": True, "cache": True, "error_model": "numpy"}


@njit(nogil=True, cache=True)
def zeros(rows, streams):
    """[rows, streams], 64 bytes aligned, with so many zeros behind that whole registers can be loaded."""
    count = max(WINDOW, (rows * streams + ALIGNED - 1) // ALIGNED * ALIGNED)
    memory = np.zeros(count + ALIGNED, np.float32)
    first = -(np.int64(memory.ctypes.data) // 4) % ALIGNED
    return memory[first : first + rows * streams].reshape(rows, streams)


@njit(**COMPILED)
def next_line(address):
    """The next address at which a cache line begins."""
    return (address + 63) // 64 * 64


@njit(**COMPILED)
def is_careful(at, count):
    """1 if a number is infinite or NaN: what has no weight must not be multiplied with it."""
    bits, largest = integers_32(at, count), np.int32(0)
    for k in range(count):  # integers, because the compiler may not reorder sums or maxima of floats
        largest = max(largest, bits[k] & np.int32(0x7F800000))
    return np.int64(1) if largest == np.int32(0x7F800000) else np.int64(0)


@njit(**COMPILED)
def products(matrix, gate, first, count, x_at, streams, careful, out_at):
    """Row groups of the units ``first`` to ``first + count`` of a gate, times x: out[group, stream, lane]."""
    lanes, per_gate = number(matrix, LANES_OF_GROUP), number(matrix, GROUPS_OF_GATE)
    begin = gate * per_gate + first // lanes
    end = gate * per_gate + (first + count + lanes - 1) // lanes
    call_dot(number(matrix, DOT_AT), matrix, begin, end, x_at, streams, careful, out_at)


@njit(**COMPILED)
def _put(outputs, base, some, lanes, count, streams, bias_at, out_at, y_at):
    """Outputs as the product writes them, [group, stream, lane], with the bias to rows of y, from ``base`` on."""
    if lanes == 1:
        out, bias, y = floats(out_at, some * streams), floats(bias_at, outputs), floats(y_at, count * outputs)
        for b in range(count):
            for unit in range(some):
                y[b * outputs + base + unit] = out[unit * streams + b] + bias[base + unit]
        return
    for b in range(count):
        for g in range((some + lanes - 1) // lanes):
            at, first = (g * streams + b) * lanes, base + g * lanes
            n = min(lanes, some - g * lanes)
            add(n, out_at + 4 * at, bias_at + 4 * first, y_at + 4 * (b * outputs + first))


@njit(**COMPILED)
def _take(matrix, inputs, x_at, count, streams, taken_at):
    """Rows of x as a matrix's product takes them, and whether that has to be careful."""
    width = number(matrix, WIDTH_OF_X)
    if width == 0:
        x, taken = floats(x_at, count * inputs), floats(taken_at, inputs * streams)
        for i in range(inputs):
            for b in range(streams):
                taken[i * streams + b] = x[b * inputs + i] if b < count else np.float32(0)
        return np.int64(0)
    for b in range(streams):
        n, at = inputs if b < count else 0, taken_at + 4 * b * width
        copy(n, at, x_at + 4 * b * inputs)
        clear(width - n, at + 4 * n)
    return is_careful(taken_at, streams * width)


@njit(**COMPILED)
def multiply_some(
    chunk_size, first_chunk, last_chunk, matrix, gates, inputs, outputs, x_at, count, tile, bias_at, y_at
):
    """Some chunks of the outputs of all gates, for ``count`` rows of an input, at most ``ROWS``; how that ended."""
    lanes, units = number(matrix, LANES_OF_GROUP), outputs // gates
    streams = (count + tile - 1) // tile * tile
    taken = streams * max(inputs, number(matrix, WIDTH_OF_X)) + ALIGNED
    memory = take_memory(4 * (taken + (chunk_size + lanes) * streams) + 64)
    if memory == 0:
        return NO_MEMORY
    taken_at = next_line(memory)
    out_at = taken_at + 4 * taken
    careful = _take(matrix, inputs, x_at, count, streams, taken_at)
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        some = min(chunk_size, units - first)
        for gate in range(gates):
            products(matrix, gate, first, some, taken_at, streams, careful, out_at)
            _put(outputs, gate * units + first, some, lanes, count, streams, bias_at, out_at, y_at)
    free_memory(memory)
    return DONE


@njit(**COMPILED)
def multiply_one(matrix, gates, inputs, outputs, x_at, bias_at, y_at):
    """y[O] = x[I] W' + bias of one row: a step of a stream does little else; how that ended."""
    width, lanes, per_gate = number(matrix, WIDTH_OF_X), number(matrix, LANES_OF_GROUP), number(matrix, GROUPS_OF_GATE)
    units, careful = outputs // gates, np.int64(0)
    whole = units == per_gate * lanes  # the product writes outputs where they belong
    memory = take_memory(4 * (width + ALIGNED + (0 if whole else gates * per_gate * lanes)) + 64)
    if memory == 0:
        return NO_MEMORY
    taken_at = next_line(memory)
    if width:
        copy(inputs, taken_at, x_at)
        clear(width - inputs, taken_at + 4 * inputs)
        careful, x_at = is_careful(taken_at, inputs), taken_at
    out_at = y_at if whole else taken_at + 4 * (width + ALIGNED)
    call_dot(number(matrix, DOT_AT), matrix, 0, gates * per_gate, x_at, 1, careful, out_at)
    if whole:
        add(outputs, y_at, bias_at, y_at)
    else:
        for gate in range(gates):
            at = 4 * gate * units
            add(units, out_at + 4 * gate * per_gate * lanes, bias_at + at, y_at + at)
    free_memory(memory)
    return DONE


@njit(**COMPILED)
def multiply(chunk_size, chunks, matrix, gates, inputs, outputs, x_at, rows, tile, bias_at, y_at):
    """y[N, O] = x[N, I] W' + bias on one thread.

    Args:
        chunk_size: units that are worked on together.
        chunks: their number.
        matrix: address of the numbers of W.
        gates: that its rows fall into.
        inputs: I.
        outputs: O.
        x_at: address of x.
        rows: N.
        tile: rows the product takes at a time.
        bias_at: address of the bias [O].
        y_at: address of y, filled.

    Returns:
        ``DONE``, or ``NO_MEMORY`` if there is not enough.
    """
    if tile == 1 and rows == 1:
        return multiply_one(matrix, gates, inputs, outputs, x_at, bias_at, y_at)
    for row in range(0, rows, ROWS):
        n, x, y = min(ROWS, rows - row), x_at + 4 * row * inputs, y_at + 4 * row * outputs
        if multiply_some(chunk_size, 0, chunks, matrix, gates, inputs, outputs, x, n, tile, bias_at, y) != DONE:
            return NO_MEMORY
    return DONE


@njit(nogil=True, cache=True, parallel=True)
def multiply_parallel(chunk_size, matrix, gates, x, tile, bias, bounds, y):
    """``multiply`` on as many threads as ``bounds`` has parts: each takes other rows or, of few, other outputs.

    Returns:
        How many parts ended without enough memory.
    """
    parts, last, failed = len(bounds) - 1, bounds[-1], 0
    rows, inputs, outputs = x.shape[0], x.shape[1], y.shape[1]
    tiles = (rows + ROWS - 1) // ROWS
    numbers, x_at, y_at, bias_at = matrix.ctypes.data, x.ctypes.data, y.ctypes.data, bias.ctypes.data
    if tiles >= 2 * parts:
        for i in prange(tiles):
            n, x_i, y_i = min(ROWS, rows - i * ROWS), x_at + 4 * i * ROWS * inputs, y_at + 4 * i * ROWS * outputs
            failed += multiply_some(chunk_size, 0, last, numbers, gates, inputs, outputs, x_i, n, tile, bias_at, y_i)
        return failed
    for i in range(tiles):
        n, x_i, y_i = min(ROWS, rows - i * ROWS), x_at + 4 * i * ROWS * inputs, y_at + 4 * i * ROWS * outputs
        for part in prange(parts):
            begin, end = bounds[part], bounds[part + 1]
            failed += multiply_some(chunk_size, begin, end, numbers, gates, inputs, outputs, x_i, n, tile, bias_at, y_i)
    return failed
