"""What the recurrent kernels share besides arithmetic and waiting: where a program's inputs and states are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def direction_of(u, u_unit, H, GATES: tl.constexpr, REVERSE: tl.constexpr, BOTH: tl.constexpr):
    """Of a program: its direction, whether that is reversed, and where ``u`` begins for it.

    With BOTH the first half of the programs has the forward direction, the second half the reversed one.
    """
    direction = 0
    reverse = REVERSE
    if BOTH:
        direction = tl.program_id(0) // (tl.num_programs(0) // 2)
        reverse = direction == 1
        u += direction * (GATES * H) * tl.cast(u_unit, tl.int64)
    return direction, reverse, u


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


@triton.jit
def units_of(units, program, UNITS: tl.constexpr, BP: tl.constexpr):
    """A program's units [1, UNITS], the streams of a slice [BP, 1], and their places in a state [H, BP].

    Units are loaded, so that the compiler sees no order in them, and lays out all that is [BP, UNITS] as memory has it:
    along BP.
    """
    unit = tl.load(units + program * UNITS + tl.arange(0, UNITS)).to(tl.int64)[None, :]
    batch = tl.arange(0, BP)[:, None]
    return unit, batch, unit * BP + batch


@triton.jit
def inputs_at(u, sizes, offsets, k, part, unit, batch, u_row, u_unit, reverse, steps, B, H, last,
              BP: tl.constexpr, GATES: tl.constexpr, EQUAL: tl.constexpr, LATER: tl.constexpr):  # fmt: skip
    """Which streams of a slice take part in the k-th step, and their inputs of each gate; LATER steps may be none."""
    row, taking_part = rows_at(sizes, offsets, k, part * BP + batch, reverse, steps, B, EQUAL)
    active = taking_part & (unit < H)
    wanted = active
    if LATER:
        wanted = active & (k < last)
    u_0, u_1, u_2, u_3 = inputs_of(u, u_row, u_unit, row, unit, wanted, H, GATES)
    return active, u_0, u_1, u_2, u_3


@triton.jit
def own_state(now, c, part, place, unit, H, SIZE, cell, CELL: tl.constexpr):
    """A program's own part of a slice's state: h as it lies in memory, and an LSTM's cell; ``cell`` for others."""
    mine = tl.load(now + place, mask=unit < H, other=0, volatile=True)
    if CELL == "lstm":
        cell = tl.load(c + part * SIZE + place, mask=unit < H, other=0.0)
    return mine, cell


@triton.jit
def after_slice(k, part, slices):
    """The step and the slice that a row of the grid does next: the next of its slices, or the first at the next."""
    k_next, part_next = k, part + tl.num_programs(1)
    if part_next >= slices:
        k_next, part_next = k + 1, tl.program_id(1)
    return k_next, part_next
