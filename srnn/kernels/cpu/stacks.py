"""Compiled: all layers of a network over a sequence of one stream, or all of it for one step, in one call.

Each takes the address of its arguments, which are int64 and addresses mostly: no call from Python costs less. They need
nothing of numba when they run; see ``compiled``.
"""

from __future__ import annotations

from numba import njit

from srnn.kernels.cpu.gate_loops import LSTM
from srnn.kernels.cpu.loops import step_of_one
from srnn.kernels.cpu.multiplying import COMPILED, multiply, next_line
from srnn.kernels.cpu.shapes import (
    ALIGNED,
    DONE,
    LANES_OF_GROUP,
    NO_MEMORY,
    NO_TOKEN,
    NUMBERS_OF_LAYER,
    NUMBERS_OF_MATRIX,
    NUMBERS_OF_PRODUCT,
    NUMBERS_OF_STACK,
    WINDOW,
)
from srnn.kernels.cpu.vector_code import clear, copy, free_memory, number, take_memory


@njit(**COMPILED)
def run_product(at):
    """y[N, O] = x[N, I] W' + bias on one thread.

    Args:
        at: of the addresses of the numbers of the product, as ``shapes`` lists them, N, and the addresses of x and of
            y, which is filled.

    Returns:
        ``DONE``, or ``NO_MEMORY`` if there is not enough.
    """
    plan, rows, x_at, y_at = number(at, 0), number(at, 1), number(at, 2), number(at, 3)
    return _product(plan, rows, x_at, y_at)


@njit(**COMPILED)
def _product(plan, rows, x_at, y_at):
    chunk_size, chunks, tile, gates = number(plan, 0), number(plan, 1), number(plan, 2), number(plan, 3)
    outputs, inputs, bias_at = number(plan, 4), number(plan, 5), number(plan, 6)
    matrix = plan + 8 * NUMBERS_OF_PRODUCT
    return multiply(chunk_size, chunks, matrix, gates, inputs, outputs, x_at, rows, tile, bias_at, y_at)


@njit(**COMPILED)
def run_stack(at):
    """The outputs of a sequence of one stream, and the states after it, on one thread.

    Args:
        at: of the address of the numbers of the layers, as ``shapes`` lists them; T; and the addresses of x [T, I], of
            h and c before [L, H], of y [T, H], h and c after, which are filled. Those of c are of an LSTM.

    Returns:
        ``DONE``, or ``NO_MEMORY`` if there is not enough.
    """
    return _layers(number(at, 0), number(at, 1), number(at, 2), at + 8 * 3, number(at, 5), at + 8 * 6)


@njit(**COMPILED)
def _layers(plan, steps, x_at, before, y_at, after):
    """``before`` and ``after`` are where the addresses of h and c are."""
    cell, layers, units, gates = number(plan, 0), number(plan, 1), number(plan, 2), number(plan, 3)
    inputs, outputs = number(plan, 4), gates * units
    width = max(WINDOW, (units + ALIGNED - 1) // ALIGNED * ALIGNED)
    of_u, of_v = (steps * outputs + ALIGNED - 1) // ALIGNED * ALIGNED, gates * _widest(plan)
    memory = take_memory(4 * (2 * width + of_u + of_v) + 64)
    if memory == 0:
        return NO_MEMORY
    old_at = next_line(memory)
    new_at, u_at = old_at + 4 * width, old_at + 8 * width
    v_at, source_at = u_at + 4 * of_u, x_at
    clear(2 * width, old_at)
    for layer in range(layers):
        of_layer = plan + 8 * (NUMBERS_OF_STACK + layer * NUMBERS_OF_LAYER)
        w_ih, w_hh = of_layer + 8 * 7, of_layer + 8 * (7 + NUMBERS_OF_MATRIX)
        tile, input_bias, new_bias = number(of_layer, 4), number(of_layer, 5), number(of_layer, 6)
        chunks = number(of_layer, 0), number(of_layer, 1)
        x, u = source_at, u_at
        if multiply(chunks[0], chunks[1], w_ih, gates, inputs, outputs, x, steps, tile, input_bias, u) != DONE:
            free_memory(memory)
            return NO_MEMORY
        here = 4 * layer * units
        h_at, c_at = number(after, 0) + here, number(after, 1) + here
        copy(units, old_at, number(before, 0) + here)
        if cell == LSTM:
            copy(units, c_at, number(before, 1) + here)
        chunks = number(of_layer, 2), 0, number(of_layer, 3)
        for t in range(steps):
            y_t, u_t = y_at + 4 * t * units, u_at + 4 * t * outputs
            step_of_one(cell, gates, units, chunks, w_hh, u_t, new_bias, old_at, units, new_at, c_at, y_t, v_at)
            old_at, new_at = new_at, old_at
        copy(units, h_at, old_at)
        source_at, inputs = y_at, units
    free_memory(memory)
    return DONE


@njit(**COMPILED)
def _widest(plan):
    """Numbers of scratch memory that a gate takes; of the layer that takes most."""
    widest = 0
    for layer in range(number(plan, 1)):
        at = plan + 8 * (NUMBERS_OF_STACK + layer * NUMBERS_OF_LAYER)
        widest = max(widest, number(at, 2) + number(at + 8 * (7 + NUMBERS_OF_MATRIX), LANES_OF_GROUP))
    return widest


@njit(**COMPILED)
def run_step(at):
    """One step of one stream, from the input or the token to the decoder's outputs, on one thread.

    Args:
        at: of the address of the numbers of the layers, followed by those of the decoder, if there is one; how many
            are the layers'; whether there is a decoder; the address of the tokens' vectors [V, I], and V, which is 0
            where the input is no token; the address of the input [I], or of a token, int64; those of h and c before
            [L, H], of the outputs, and of h and c after. Outputs, h and c after are filled.

    Returns:
        ``DONE``, ``NO_MEMORY``, or ``NO_TOKEN`` if V is too small.
    """
    plan, of_stack, decodes, table_at = number(at, 0), number(at, 1), number(at, 2), number(at, 3)
    vocabulary, x_at, y_at = number(at, 4), number(at, 5), number(at, 8)
    units, inputs = number(plan, 2), number(plan, 4)
    if vocabulary:
        token = number(x_at, 0)
        if token < 0 or token >= vocabulary:
            return NO_TOKEN
        x_at = table_at + 4 * inputs * token
    if not decodes:
        return _layers(plan, 1, x_at, at + 8 * 6, y_at, at + 8 * 9)
    memory = take_memory(4 * units)
    if memory == 0:
        return NO_MEMORY
    done = _layers(plan, 1, x_at, at + 8 * 6, memory, at + 8 * 9)
    if done == DONE:
        done = _product(plan + 8 * of_stack, 1, memory, y_at)
    free_memory(memory)
    return done
