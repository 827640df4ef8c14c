"""The recurrent loop as one launch for several streams: products of blocks on tensor cores, slices of streams.

Nothing here may be launched unless all programs of the grid run at the same time: they wait for each other. The
``first`` and ``last`` steps make a form that does not wait: one launch a step.

Letters: T steps, B streams, N rows of a block, H hidden units, G gates * H. A *chunk* is some blocks of one gate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from srnn.kernels.contract import State
from srnn.kernels.triton.call import RecurrentCall
from srnn.kernels.triton.gate_math import activated, bits_of, gru_state, lstm_state, quarters
from srnn.kernels.triton.prologue import (
    after_slice,
    direction_of,
    inputs_at,
    own_state,
    rows_at,
    state_at,
    units_of,
)
from srnn.kernels.triton.slices.layout import SliceLayout
from srnn.kernels.triton.slices.states import SlicedStates
from srnn.kernels.triton.wait import written


@triton.jit
def _blocks_of(values, columns, program, tile, TILES: tl.constexpr, K: tl.constexpr, S: tl.constexpr, N: tl.constexpr):
    """Values [S, N, K] and columns [S, K / 4, 4] of a tile of a program's chunks."""
    chunk, k = tl.arange(0, S), tl.arange(0, K)
    place = program * TILES + tile
    column = tl.load(columns + place * (S * K) + chunk[:, None] * K + k[None, :]).to(tl.int32)
    within = (chunk[:, None, None] * N + tl.arange(0, N)[None, :, None]) * K + k[None, None, :]
    return tl.load(values + place.to(tl.int64) * (S * N * K) + within), tl.reshape(column, (S, K // 4, 4))


@triton.jit
def _rows_of(now, column, BP: tl.constexpr):
    """[S, K / 4, 4, BP]: the bits of the rows ``column`` of now [H, BP], whether or not they are written yet."""
    batch = tl.arange(0, BP)[None, None, None, :]
    used = (column >= 0)[:, :, :, None] & (batch < BP)
    # The hint, which promises nothing that is used, makes four columns of a chunk neighbours among the threads and the
    # others of a thread. In shared memory they so lie as products read them, and are written without bank conflicts.
    where = tl.max_contiguous(now + (column * BP)[:, :, :, None] + batch, [1, 1, 2, BP])
    return tl.load(where, mask=used, other=0, volatile=True)


@triton.jit
def _times(value, bits, column, now, failed, wait, acc, FLOAT: tl.constexpr, BP: tl.constexpr, VECTORS: tl.constexpr,
           PRECISION: tl.constexpr, WIDEN: tl.constexpr, WAITS: tl.constexpr):  # fmt: skip
    """acc and value [S, N, K] times what ``_rows_of`` loaded, once all of it is written."""
    if WAITS:
        PER_VECTOR: tl.constexpr = 128 // now.dtype.element_ty.primitive_bitwidth
        vector = (column * BP)[:, :, :, None] + (tl.arange(0, BP) & -PER_VECTOR)[None, None, None, :]
        bits = written(bits, vector, now, failed, wait, VECTORS)
    x = tl.reshape(bits.to(FLOAT, bitcast=True), (value.shape[0], value.shape[2], BP))
    if WIDEN:
        value, x = value.to(tl.float32), x.to(tl.float32)
    return tl.dot(value, x, acc, input_precision=PRECISION)


@triton.jit
def _of_warps(acc, GATES: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr, N: tl.constexpr, BP: tl.constexpr):
    """The sums of a gate's chunks, [BP, N] a gate. Chunk s lies in warp s % WARPS, as a batch of dot products does.

    Each warp first adds up its own; what is left goes through shared memory once.
    """
    a = tl.sum(tl.reshape(acc, (S // WARPS, WARPS, N, BP)), axis=0)
    a = tl.permute(a, (2, 1, 0))
    if WARPS == 16:
        even, odd = tl.split(tl.reshape(a, (BP, N, 8, 2)))
        a = even + odd
    if WARPS >= 8:
        even, odd = tl.split(tl.reshape(a, (BP, N, 4, 2)))
        a = even + odd
    a_0, a_1, a_2, a_3 = quarters(tl.reshape(a, (BP, N, 2, 2)))
    if GATES == 1:
        a_0 = (a_0 + a_1) + (a_2 + a_3)
    return a_0, a_1, a_2, a_3


@triton.jit
def recur_slices(
    u,  # [rows, D, G], D directions
    h,  # [D, slices, T + 1, H, BP], bits of the states in the order of time, all ones where not written yet
    c,  # [D, slices, H, BP], fp32, of an LSTM; read and written
    values,  # [D * programs, TILES, S, N, K]
    columns,  # [D * programs, TILES, S, K]; -1 for none
    values_2,  # [D * programs, S, N, K_2]
    columns_2,  # [D * programs, S, K_2]
    units,  # [D * programs * N], 0, 1, 2, ... for each direction
    new_bias,  # [D, H]
    sizes,  # [T], streams of a step
    offsets,  # [T], first row of a step
    failed,  # [1], set where a program gave up
    slices,
    first,
    last,
    steps,
    B,
    H,
    u_row,  # strides of u, of which one is 1
    u_unit,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    K_2: tl.constexpr,
    TILES: tl.constexpr,
    WARPS: tl.constexpr,
    BP: tl.constexpr,
    VECTORS: tl.constexpr,  # of 16 bytes that a thread loads of a tile's rows of h
    VECTORS_2: tl.constexpr,
    ONE_SLICE: tl.constexpr,  # for each program, which then keeps its state
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BOTH: tl.constexpr,  # directions, of which the second is reversed
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    WAITS: tl.constexpr,
):
    """BP streams at a time on tensor cores, one group of N units a program, its weights in registers if they fit.

    The blocks fall into S chunks whose products are one batch of small ones. A program waits for those rows of h that
    its blocks multiply. Slices of streams are dealt out to the rows of the grid; a row that has several goes through
    all of them at each step, so that each is computed while others wait.

    Loops are ``while`` loops because out of those the compiler keeps what does not change in registers.
    """
    # More streams take so many registers that the next slice's rows would not fit beside this one's.
    AHEAD: tl.constexpr = TILES == 1 and not ONE_SLICE and BP < 32
    program = tl.program_id(0)
    FLOAT = u.dtype.element_ty
    BITS = h.dtype.element_ty
    SIZE = tl.cast(H, tl.int64) * BP  # H is a plain number where it is 1
    direction, reverse, u = direction_of(u, u_unit, H, GATES, REVERSE, BOTH)
    if BOTH:
        h += direction * slices * (steps + 1) * SIZE
        c += direction * slices * SIZE
        new_bias += direction * H
    unit, batch, place = units_of(units, program, N, BP)
    if TILES == 1:
        value, column = _blocks_of(values, columns, program, 0, 1, K, S, N)
        if K_2:
            value_2, column_2 = _blocks_of(values_2, columns_2, program, 0, 1, K_2, S, N)
    bias = tl.zeros((BP, N), tl.float32)
    if BIASED:
        bias = tl.load(new_bias + unit + batch * 0, mask=unit < H, other=0.0)
    k = first
    part = tl.program_id(1)
    now = state_at(h, part, k, reverse, steps, SIZE)
    active, u_0, u_1, u_2, u_3 = inputs_at(
        u, sizes, offsets, k, part, unit, batch, u_row, u_unit, reverse, steps, B, H, last, BP, GATES, EQUAL, False
    )
    mine, cell = own_state(now, c, part, place, unit, H, SIZE, bias, CELL)
    if AHEAD:
        x = _rows_of(now, column, BP)
        if K_2:
            x_2 = _rows_of(now, column_2, BP)
    while k < last:
        wait = (k > first).to(tl.int32)
        k_next, part_next = after_slice(k, part, slices)
        there = tl.minimum(k_next, last)  # after the last step something to point to
        next = state_at(h, part_next, there, reverse, steps, SIZE)
        acc = tl.zeros((S, N, BP), tl.float32)
        if TILES == 1:
            if not AHEAD:
                x = _rows_of(now, column, BP)
                if K_2:
                    x_2 = _rows_of(now, column_2, BP)
            acc = _times(value, x, column, now, failed, wait, acc, FLOAT, BP, VECTORS, PRECISION, WIDEN, WAITS)
            if K_2:
                acc = _times(
                    value_2, x_2, column_2, now, failed, wait, acc, FLOAT, BP, VECTORS_2, PRECISION, WIDEN, WAITS
                )
            if AHEAD:
                x = _rows_of(next, column, BP)
                if K_2:
                    x_2 = _rows_of(next, column_2, BP)
        else:
            for tile in range(TILES):
                value, column = _blocks_of(values, columns, program, tile, TILES, K, S, N)
                x = _rows_of(now, column, BP)
                acc = _times(value, x, column, now, failed, wait, acc, FLOAT, BP, VECTORS, PRECISION, WIDEN, WAITS)
        a_0, a_1, a_2, a_3 = _of_warps(acc, GATES, S, WARPS, N, BP)

        stream = part * BP + batch
        _, taking_part = rows_at(sizes, offsets, k, stream, reverse, steps, B, EQUAL)
        active = taking_part & (unit < H)
        old = mine.to(FLOAT, bitcast=True)
        a_0 += u_0.to(tl.float32)
        if GATES > 1:
            a_1 += u_1.to(tl.float32)
        if CELL == "gru":
            new = gru_state(a_0, a_1, u_2.to(tl.float32), a_2 + bias, old.to(tl.float32))
        elif CELL == "lstm":
            new, after = lstm_state(a_0, a_1, a_2 + u_2.to(tl.float32), a_3 + u_3.to(tl.float32), cell)
            cell = tl.where(active, after, cell)
            if not ONE_SLICE or k + 1 == last:
                tl.store(c + part * SIZE + place, cell, mask=unit < H)
        else:
            new = activated(a_0, CELL)
        kept = new.to(FLOAT)
        if not EQUAL:
            kept = tl.where(active, kept, old)
        mine = bits_of(kept, BITS)
        tl.store(state_at(h, part, k + 1, reverse, steps, SIZE) + place, mine, mask=unit < H)

        # Inputs of what comes next, which so have a step's time to arrive. Not earlier: a second set of registers would
        # be copied into this one, which waits for the loads.
        k, part, now = k_next, part_next, next
        active, u_0, u_1, u_2, u_3 = inputs_at(
            u, sizes, offsets, k, part, unit, batch, u_row, u_unit, reverse, steps, B, H, last, BP, GATES, EQUAL, True
        )
        if not ONE_SLICE:
            mine, cell = own_state(now, c, part, place, unit, H, SIZE, cell, CELL)


def run_slices(call: RecurrentCall, layout: SliceLayout) -> tuple[Tensor, State]:
    """Launch ``recur_slices``.

    Returns:
        The call's outputs, [N, D * H], and each stream's state after its last step.
    """
    states, plan = SlicedStates.of(call, layout, unwritten=True), layout.plan
    given = states.arguments() | {
        "S": plan.chunks,
        "TILES": plan.tiles,
        "WARPS": plan.warps,
        "VECTORS": plan.vectors(plan.k, states.h.itemsize),
        "VECTORS_2": plan.vectors(plan.k_2, states.h.itemsize),
        "PRECISION": call.precision,
    }
    for first, last in call.launches():
        recur_slices[states.grid](**given, first=first, last=last)
    return states.read()
