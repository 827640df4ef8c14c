"""Compiled loops over time, around the products of ``multiplying``.

One loop serves all cells and formats. Work is cut into chunks of hidden units: the products of a chunk with all
gates, then the gates' arithmetic, then the new state of those units. h is kept as ``[H, S]``, S the streams rounded
up to the product's tile. What a thread has to do is fixed beforehand, so that all get the same number of blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, prange

from srnn.cells import CELLS, CLIP
from srnn.kernels.cpu.multiplying import as_taken, multiply, products, zeros
from srnn.kernels.cpu.shapes import LANES_OF_GROUP

TANH, RELU, CLIPPED, GRU, LSTM = (CELLS.index(cell) for cell in ("tanh", "relu", "clipped_relu", "gru", "lstm"))

ZERO, HALF, ONE, CEILING = np.float32(0), np.float32(0.5), np.float32(1), np.float32(CLIP)
INFINITY = np.float32(np.inf)
# tanh(x) = x P(x^2) / Q(x^2) up to 9, where it is 1 in fp32; our own weighted least-squares fit, 4e-11 off before
# rounding, 3.2e-7 in fp32. A rational function keeps the loops below vectorised, which a call of tanh would not.
LARGEST = np.float32(9)
P0, P1, P2 = np.float32(1.0), np.float32(0.14099948108196259), np.float32(0.004426933825016022)
P3, P4, P5 = np.float32(4.2299179767724127e-05), np.float32(1.1132286914516953e-07), np.float32(3.683663790665648e-11)
Q0, Q1, Q2 = np.float32(1.0), np.float32(0.4743328094482422), np.float32(0.029204538092017174)
Q3, Q4, Q5 = np.float32(0.0005010237800888717), np.float32(2.6062236884172307e-06), np.float32(2.956636269146884e-09)


# Multiplications and additions become one instruction where the processor has that; nothing else is reordered.
_FUSED: Any = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(inline="always")
def tanh(x):
    """Comparisons this way round let NaN through."""
    x = LARGEST if x > LARGEST else x
    x = -LARGEST if x < -LARGEST else x
    s = x * x
    return (
        x
        * (P0 + s * (P1 + s * (P2 + s * (P3 + s * (P4 + s * P5)))))
        / (Q0 + s * (Q1 + s * (Q2 + s * (Q3 + s * (Q4 + s * Q5)))))
    )


@njit(inline="always")
def sigmoid(x):
    """From tanh."""
    return HALF + HALF * tanh(HALF * x)


# Loops over a few rows each: where there are more, the compiler gives up proving that they do not overlap, and does
# not vectorise. numpy's error model, because a check for division by zero has the same effect.
@njit(**_FUSED)
def _sigmoid_of_sum(n, v, u):
    for k in range(n):
        v[k] = sigmoid(u[k] + v[k])


@njit(**_FUSED)
def _tanh_of_sum(n, v, u):
    for k in range(n):
        v[k] = tanh(u[k] + v[k])


@njit(**_FUSED)
def _reset(n, new, r, bias):
    for k in range(n):
        new[k] = r[k] * (new[k] + bias[k])


@njit(**_FUSED)
def _keep_and_add(n, c, f, i, g):
    for k in range(n):
        i[k] *= g[k]
    for k in range(n):
        c[k] = f[k] * c[k] + i[k]


@njit(**_FUSED)
def _mix(n, h, z, new):
    for k in range(n):
        h[k] = (ONE - z[k]) * new[k] + z[k] * h[k]


@njit(**_FUSED)
def _times_tanh(n, h, o, c):
    for k in range(n):
        h[k] = o[k] * tanh(c[k])


@njit(nogil=True, cache=True)
def _copy(n, target, source):
    """A loop, because numba's own assignment of a slice is ten times slower: it looks for overlaps."""
    for k in range(n):
        target[k] = source[k]


@njit(nogil=True, cache=True, error_model="numpy")
def _gates(cell, n, v, u0, u1, u2, u3, h, c, new_bias):
    """New h (and c) in place, ``n`` numbers side by side; v[gate] the product with h, overwritten, u that with x."""
    if cell == GRU:
        r, z, new = v[0], v[1], v[2]
        _sigmoid_of_sum(n, r, u0)
        _sigmoid_of_sum(n, z, u1)
        _reset(n, new, r, new_bias)
        _tanh_of_sum(n, new, u2)
        _mix(n, h, z, new)
    elif cell == LSTM:
        i, f, g, o = v[0], v[1], v[2], v[3]
        _sigmoid_of_sum(n, i, u0)
        _sigmoid_of_sum(n, f, u1)
        _tanh_of_sum(n, g, u2)
        _sigmoid_of_sum(n, o, u3)
        _keep_and_add(n, c, f, i, g)
        _times_tanh(n, h, o, c)
    elif cell == TANH:
        _copy(n, h, v[0])
        _tanh_of_sum(n, h, u0)
    else:
        ceiling = CEILING if cell == CLIPPED else INFINITY
        for k in range(n):
            a = u0[k] + v[0, k]
            a = ZERO if a < ZERO else a
            h[k] = ceiling if a > ceiling else a


@njit(nogil=True, cache=True)
def _chunks(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y):
    """One step of the hidden units of some chunks. With a projection, ``y`` has no columns."""
    units = h_new.shape[0]
    v = np.empty((u.shape[1] // units, (chunk_size + matrix[LANES_OF_GROUP]) * h.shape[1]), np.float32)
    if h.shape[1] == 1:
        step_of_one(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, new_bias, h, h_new, c, y, v)
    else:
        _chunks_of_many(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y, v)


@njit(nogil=True, cache=True)
def step_of_one(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, new_bias, h, h_new, c, y, v):
    """One stream: all rows lie as the arithmetic takes them."""
    units = h_new.shape[0]
    gates = u.shape[1] // units
    row, old, new, cells = u[offset], h.reshape(-1), h_new.reshape(-1), c.reshape(-1)
    x, careful = as_taken(matrix, h)
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        last = min(first + chunk_size, units)
        for gate in range(gates):
            products(matrix, gate, first, last - first, x, 1, careful, v[gate])
        if cell == GRU:
            _copy(last - first, new[first:last], old[first:last])
        u0 = row[first:last]
        u1 = row[units + first : units + last] if gates > 1 else u0
        u2 = row[2 * units + first : 2 * units + last] if gates > 1 else u0
        u3 = row[3 * units + first : 3 * units + last] if gates > 3 else u0
        _gates(cell, last - first, v, u0, u1, u2, u3, new[first:last], cells[first:last], new_bias[first:last])
        if y.shape[1]:
            _copy(last - first, y[offset, first:last], new[first:last])


@njit(nogil=True, cache=True)
def _chunks_of_many(cell, chunk_size, first_chunk, last_chunk, matrix, u, offset, size, new_bias, h, h_new, c, y, v):
    """Several streams: rows are gathered as the product writes its own, [group, stream, lane], then put back."""
    lanes, streams, units = matrix[LANES_OF_GROUP], h.shape[1], h_new.shape[0]
    gates = u.shape[1] // units
    taken, careful = as_taken(matrix, h)
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
            products(matrix, gate, first, count, taken, streams, careful, v[gate])
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
        _gates(cell, groups * streams * lanes, v, x[0], x[1], x[2], x[3], new, cells, bias)
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
    x, careful = as_taken(matrix, hidden)
    for chunk in range(first_chunk, last_chunk):
        first = chunk * chunk_size
        count = min(chunk_size, units - first)
        products(matrix, 0, first, count, x, streams, careful, out)
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


@njit(nogil=True, cache=True)
def step_layer(cell, chunks, input_matrix, matrix, input_bias, new_bias, x, h0, c0, y, h, c):
    """One step of one stream, product with the input included, on one thread; c of other cells than LSTM is empty.

    Args:
        cell: index in ``CELLS``.
        chunks: units of a chunk and number of chunks, of the input's matrix and of the recurrent one.
        input_matrix: the numbers of W_ih.
        matrix: the numbers of W_hh.
        input_bias: [G].
        new_bias: [H]; zeros but for a GRU.
        x: [1, I].
        h0: [1, H].
        c0: [1, H].
        y: [1, H], filled.
        h: [1, H], filled.
        c: [1, H], filled.
    """
    units = new_bias.shape[0]
    u = np.empty((1, input_bias.shape[0]), np.float32)
    multiply(chunks[0], input_matrix, input_bias.shape[0] // units, x, 1, input_bias, chunks[:2], u)
    old, new = zeros(units, 1), zeros(units, 1)
    old[:, 0] = h0[0]
    c[:] = c0
    _chunks(cell, chunks[2], 0, chunks[3], matrix, u, 0, 1, new_bias, old, new, c.reshape(-1, 1), y)
    h[0] = new[:, 0]


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
