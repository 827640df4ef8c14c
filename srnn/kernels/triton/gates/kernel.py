"""The recurrent loop as one launch for 64 streams: one product a gate, on a Hopper GPU's warpgroup instructions.

As in ``slices``, nothing here may be launched unless all programs of the grid run at the same time.

Letters: T steps, B streams, N rows of a block, H hidden units, G gates * H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srnn.kernels.contract import State
from srnn.kernels.triton.call import RecurrentCall
from srnn.kernels.triton.gate_math import activated, gru_state, lstm_state
from srnn.kernels.triton.gates.plan import GatePlan
from srnn.kernels.triton.prologue import after_slice, direction_of, inputs_at, own_state, state_at, units_of
from srnn.kernels.triton.slices.layout import SliceLayout
from srnn.kernels.triton.slices.states import SlicedStates
from srnn.kernels.triton.wait import all_in, count_in


@triton.jit
def _blocks_of(values, columns, program, PRODUCTS: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """Values [K, N] and columns [K] of each product of a program."""
    k = tl.arange(0, K)
    blocks = ()
    for product in tl.static_range(PRODUCTS):
        block = (program * PRODUCTS + product) * K + k
        column = tl.load(columns + block).to(tl.int32)
        value = tl.load(values + block.to(tl.int64)[:, None] * N + tl.arange(0, N)[None, :])
        blocks = blocks + ((value, column),)  # type: ignore[assignment]
    return blocks


@triton.jit
def _rows_of(now, column, BP: tl.constexpr):
    """[K, BP]: the rows ``column`` of now [H, BP].

    Loaded as they are, and not as bits: what comes straight from memory the compiler hands to a product in shared
    memory; anything else goes to registers in many small pieces, with two barriers each.
    """
    batch = tl.arange(0, BP)[None, :]
    used = (column >= 0)[:, None] & (batch < BP)
    return tl.load(now + (column * BP)[:, None] + batch, mask=used, other=0.0, volatile=True)


@triton.jit
def _sums(blocks, blocks_2, x, x_2, starts, zero, now, PRODUCTS: tl.constexpr, K_2: tl.constexpr, BP: tl.constexpr,
          AHEAD: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """The sums of each gate of a group, [BP, N], in one product of all its blocks; of a second for those beyond K.

    The sums of the two products start from zeros that the compiler does not know: it would make one go on with the
    other's, take that for attention, and lay them out so that half of the warps repeat what the others do.
    """
    sums = ()
    for product in tl.static_range(PRODUCTS):
        value, _ = blocks[product]
        x_T = tl.trans(x)
        if K_2:
            value_2, _ = blocks_2[product]
            x_2T = tl.trans(x_2)
        if AHEAD and product + 1 < PRODUCTS:
            _, column = blocks[product + 1]
            x = _rows_of(now, column, BP)
            if K_2:
                _, column = blocks_2[product + 1]
                x_2 = _rows_of(now, column, BP)
        if WIDEN:
            value, x_T = value.to(tl.float32), x_T.to(tl.float32)
        a = tl.dot(x_T, value, starts[product])
        if not AHEAD and product + 1 < PRODUCTS:
            _, column = blocks[product + 1]
            x = _rows_of(now, column, BP)
        if K_2:
            if WIDEN:
                value_2, x_2T = value_2.to(tl.float32), x_2T.to(tl.float32)
            a += tl.dot(x_2T, value_2, zero)
            if not AHEAD and product + 1 < PRODUCTS:
                _, column = blocks_2[product + 1]
                x_2 = _rows_of(now, column, BP)
        sums = sums + (a,)  # type: ignore[assignment]
    return sums


@triton.jit
def _of_pair(sums, gate: tl.constexpr):
    """[BP, 2 N]: the sums of a gate of two groups, whose units alternate."""
    both = tl.join(sums[2 * gate], sums[2 * gate + 1])
    return tl.reshape(both, (both.shape[0], 2 * both.shape[1]))


@triton.jit
def recur_gates(
    u,  # [rows, D, G], D directions
    h,  # [D, slices, T + 1, H, BP], the states in the order of time
    c,  # [D, slices, H, BP], fp32, of an LSTM; read and written
    values,  # [D * programs, GATES, EACH, K, N]
    columns,  # [D * programs, GATES, EACH, K]; -1 for none
    values_2,  # [D * programs, GATES, EACH, K_2, N]
    columns_2,  # [D * programs, GATES, EACH, K_2]
    units,  # [D * programs, N, EACH], that a program has
    new_bias,  # [D, H]
    sizes,  # [T], streams of a step
    offsets,  # [T], first row of a step
    counters,  # [D, slices], zeros: how often programs have written a state
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
    EACH: tl.constexpr,  # groups of units of a program, 1 or 2
    K: tl.constexpr,
    K_2: tl.constexpr,
    BP: tl.constexpr,
    ONE_SLICE: tl.constexpr,  # for each program, which then keeps its state
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BOTH: tl.constexpr,  # directions, of which the second is reversed
    BIASED: tl.constexpr,
    AHEAD: tl.constexpr,
    WIDEN: tl.constexpr,
    WAITS: tl.constexpr,
):
    """BP streams at a time, one or two groups of N units a program, its weights in shared memory.

    All blocks of a gate of a group go into one product, transposed, because its side of streams may be no smaller than
    64. A program waits until all have written a state. Slices of streams are dealt out to the rows of the grid; a row
    that has several goes through all of them at each step, so that each is computed while others wait.
    """
    UNITS: tl.constexpr = EACH * N
    PRODUCTS: tl.constexpr = EACH * GATES
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    FLOAT = u.dtype.element_ty
    SIZE = tl.cast(H, tl.int64) * BP  # H is a plain number where it is 1
    direction, reverse, u = direction_of(u, u_unit, H, GATES, REVERSE, BOTH)
    if BOTH:
        programs = programs // 2
        h += direction * slices * (steps + 1) * SIZE
        c += direction * slices * SIZE
        new_bias += direction * H
        counters += direction * slices
    unit, batch, place = units_of(units, program, UNITS, BP)
    blocks = _blocks_of(values, columns, program, PRODUCTS, K, N)
    blocks_2 = ()
    if K_2:
        blocks_2 = _blocks_of(values_2, columns_2, program, PRODUCTS, K_2, N)
    zero = tl.where(place < 0, 1.0, 0.0)
    nothing = zero
    if EACH == 2:
        nothing = tl.where(tl.load(units + program * UNITS + tl.arange(0, N))[None, :] + batch < 0, 1.0, 0.0)
    bias = zero
    if BIASED:
        bias += tl.load(new_bias + unit + batch * 0, mask=unit < H, other=0.0)
    k = first
    part = tl.program_id(1)
    now = state_at(h, part, k, reverse, steps, SIZE)
    active, u_0, u_1, u_2, u_3 = inputs_at(
        u, sizes, offsets, k, part, unit, batch, u_row, u_unit, reverse, steps, B, H, last, BP, GATES, EQUAL, False
    )
    mine, cell = own_state(now, c, part, place, unit, H, SIZE, bias, CELL)
    lost = 0
    while k < last:
        k_next, part_next = after_slice(k, part, slices)
        # Into the layout of sums before the wait, so that all that is left of it then is to add.
        in_0, in_1 = zero + u_0.to(tl.float32), zero + u_1.to(tl.float32)
        in_2, in_3 = zero + u_2.to(tl.float32), zero + u_3.to(tl.float32)
        third = in_2
        if CELL == "gru":
            third = bias  # of the recurrent part, which the reset gate is for
        starts = (in_0, in_1, third, in_3)
        if EACH == 2:
            starts = (nothing,) * PRODUCTS
        if WAITS:
            lost |= all_in(counters + part, (k - first) * programs, failed)
        _, column = blocks[0]
        x = _rows_of(now, column, BP)
        x_2 = x
        if K_2:
            _, column = blocks_2[0]  # type: ignore[misc]
            x_2 = _rows_of(now, column, BP)
        # Inputs of what comes next, which so have a step's time to arrive.
        active_next, u_0, u_1, u_2, u_3 = inputs_at(
            u, sizes, offsets, k_next, part_next, unit, batch, u_row, u_unit, reverse, steps, B, H, last,
            BP, GATES, EQUAL, True,
        )  # fmt: skip
        sums = _sums(blocks, blocks_2, x, x_2, starts, nothing, now, PRODUCTS, K_2, BP, AHEAD, WIDEN)
        if EACH == 2:
            a_0 = in_0 + _of_pair(sums, 0)
            if GATES > 1:
                a_1, a_2 = in_1 + _of_pair(sums, 1), third + _of_pair(sums, 2)
            if GATES > 3:
                a_3 = in_3 + _of_pair(sums, 3)
        else:
            a_0 = sums[0]
            if GATES > 1:
                a_1, a_2 = sums[1], sums[2]
            if GATES > 3:
                a_3 = sums[3]

        a_0 += tl.where(lost != 0, float("nan"), 0.0)  # which every cell hands on to all of its state
        old = mine
        if CELL == "gru":
            new = gru_state(a_0, a_1, in_2, a_2, old.to(tl.float32))
        elif CELL == "lstm":
            new, after = lstm_state(a_0, a_1, a_2, a_3, cell)
            cell = tl.where(active, after, cell)
            if not ONE_SLICE or k + 1 == last:
                tl.store(c + part * SIZE + place, cell, mask=unit < H)
        else:
            new = activated(a_0, CELL)
        mine = new.to(FLOAT)
        if not EQUAL:
            mine = tl.where(active, mine, old)
        tl.store(state_at(h, part, k + 1, reverse, steps, SIZE) + place, mine, mask=unit < H)
        if WAITS:
            count_in(counters + part, lost)

        k, part, active = k_next, part_next, active_next
        now = state_at(h, part, tl.minimum(k, last), reverse, steps, SIZE)  # after the last step something to point to
        if not ONE_SLICE:
            mine, cell = own_state(now, c, part, place, unit, H, SIZE, cell, CELL)


def run_gates(call: RecurrentCall, layout: SliceLayout, plan: GatePlan) -> tuple[Tensor, State]:
    """Launch ``recur_gates``; the plan is the layout's.

    Returns:
        The call's outputs, [N, D * H], and each stream's state after its last step.
    """
    # Programs count themselves in, so nothing has to mark what is not written yet.
    states = SlicedStates.of(call, layout, unwritten=False)
    h = states.h.view(call.u_NG.dtype)
    given = states.arguments() | {"h": h, "EACH": plan.each, "AHEAD": plan.ahead}
    for first, last in call.launches():
        counters = torch.zeros(call.directions, states.slices, dtype=torch.int32, device=h.device)
        recur_gates[states.grid](**given, counters=counters, first=first, last=last)
    return states.read()
