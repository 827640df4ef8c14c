"""Compiled: all layers of a network over a sequence of one stream, or all of it for one step, in one call.

A call from Python takes addresses, because an array costs it ten times what a number does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.extending import intrinsic

from srnn.cells import CELLS
from srnn.kernels.cpu.loops import step_of_one
from srnn.kernels.cpu.multiplying import multiply, zeros
from srnn.kernels.cpu.shapes import (
    LANES_OF_GROUP,
    NUMBERS_OF_LAYER,
    NUMBERS_OF_MATRIX,
    NUMBERS_OF_PRODUCT,
    NUMBERS_OF_STACK,
)

_LSTM = CELLS.index("lstm")


def _pointer_to(kind: Any) -> Any:
    """A function of compiled code: an address as a pointer."""
    result = types.CPointer(kind)

    def pointer(typing, address):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(types.int64), codegen

    return intrinsic(pointer)


_floats, _integers = _pointer_to(types.float32), _pointer_to(types.int64)


@njit(nogil=True, cache=True)
def run_product(plan, rows, x_at, y_at):
    """y[N, O] = x[N, I] W' + bias on one thread.

    Args:
        plan: the numbers of the product, as ``shapes`` lists them.
        rows: N.
        x_at: address of x.
        y_at: address of y, filled.
    """
    gates, outputs, inputs, matrix = plan[3], plan[4], plan[5], plan[NUMBERS_OF_PRODUCT:]
    x, y = carray(_floats(x_at), (rows, inputs)), carray(_floats(y_at), (rows, outputs))
    multiply(plan[0], matrix, gates, x, plan[2], carray(_floats(plan[6]), (outputs,)), plan[1:2], y)


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
    y, h0 = carray(_floats(y_at), (steps, units)), carray(_floats(h0_at), (layers, units))
    h = carray(_floats(h_at), (layers, units))
    u = np.empty((steps, gates * units), np.float32)
    old, new, cells = zeros(units, 1), zeros(units, 1), np.zeros((units, 1), np.float32)
    source = carray(_floats(x_at), (steps, inputs))
    for layer in range(layers):
        begin = NUMBERS_OF_STACK + layer * NUMBERS_OF_LAYER
        of_layer = plan[begin : begin + NUMBERS_OF_LAYER]
        w_ih, w_hh = of_layer[7 : 7 + NUMBERS_OF_MATRIX], of_layer[7 + NUMBERS_OF_MATRIX :]
        input_bias = carray(_floats(of_layer[5]), (gates * units,))
        new_bias = carray(_floats(of_layer[6]), (units,))
        multiply(of_layer[0], w_ih, gates, source, of_layer[4], input_bias, of_layer[1:2], u)
        old[:, 0] = h0[layer]
        if cell == _LSTM:
            cells[:, 0] = carray(_floats(c0_at), (layers, units))[layer]
        v = np.empty((gates, of_layer[2] + w_hh[LANES_OF_GROUP]), np.float32)
        for t in range(steps):
            step_of_one(cell, of_layer[2], 0, of_layer[3], w_hh, u, t, new_bias, old, new, cells, y, v)
            old, new = new, old
        h[layer] = old[:, 0]
        if cell == _LSTM:
            carray(_floats(c_at), (layers, units))[layer] = cells[:, 0]
        source = y


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
        token = carray(_integers(x_at), (1,))[0]
        if token < 0 or token >= vocabulary:
            return False
        x_at = table_at + 4 * inputs * token
    if of_stack == len(plan):
        run_stack(plan, 1, x_at, h0_at, c0_at, y_at, h_at, c_at)
        return True
    y = zeros(1, units)
    run_stack(plan[:of_stack], 1, x_at, h0_at, c0_at, y.ctypes.data, h_at, c_at)
    run_product(plan[of_stack:], 1, y.ctypes.data, y_at)
    return True
