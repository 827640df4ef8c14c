"""What recurrent kernels do at a step, beside the products: inputs, gates, and how a state is handed on."""

from __future__ import annotations

import triton
import triton.language as tl

CLIP = tl.constexpr(20.0)  # as in the contract; a kernel sees constexpr only


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activated(a, CELL: tl.constexpr):
    """Written so that what is not a number stays so."""
    if CELL == "tanh":
        return _tanh(a)
    a = tl.where(a < 0, 0.0, a)
    if CELL == "clipped_relu":
        a = tl.where(a > CLIP, CLIP, a)
    return a


@triton.jit
def gru(r, z, u_n, v_n, h):
    """A GRU's next state."""
    z = tl.sigmoid(z)
    return (1 - z) * _tanh(u_n + tl.sigmoid(r) * v_n) + z * h


@triton.jit
def lstm(i, f, g, o, c):
    """An LSTM's next output and cell."""
    c = tl.sigmoid(f) * c + tl.sigmoid(i) * _tanh(g)
    return tl.sigmoid(o) * _tanh(c), c


@triton.jit
def inputs_of(u, u_row, u_unit, row, unit, mask, H, GATES: tl.constexpr):
    """Of each gate; the first again for those that a cell does not have."""
    where = u + row * u_row + unit * u_unit
    step = tl.cast(H, tl.int64) * u_unit
    u_0 = tl.load(where, mask=mask, other=0.0)
    u_1, u_2, u_3 = u_0, u_0, u_0
    if GATES > 1:
        u_1 = tl.load(where + step, mask=mask, other=0.0)
        u_2 = tl.load(where + 2 * step, mask=mask, other=0.0)
    if GATES > 3:
        u_3 = tl.load(where + 3 * step, mask=mask, other=0.0)
    return u_0, u_1, u_2, u_3


@triton.jit
def bits_of(x, BITS: tl.constexpr):
    """A float as it is handed on: the bits of its rounding, of one NaN for all that are not numbers."""
    NOT_A_NUMBER: tl.constexpr = 0x7FFFFFFF if BITS.primitive_bitwidth == 32 else 0x7FFF
    return tl.where(x != x, NOT_A_NUMBER, x.to(BITS, bitcast=True)).to(BITS)


@triton.jit
def quarters(a):
    """The four parts of [..., 2, 2]."""
    even, odd = tl.split(a)
    a_0, a_2 = tl.split(even)
    a_1, a_3 = tl.split(odd)
    return a_0, a_1, a_2, a_3


@triton.jit
def rows_at(sizes, offsets, k, stream, reverse, steps, B, EQUAL: tl.constexpr):
    """Rows of u of these streams at the k-th step, and which of them take part in it."""
    t = k
    if reverse:
        t = steps - 1 - k
    size = B
    row = t.to(tl.int64) * B
    if not EQUAL:
        there = (t >= 0) & (t < steps)
        size = tl.load(sizes + t, mask=there, other=0)
        row = tl.load(offsets + t, mask=there, other=0).to(tl.int64)
    return row + stream, stream < size


@triton.jit
def state_at(h, part, k, reverse, steps, SIZE):
    """Where a slice's state before the k-th step is, among those in the order of time."""
    at = k
    if reverse:
        at = steps - k
    return h + (part.to(tl.int64) * (steps + 1) + at) * SIZE
