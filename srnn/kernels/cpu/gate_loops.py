"""Compiled: the arithmetic of gates, from the products of a few units to their new state."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from srnn.cells import CELLS, CLIP
from srnn.kernels.cpu.multiplying import copy
from srnn.kernels.cpu.vector_code import floats

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
def _sigmoid_of_sum(n, v_at, u_at):
    v, u = floats(v_at, n), floats(u_at, n)
    for k in range(n):
        v[k] = sigmoid(u[k] + v[k])


@njit(**_FUSED)
def _tanh_of_sum(n, v_at, u_at):
    v, u = floats(v_at, n), floats(u_at, n)
    for k in range(n):
        v[k] = tanh(u[k] + v[k])


@njit(**_FUSED)
def _reset(n, new_at, r_at, bias_at):
    new, r, bias = floats(new_at, n), floats(r_at, n), floats(bias_at, n)
    for k in range(n):
        new[k] = r[k] * (new[k] + bias[k])


@njit(**_FUSED)
def _keep_and_add(n, c_at, f_at, i_at, g_at):
    c, f, i, g = floats(c_at, n), floats(f_at, n), floats(i_at, n), floats(g_at, n)
    for k in range(n):
        i[k] *= g[k]
    for k in range(n):
        c[k] = f[k] * c[k] + i[k]


@njit(**_FUSED)
def _mix(n, h_at, z_at, new_at):
    h, z, new = floats(h_at, n), floats(z_at, n), floats(new_at, n)
    for k in range(n):
        h[k] = (ONE - z[k]) * new[k] + z[k] * h[k]


@njit(**_FUSED)
def _times_tanh(n, h_at, o_at, c_at):
    h, o, c = floats(h_at, n), floats(o_at, n), floats(c_at, n)
    for k in range(n):
        h[k] = o[k] * tanh(c[k])


@njit(nogil=True, cache=True, error_model="numpy")
def _clip_sum(n, h_at, v_at, u_at, ceiling):
    h, v, u = floats(h_at, n), floats(v_at, n), floats(u_at, n)
    for k in range(n):
        a = u[k] + v[k]
        a = ZERO if a < ZERO else a
        h[k] = ceiling if a > ceiling else a


@njit(nogil=True, cache=True, error_model="numpy")
def gate_arithmetic(cell, n, v_at, v_step, u_at, u_step, h_at, c_at, bias_at):
    """New h (and c) in place, ``n`` numbers side by side; v the product with h, overwritten, u that with x.

    Of each comes a gate, then after ``step`` bytes the next one.
    """
    v1, v2, v3 = v_at + v_step, v_at + 2 * v_step, v_at + 3 * v_step
    u1, u2, u3 = u_at + u_step, u_at + 2 * u_step, u_at + 3 * u_step
    if cell == GRU:
        _sigmoid_of_sum(n, v_at, u_at)
        _sigmoid_of_sum(n, v1, u1)
        _reset(n, v2, v_at, bias_at)
        _tanh_of_sum(n, v2, u2)
        _mix(n, h_at, v1, v2)
    elif cell == LSTM:
        _sigmoid_of_sum(n, v_at, u_at)
        _sigmoid_of_sum(n, v1, u1)
        _tanh_of_sum(n, v2, u2)
        _sigmoid_of_sum(n, v3, u3)
        _keep_and_add(n, c_at, v1, v_at, v2)
        _times_tanh(n, h_at, v3, c_at)
    elif cell == TANH:
        copy(n, h_at, v_at)
        _tanh_of_sum(n, h_at, u_at)
    else:
        _clip_sum(n, h_at, v_at, u_at, CEILING if cell == CLIPPED else INFINITY)
