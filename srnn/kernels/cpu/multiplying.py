"""Compiled products of a matrix, which comes as the numbers that ``shapes`` lists, with rows or columns of another."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from srnn.kernels.cpu.shapes import ALIGNED, DOT_AT, GROUPS_OF_GATE, LANES_OF_GROUP, ROWS, WIDTH_OF_X, WINDOW
from srnn.kernels.cpu.vector_code import add_sixteen, call_dot, floats, keep


@njit(nogil=True, cache=True)
def zeros(rows, streams):
    """[rows, streams], 64 bytes aligned, with so many zeros behind that whole registers can be loaded."""
    count = max(WINDOW, (rows * streams + ALIGNED - 1) // ALIGNED * ALIGNED)
    memory = np.zeros(count + ALIGNED, np.float32)
    first = -(np.int64(memory.ctypes.data) // 4) % ALIGNED
    return memory[first : first + rows * streams].reshape(rows, streams)


@njit(nogil=True, cache=True)
def is_careful(x):
    """1 if a number is infinite or NaN: what has no weight must not be multiplied with it."""
    bits, largest = x.reshape(-1).view(np.int32), np.int32(0)
    for k in range(len(bits)):  # integers, because the compiler may not reorder sums or maxima of floats
        largest = max(largest, bits[k] & np.int32(0x7F800000))
    return 1 if largest == 0x7F800000 else 0


@njit(nogil=True, cache=True)
def as_taken(matrix, h):
    """h [columns, streams] as a matrix's product takes it, and whether that has to be careful."""
    if matrix[WIDTH_OF_X] == 0:
        return h, 0
    careful = is_careful(h)
    if h.shape[1] == 1:
        return h, careful
    x = zeros(h.shape[1], matrix[WIDTH_OF_X])
    for column in range(h.shape[0]):
        for stream in range(h.shape[1]):
            x[stream, column] = h[column, stream]
    return x, careful


@njit(nogil=True, cache=True)
def products(matrix, gate, first, count, x_at, streams, careful, out_at):
    """Row groups of the units ``first`` to ``first + count`` of a gate, times x: out[group, stream, lane]."""
    lanes, per_gate = matrix[LANES_OF_GROUP], matrix[GROUPS_OF_GATE]
    begin = gate * per_gate + first // lanes
    end = gate * per_gate + (first + count + lanes - 1) // lanes
    call_dot(matrix[DOT_AT], matrix.ctypes.data, begin, end, x_at, streams, careful, out_at)


@njit(nogil=True, cache=True)
def _put(base, some, lanes, row, count, streams, bias, out, y):
    """Outputs as the product writes them, [group, stream, lane], with the bias to their rows of y, from ``base`` on."""
    whole = some // lanes if lanes % 16 == 0 else 0
    out_at, bias_at, y_at = out.ctypes.data, bias.ctypes.data, y.ctypes.data
    for b in range(count):
        for g in range(whole):
            at, begin = (g * streams + b) * lanes, base + g * lanes
            target = (row + b) * y.shape[1] + begin
            for lane in range(0, lanes, 16):
                add_sixteen(out_at + 4 * (at + lane), bias_at + 4 * (begin + lane), y_at + 4 * (target + lane))
        for g in range(whole, (some + lanes - 1) // lanes):
            at, begin = (g * streams + b) * lanes, base + g * lanes
            for lane in range(min(lanes, some - g * lanes)):
                y[row + b, begin + lane] = out[at + lane] + bias[begin + lane]


@njit(nogil=True, cache=True)
def _multiply_chunks(chunk_size, first_chunk, last_chunk, matrix, gates, x, careful, row, count, streams, bias, y):
    """Some chunks of the outputs of all gates, for ``count`` rows of an input from ``row`` on."""
    lanes = matrix[LANES_OF_GROUP]
    units = y.shape[1] // gates
    out = np.empty((chunk_size + lanes) * streams, np.float32)
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        some = min(chunk_size, units - first)
        for gate in range(gates):
            products(matrix, gate, first, some, x.ctypes.data, streams, careful, out.ctypes.data)
            _put(gate * units + first, some, lanes, row, count, streams, bias, out, y)


@njit(nogil=True, cache=True)
def _rows_as_taken(matrix, x, row, count, tile):
    """Some rows of x as a matrix's product takes them, whether that has to be careful, and their number with zeros."""
    streams = (count + tile - 1) // tile * tile
    if matrix[WIDTH_OF_X]:
        x_SI = zeros(streams, matrix[WIDTH_OF_X])
        for b in range(count):
            for i in range(x.shape[1]):
                x_SI[b, i] = x[row + b, i]
        return x_SI, is_careful(x_SI), streams
    x_IS = zeros(x.shape[1], streams)
    for i in range(x.shape[1]):
        for b in range(count):
            x_IS[i, b] = x[row + b, i]
    return x_IS, 0, streams


@njit(nogil=True, cache=True)
def copy(n, target_at, source_at):
    """A loop, because numba's own assignment of a slice is ten times slower: it looks for overlaps."""
    target, source = floats(target_at, n), floats(source_at, n)
    for k in range(n):
        target[k] = source[k]


@njit(nogil=True, cache=True)
def _sum(n, y_at, out_at, bias_at):
    y, out, bias = floats(y_at, n), floats(out_at, n), floats(bias_at, n)
    for k in range(n):
        y[k] = out[k] + bias[k]


@njit(nogil=True, cache=True)
def _multiply_row(matrix, gates, units, x_at, careful, bias_at, y_at):
    lanes, per_gate = matrix[LANES_OF_GROUP], matrix[GROUPS_OF_GATE]
    if units == per_gate * lanes:  # the product writes outputs where they belong
        call_dot(matrix[DOT_AT], matrix.ctypes.data, 0, gates * per_gate, x_at, 1, careful, y_at)
        _sum(gates * units, y_at, y_at, bias_at)
        return
    out = np.empty(per_gate * lanes, np.float32)
    for gate in range(gates):
        at = 4 * gate * units
        products(matrix, gate, 0, units, x_at, 1, careful, out.ctypes.data)
        _sum(units, y_at + at, out.ctypes.data, bias_at + at)
    keep(out)


@njit(nogil=True, cache=True)
def multiply_one(matrix, gates, inputs, outputs, x_at, bias_at, y_at):
    """y[O] = x[I] W' + bias of one row, by addresses: a step of a stream does little else."""
    width = matrix[WIDTH_OF_X]
    if width == 0:
        _multiply_row(matrix, gates, outputs // gates, x_at, 0, bias_at, y_at)
        return
    x = zeros(1, width)
    copy(inputs, x.ctypes.data, x_at)
    careful = is_careful(x)
    _multiply_row(matrix, gates, outputs // gates, x.ctypes.data, careful, bias_at, y_at)
    keep(x)


@njit(nogil=True, cache=True)
def multiply(chunk_size, matrix, gates, x, tile, bias, bounds, y):
    """y[N, O] = x[N, I] W' + bias on one thread; the rest as in ``recur_serial``."""
    if tile == 1 and x.shape[0] == 1:
        multiply_one(matrix, gates, x.shape[1], y.shape[1], x.ctypes.data, bias.ctypes.data, y.ctypes.data)
        return
    last = bounds[-1]
    for row in range(0, x.shape[0], ROWS):
        count = min(ROWS, x.shape[0] - row)
        taken, careful, streams = _rows_as_taken(matrix, x, row, count, tile)
        _multiply_chunks(chunk_size, 0, last, matrix, gates, taken, careful, row, count, streams, bias, y)


@njit(nogil=True, cache=True, parallel=True)
def multiply_parallel(chunk_size, matrix, gates, x, tile, bias, bounds, y):
    """``multiply`` on as many threads as ``bounds`` has parts: each takes other rows or, of few, other outputs."""
    parts, last = len(bounds) - 1, bounds[-1]
    tiles = (x.shape[0] + ROWS - 1) // ROWS
    if tiles >= 2 * parts:
        for i in prange(tiles):
            row = i * ROWS
            count = min(ROWS, x.shape[0] - row)
            taken, careful, streams = _rows_as_taken(matrix, x, row, count, tile)
            _multiply_chunks(chunk_size, 0, last, matrix, gates, taken, careful, row, count, streams, bias, y)
        return
    for row in range(0, x.shape[0], ROWS):
        count = min(ROWS, x.shape[0] - row)
        taken, careful, streams = _rows_as_taken(matrix, x, row, count, tile)
        for part in prange(parts):
            begin, end = bounds[part], bounds[part + 1]
            _multiply_chunks(chunk_size, begin, end, matrix, gates, taken, careful, row, count, streams, bias, y)
