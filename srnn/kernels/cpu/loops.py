"""Compiled loops over time, around the products of ``multiplying``.

One loop serves all cells and formats. Work is cut into chunks of hidden units: the products of a chunk with all
gates, then the gates' arithmetic, then the new state of those units. h is kept as ``[H, S]``, S the streams rounded
up to the product's tile. What a thread has to do is fixed beforehand, so that all get the same number of blocks.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from srnn.kernels.cpu.gate_loops import GRU, LSTM, gate_arithmetic
from srnn.kernels.cpu.multiplying import COMPILED, is_careful, products, zeros
from srnn.kernels.cpu.shapes import DOT_AT, GROUPS_OF_GATE, LANES_OF_GROUP, WIDTH_OF_X
from srnn.kernels.cpu.vector_code import call_dot, keep, number


@njit(nogil=True, cache=True)
def _chunks(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y):
    """One step of the hidden units of some chunks. With a projection, ``y`` has no columns."""
    units = h_new.shape[0]
    gates = u.shape[1] // units
    v = np.empty((gates, (chunk_size + matrix[LANES_OF_GROUP]) * h.shape[1]), np.float32)
    if h.shape[1] == 1:
        u_at, y_at = u.ctypes.data + 4 * offset * u.shape[1], y.ctypes.data + 4 * offset * y.shape[1]
        y_at = y_at if y.shape[1] else 0
        step_of_one(
            cell,
            gates,
            units,
            (chunk_size, first_chunk, last_chunk),
            matrix.ctypes.data,
            u_at,
            new_bias.ctypes.data,
            h.ctypes.data,
            h.shape[0],
            h_new.ctypes.data,
            c.ctypes.data,
            y_at,
            v.ctypes.data,
        )
        keep(v)
    else:
        _chunks_of_many(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y, v)


@njit(**COMPILED)
def step_of_one(cell, gates, units, chunks, matrix, u_at, bias_at, old_at, inputs, new_at, c_at, y_at, v_at):
    """A step of one stream, whose rows lie as the arithmetic takes them; all by addresses.

    Args:
        cell: index in ``CELLS``.
        gates: of the cell.
        units: H.
        chunks: units of a chunk, the first chunk, and the one past the last.
        matrix: of the numbers of W_hh.
        u_at: of u [G], the products with x, biases added.
        bias_at: of a GRU's new_bias [H].
        old_at: of h [P], as ``zeros`` makes it.
        inputs: P.
        new_at: of the new h [H], filled.
        c_at: of an LSTM's cell state [H], changed in place.
        y_at: of the outputs [H], filled; 0 if there are none.
        v_at: of scratch memory, [gates, units of a chunk and lanes].
    """
    size, lanes = chunks[0], number(matrix, LANES_OF_GROUP)
    careful = is_careful(old_at, inputs) if number(matrix, WIDTH_OF_X) else 0
    y_at = y_at if y_at else new_at
    if size >= units and chunks[1] < chunks[2]:  # one chunk: a call less for each gate
        per_gate = number(matrix, GROUPS_OF_GATE)
        call_dot(number(matrix, DOT_AT), matrix, 0, gates * per_gate, old_at, 1, careful, v_at)
        v_step = 4 * per_gate * lanes
        gate_arithmetic(cell, units, v_at, v_step, u_at, 4 * units, old_at, new_at, y_at, c_at, bias_at)
        return
    v_step = 4 * (size + lanes)
    for chunk in range(chunks[1], chunks[2]):
        first = chunk * size
        n, at = min(size, units - first), 4 * first
        for gate in range(gates):
            products(matrix, gate, first, n, old_at, 1, careful, v_at + gate * v_step)
        old, new, y, u, c = old_at + at, new_at + at, y_at + at, u_at + at, c_at + at
        gate_arithmetic(cell, n, v_at, v_step, u, 4 * units, old, new, y, c, bias_at + at)


@njit(nogil=True, cache=True)
def _as_taken(matrix, h):
    """h [columns, streams] as a matrix's product takes it, and whether that has to be careful."""
    width = matrix[WIDTH_OF_X]
    if width == 0:
        return h, 0
    if h.shape[1] == 1:
        return h, is_careful(h.ctypes.data, h.shape[0])
    x = zeros(h.shape[1], width)
    for column in range(h.shape[0]):
        for stream in range(h.shape[1]):
            x[stream, column] = h[column, stream]
    return x, is_careful(x.ctypes.data, h.shape[1] * width)


@njit(nogil=True, cache=True)
def _chunks_of_many(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y, v):
    """Several streams: rows are gathered as the product writes its own, [group, stream, lane], then put back."""
    lanes, streams, units = matrix[LANES_OF_GROUP], h.shape[1], h_new.shape[0]
    gates = u.shape[1] // units
    taken, careful = _as_taken(matrix, h)
    x = np.zeros((4, v.shape[1]), np.float32)
    new, cells, bias = (
        np.zeros(v.shape[1], np.float32),
        np.zeros(v.shape[1], np.float32),
        np.zeros(v.shape[1], np.float32),
    )
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        count = min(chunk_size, units - first)
        groups = (count + lanes - 1) // lanes
        for gate in range(gates):
            at = v.ctypes.data + 4 * gate * v.shape[1]
            products(matrix.ctypes.data, gate, first, count, taken.ctypes.data, streams, careful, at)
        for g in range(groups):
            begin = first + g * lanes
            some = min(lanes, units - begin)
            for b in range(size):
                at = (g * streams + b) * lanes
                for gate in range(gates):
                    for lane in range(some):
                        x[gate, at + lane] = u[offset + b, gate * units + begin + lane]
                if cell == GRU:
                    for lane in range(some):
                        new[at + lane] = h[begin + lane, b]
                        bias[at + lane] = new_bias[begin + lane]
                if cell == LSTM:
                    for lane in range(some):
                        cells[at + lane] = c[begin + lane, b]
        gate_arithmetic(
            cell,
            groups * streams * lanes,
            v.ctypes.data,
            4 * v.shape[1],
            x.ctypes.data,
            4 * v.shape[1],
            new.ctypes.data,
            new.ctypes.data,
            new.ctypes.data,
            cells.ctypes.data,
            bias.ctypes.data,
        )
        for g in range(groups):
            begin = first + g * lanes
            some = min(lanes, units - begin)
            for b in range(size):
                at = (g * streams + b) * lanes
                for lane in range(some):
                    h_new[begin + lane, b] = new[at + lane]
                if cell == LSTM:
                    for lane in range(some):
                        c[begin + lane, b] = cells[at + lane]
                if y.shape[1]:
                    for lane in range(some):
                        y[offset + b, begin + lane] = new[at + lane]
            if y.shape[1]:
                for b in range(size, streams):  # streams that have ended, or have not begun
                    for lane in range(some):
                        h_new[begin + lane, b] = h[begin + lane, b]


@njit(nogil=True, cache=True)
def _projected_chunks(chunk_size, first_chunk, last_chunk, matrix, offset, size, hidden, h, h_new, y):
    """One step of an LSTM's projection: h_new = W_hr hidden, for some chunks of its outputs."""
    lanes, streams, units = matrix[LANES_OF_GROUP], h.shape[1], h.shape[0]
    out = np.empty((chunk_size + lanes) * streams, np.float32)
    x, careful = _as_taken(matrix, hidden)
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        count = min(chunk_size, units - first)
        products(matrix.ctypes.data, 0, first, count, x.ctypes.data, streams, careful, out.ctypes.data)
        for unit in range(first, first + count):
            group, lane = divmod(unit - first, lanes)
            for b in range(streams):
                value = out[(group * streams + b) * lanes + lane] if b < size else h[unit, b]
                h_new[unit, b] = value
                if b < size:
                    y[offset + b, unit] = value


@njit(nogil=True, cache=True)
def _begin(sizes, reverse, h0, tile):
    """The order of steps, their first rows, and the first of two buffers for h."""
    steps = len(sizes)
    offsets = np.empty(steps, np.int64)
    total = 0
    for t in range(steps):
        offsets[t] = total
        total += sizes[t]
    order = np.arange(steps)[::-1].copy() if reverse else np.arange(steps)
    streams = (h0.shape[1] + tile - 1) // tile * tile
    h = zeros(h0.shape[0], streams)
    h[:, : h0.shape[1]] = h0
    return order, offsets, h


@njit(nogil=True, cache=True)
def recur_serial(
    cell, chunk_size, matrix, project, u, sizes, reverse, tile, new_bias, h0, c, bounds, project_bounds, y
):
    """A whole sequence on one thread.

    Args:
        cell: index in ``CELLS``.
        chunk_size: hidden units that are worked on together; a multiple of every N.
        matrix: the numbers of W_hh.
        project: the numbers of W_hr; the first is 0 where there is none.
        u: [N, G], the products with x, biases added.
        sizes: [T], streams of each step.
        reverse: whether the last step comes first.
        tile: streams the product takes at a time.
        new_bias: [H]; zeros but for a GRU.
        h0: [P, B].
        c: [H, S], an LSTM's cell state, changed in place; else empty.
        bounds: chunks of hidden units, from and to for each thread.
        project_bounds: the same for the projection.
        y: [N, P], filled.

    Returns:
        h [P, S] after the last step.
    """
    order, offsets, h = _begin(sizes, reverse, h0, tile)
    h_new, hidden = zeros(h.shape[0], h.shape[1]), zeros(new_bias.shape[0], h.shape[1])
    for t in order:
        if project[0] == 0:
            _chunks(cell, chunk_size, 0, bounds[-1], matrix, u, offsets[t], sizes[t], new_bias, h, h_new, c, y)
        else:
            _chunks(cell, chunk_size, 0, bounds[-1], matrix, u, offsets[t], sizes[t], new_bias, h, hidden, c, y[:, :0])
            _projected_chunks(chunk_size, 0, project_bounds[-1], project, offsets[t], sizes[t], hidden, h, h_new, y)
        h, h_new = h_new, h
    return h


@njit(nogil=True, cache=True, parallel=True)
def recur_parallel(
    cell, chunk_size, matrix, project, u, sizes, reverse, tile, new_bias, h0, c, bounds, project_bounds, y
):
    """``recur_serial`` on as many threads as ``bounds`` has parts."""
    order, offsets, even = _begin(sizes, reverse, h0, tile)
    odd, hidden = zeros(even.shape[0], even.shape[1]), zeros(new_bias.shape[0], even.shape[1])
    parts = len(bounds) - 1
    for i in range(len(order)):
        t = order[i]
        old, new = (even, odd) if i % 2 == 0 else (odd, even)
        if project[0] == 0:
            for part in prange(parts):
                _chunks(
                    cell,
                    chunk_size,
                    bounds[part],
                    bounds[part + 1],
                    matrix,
                    u,
                    offsets[t],
                    sizes[t],
                    new_bias,
                    old,
                    new,
                    c,
                    y,
                )
        else:
            none = y[:, :0]
            for part in prange(parts):
                first, last = bounds[part], bounds[part + 1]
                _chunks(cell, chunk_size, first, last, matrix, u, offsets[t], sizes[t], new_bias, old, hidden, c, none)
            for part in prange(parts):
                _projected_chunks(
                    chunk_size,
                    project_bounds[part],
                    project_bounds[part + 1],
                    project,
                    offsets[t],
                    sizes[t],
                    hidden,
                    old,
                    new,
                    y,
                )
    return even if len(order) % 2 == 0 else odd
