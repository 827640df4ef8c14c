"""The arithmetic of the cells inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from srnn import cells

_CLIP = tl.constexpr(cells.CLIP)  # a kernel sees constexpr globals only


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activated(a, CELL: tl.constexpr):
    """Written so that NaN stays NaN."""
    if CELL == "tanh":
        return _tanh(a)
    a = tl.where(a < 0, 0.0, a)
    if CELL == "clipped_relu":
        a = tl.where(a > _CLIP, _CLIP, a)
    return a


@triton.jit
def gru_state(r, z, u_n, v_n, h):
    """A GRU's next state."""
    z = tl.sigmoid(z)
    return (1 - z) * _tanh(u_n + tl.sigmoid(r) * v_n) + z * h


@triton.jit
def lstm_state(i, f, g, o, c):
    """An LSTM's next output and cell."""
    c = tl.sigmoid(f) * c + tl.sigmoid(i) * _tanh(g)
    return tl.sigmoid(o) * _tanh(c), c


@triton.jit
def bits_of(x, BITS: tl.constexpr):
    """A float as it is handed on: the bits of its rounding; of all NaN, those of one."""
    NAN: tl.constexpr = 0x7FFFFFFF if BITS.primitive_bitwidth == 32 else 0x7FFF
    return tl.where(x != x, NAN, x.to(BITS, bitcast=True)).to(BITS)


@triton.jit
def quarters(a):
    """The four parts of [..., 2, 2]."""
    even, odd = tl.split(a)
    a_0, a_2 = tl.split(even)
    a_1, a_3 = tl.split(odd)
    return a_0, a_1, a_2, a_3
