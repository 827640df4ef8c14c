"""Compiled: all layers of a network over a sequence of one stream, or all of it for one step, in one call.

A call from Python takes addresses, because an array costs it ten times what a number does.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from srnn.kernels.cpu.gate_loops import LSTM
from srnn.kernels.cpu.loops import step_of_one
from srnn.kernels.cpu.multiplying import copy, multiply, multiply_one, zeros
from srnn.kernels.cpu.shapes import (
    ALIGNED,
    LANES_OF_GROUP,
    NUMBERS_OF_LAYER,
    NUMBERS_OF_MATRIX,
    NUMBERS_OF_PRODUCT,
    NUMBERS_OF_STACK,
    WINDOW,
)
from srnn.kernels.cpu.vector_code import floats, integers, keep


@njit(nogil=True, cache=True)
def run_product(plan, rows, x_at, y_at):
    """y[N, O] = x[N, I] W' + bias on one thread.

    Args:
        plan: the numbers of the product, as ``shapes`` lists them.
        rows: N.
        x_at: address of x.
        y_at: address of y, filled.
    """
    gates, outputs, inputs, bias_at = plan[3], plan[4], plan[5], plan[6]
    matrix = integers(plan.ctypes.data + 8 * NUMBERS_OF_PRODUCT, NUMBERS_OF_MATRIX)
    if rows == 1:
        multiply_one(matrix, gates, inputs, outputs, x_at, bias_at, y_at)
        return
    x, y = floats(x_at, rows * inputs).reshape(rows, inputs), floats(y_at, rows * outputs).reshape(rows, outputs)
    multiply(plan[0], matrix, gates, x, plan[2], floats(bias_at, outputs), plan[1:2], y)


@njit(nogil=True, cache=True)
def run_stack(plan, steps, x_at, h0_at, c0_at, y_at, h_at, c_at):
    """The outputs of a sequence of one stream, and the states after it, on one thread.

    Args:
        plan: the numbers of the layers, as ``shapes`` lists them.
        steps: T.
        x_at: address of x [T, I].
        h0_at: of [L, H].
        c0_at: of [L, H]; any number but for an LSTM.
        y_at: of [T, H], filled.
        h_at: of [L, H], filled.
        c_at: of [L, H], filled for an LSTM.
    """
    cell, layers, units, gates, inputs = plan[0], plan[1], plan[2], plan[3], plan[4]
    u, outputs = np.empty((steps, gates * units), np.float32), gates * units
    width = max(WINDOW, (units + ALIGNED - 1) // ALIGNED * ALIGNED)
    states, v = zeros(2, width), np.empty(gates * _widest(plan), np.float32)
    old_at, new_at, source_at = states.ctypes.data, states.ctypes.data + 4 * width, x_at
    for layer in range(layers):
        at = plan.ctypes.data + 8 * (NUMBERS_OF_STACK + layer * NUMBERS_OF_LAYER)
        of_layer, w_ih = integers(at, 7), integers(at + 8 * 7, NUMBERS_OF_MATRIX)
        w_hh = integers(at + 8 * (7 + NUMBERS_OF_MATRIX), NUMBERS_OF_MATRIX)
        if steps == 1:
            multiply_one(w_ih, gates, inputs, outputs, source_at, of_layer[5], u.ctypes.data)
        else:
            source = floats(source_at, steps * inputs).reshape(steps, inputs)
            multiply(of_layer[0], w_ih, gates, source, of_layer[4], floats(of_layer[5], outputs), of_layer[1:2], u)
        here = 4 * layer * units
        copy(units, old_at, h0_at + here)
        if cell == LSTM:
            copy(units, c_at + here, c0_at + here)
        chunks, bias_at = (of_layer[2], 0, of_layer[3]), of_layer[6]
        for t in range(steps):
            y_t, u_t = y_at + 4 * t * units, u.ctypes.data + 4 * t * outputs
            step_of_one(
                cell,
                gates,
                units,
                chunks,
                w_hh,
                u_t,
                bias_at,
                old_at,
                units,
                new_at,
                c_at + here,
                y_t,
                v.ctypes.data,
            )
            old_at, new_at = new_at, old_at
        copy(units, h_at + here, old_at)
        source_at, inputs = y_at, units
    keep(u)
    keep(states)
    keep(v)


@njit(nogil=True, cache=True)
def _widest(plan):
    """Numbers of scratch memory that a gate takes; of the layer that takes most."""
    widest = 0
    for layer in range(plan[1]):
        at = NUMBERS_OF_STACK + layer * NUMBERS_OF_LAYER
        widest = max(widest, plan[at + 2] + plan[at + 7 + NUMBERS_OF_MATRIX + LANES_OF_GROUP])
    return widest


@njit(nogil=True, cache=True)
def run_step(plan, of_stack, table_at, vocabulary, x_at, h0_at, c0_at, y_at, h_at, c_at):
    """One step of one stream, from the input or the token to the decoder's outputs, on one thread.

    Args:
        plan: the numbers of the layers, then those of the decoder, if there is one.
        of_stack: how many are the layers'.
        table_at: address of the tokens' vectors [V, I].
        vocabulary: V; 0 where the input is no token.
        x_at: address of the input [I], or of a token, int64.
        h0_at: of [L, H].
        c0_at: of [L, H]; any number but for an LSTM.
        y_at: of the outputs [O], filled: the decoder's, or those of the last layer.
        h_at: of [L, H], filled.
        c_at: of [L, H], filled for an LSTM.

    Returns:
        Whether there is such a token; if not, nothing was written.
    """
    units, inputs = plan[2], plan[4]
    if vocabulary:
        token = integers(x_at, 1)[0]
        if token < 0 or token >= vocabulary:
            return False
        x_at = table_at + 4 * inputs * token
    if of_stack == len(plan):
        run_stack(plan, 1, x_at, h0_at, c0_at, y_at, h_at, c_at)
        return True
    y = np.empty(units, np.float32)
    run_stack(plan[:of_stack], 1, x_at, h0_at, c0_at, y.ctypes.data, h_at, c_at)
    run_product(plan[of_stack:], 1, y.ctypes.data, y_at)
    keep(y)
    return True
