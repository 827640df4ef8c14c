"""What a step of a recurrence computes beside its product with the recurrent matrix: one launch, forward or backward.

Every array is contiguous. Rows are those of all directions and streams, each of H units, or of G gates * H.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srnn import cells

UNITS_A_PROGRAM = 256  # few, so that a step of few streams still fills the processors
_CLIP = tl.constexpr(cells.CLIP)  # a kernel sees constexpr globals only


@triton.jit
def _read(array, place, inside):
    """Values to compute with: those of 16 bits are widened."""
    value = tl.load(array + place, inside)
    return value if array.dtype.element_ty == tl.float64 else value.to(tl.float32)


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def step_forward(
    u,  # [rows, G], products with the input
    v,  # [rows, G], products with the state
    h,  # [rows, H], the state
    c,  # [rows, H], of an LSTM
    h_next,
    c_next,
    h_low,  # the next state in the dtype of products, if that is another
    gates,  # what the backward step wants, if it will come: r, z, n, v_n of a GRU; i, f, g, o of an LSTM
    size,  # rows times H
    H,
    CELL: tl.constexpr,
    LOW: tl.constexpr,
    KEEP: tl.constexpr,  # whether the backward step will come
    BLOCK: tl.constexpr,
):
    """The next state."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    row = place // H
    unit = place - row * H
    if CELL == "gru":
        one = row * 3 * H + unit
        r = tl.sigmoid(_read(u, one, inside) + _read(v, one, inside))
        z = tl.sigmoid(_read(u, one + H, inside) + _read(v, one + H, inside))
        v_n = _read(v, one + 2 * H, inside)
        n = _tanh(_read(u, one + 2 * H, inside) + r * v_n)
        y = (1 - z) * n + z * _read(h, place, inside)
        if KEEP:
            kept = row * 4 * H + unit
            tl.store(gates + kept, r, inside)
            tl.store(gates + kept + H, z, inside)
            tl.store(gates + kept + 2 * H, n, inside)
            tl.store(gates + kept + 3 * H, v_n, inside)
    elif CELL == "lstm":
        one = row * 4 * H + unit
        i = tl.sigmoid(_read(u, one, inside) + _read(v, one, inside))
        f = tl.sigmoid(_read(u, one + H, inside) + _read(v, one + H, inside))
        g = _tanh(_read(u, one + 2 * H, inside) + _read(v, one + 2 * H, inside))
        o = tl.sigmoid(_read(u, one + 3 * H, inside) + _read(v, one + 3 * H, inside))
        cell = f * _read(c, place, inside) + i * g
        y = o * _tanh(cell)
        tl.store(c_next + place, cell, inside)
        if KEEP:
            tl.store(gates + one, i, inside)
            tl.store(gates + one + H, f, inside)
            tl.store(gates + one + 2 * H, g, inside)
            tl.store(gates + one + 3 * H, o, inside)
    else:
        y = _read(u, place, inside) + _read(v, place, inside)
        if CELL == "tanh":
            y = _tanh(y)
        else:  # written so that NaN stays NaN
            y = tl.where(y < 0, 0.0, y)
            if CELL == "clipped_relu":
                y = tl.where(y > _CLIP, _CLIP, y)
    tl.store(h_next + place, y, inside)
    if LOW:
        tl.store(h_low + place, y, inside)


@triton.jit
def step_backward(
    dy,  # [rows, H], gradient of this step's output
    dh,  # [rows, H], what the step after it gives the state through its product
    carry,  # [rows, H]: of a GRU, what it gives the state beside its product; of an LSTM, of c. Becomes this step's.
    y,  # [rows, H], the state after this step; of a GRU, before it
    c,  # [rows, H], of an LSTM, before this step
    c_next,  # and after it
    gates,
    du,  # [rows, G]
    dv,  # [rows, G], the same of products with the state, if it is not of the same memory
    size,
    H,
    CELL: tl.constexpr,
    APART: tl.constexpr,  # whether dv has memory of its own
    BLOCK: tl.constexpr,
):
    """Gradients of a step's products."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    row = place // H
    unit = place - row * H
    d = _read(dy, place, inside) + _read(dh, place, inside)
    if CELL == "gru":
        kept = row * 4 * H + unit
        r = _read(gates, kept, inside)
        z = _read(gates, kept + H, inside)
        n = _read(gates, kept + 2 * H, inside)
        v_n = _read(gates, kept + 3 * H, inside)
        d += _read(carry, place, inside)
        d_n = d * (1 - z) * (1 - n * n)
        d_z = d * (_read(y, place, inside) - n) * z * (1 - z)
        d_r = d_n * v_n * r * (1 - r)
        tl.store(carry + place, d * z, inside)
        one = row * 3 * H + unit
        tl.store(du + one, d_r, inside)
        tl.store(du + one + H, d_z, inside)
        tl.store(du + one + 2 * H, d_n, inside)
        tl.store(dv + one, d_r, inside)
        tl.store(dv + one + H, d_z, inside)
        tl.store(dv + one + 2 * H, d_n * r, inside)
    elif CELL == "lstm":
        one = row * 4 * H + unit
        i = _read(gates, one, inside)
        f = _read(gates, one + H, inside)
        g = _read(gates, one + 2 * H, inside)
        o = _read(gates, one + 3 * H, inside)
        t = _tanh(_read(c_next, place, inside))
        d_c = _read(carry, place, inside) + d * o * (1 - t * t)
        tl.store(carry + place, d_c * f, inside)
        d_i = d_c * g * i * (1 - i)
        d_f = d_c * _read(c, place, inside) * f * (1 - f)
        d_g = d_c * i * (1 - g * g)
        d_o = d * t * o * (1 - o)
        tl.store(du + one, d_i, inside)
        tl.store(du + one + H, d_f, inside)
        tl.store(du + one + 2 * H, d_g, inside)
        tl.store(du + one + 3 * H, d_o, inside)
        if APART:
            tl.store(dv + one, d_i, inside)
            tl.store(dv + one + H, d_f, inside)
            tl.store(dv + one + 2 * H, d_g, inside)
            tl.store(dv + one + 3 * H, d_o, inside)
    else:
        # From the output alone: at the two corners themselves the slope is taken as 0.
        out = _read(y, place, inside)
        if CELL == "tanh":
            d = d * (1 - out * out)
        elif CELL == "relu":
            d = tl.where(out > 0, d, 0.0)
        else:
            d = tl.where((out > 0) & (out < _CLIP), d, 0.0)
        tl.store(du + place, d, inside)
        if APART:
            tl.store(dv + place, d, inside)
