"""The recurrent loop as one launch: programs stay on the chip and hand each other h at every step.

Nothing here may be launched unless all programs of the grid run at the same time: they wait for each other. The
``first`` and ``last`` steps make a form that does not wait: one launch a step.

Letters: T steps, B streams, N rows of a block, H hidden units, G gates * H. A *slot* is a group of N units of a
program, a *chunk* some blocks of one row group.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How often a program looks for its input before it gives up: within three seconds on an H200.
PATIENCE = tl.constexpr(1 << 20)
CLIP = tl.constexpr(20.0)  # as in the contract; a kernel sees constexpr only


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _activated(a, CELL: tl.constexpr):
    """Written so that what is not a number stays so."""
    if CELL == "tanh":
        return _tanh(a)
    a = tl.where(a < 0, 0.0, a)
    if CELL == "clipped_relu":
        a = tl.where(a > CLIP, CLIP, a)
    return a


@triton.jit
def _gru(r, z, u_n, v_n, h):
    z = tl.sigmoid(z)
    return (1 - z) * _tanh(u_n + tl.sigmoid(r) * v_n) + z * h


@triton.jit
def _lstm(i, f, g, o, c):
    c = tl.sigmoid(f) * c + tl.sigmoid(i) * _tanh(g)
    return tl.sigmoid(o) * _tanh(c), c


@triton.jit
def _inputs(u, row, H, unit, mask, GATES: tl.constexpr, GATE: tl.constexpr):
    return tl.load(u + row * (GATES * H) + GATE * H + unit, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _of_chunks(parts, table, GATES: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, N: tl.constexpr):
    """[GATES, SLOTS, N], GATES 1 or 4: the sums of each slot's chunks, of which it has at most MOST; -1 fills up."""
    chunk = tl.load(table + tl.arange(0, GATES * SLOTS * MOST)).to(tl.int32)
    wanted = chunk[:, None] + tl.zeros((1, N), tl.int32)
    found = tl.gather(parts, tl.maximum(wanted, 0), 0)
    found = tl.where(wanted >= 0, found, 0.0)
    return tl.sum(tl.reshape(found, (GATES, SLOTS, MOST, N)), axis=2)


@triton.jit
def _of_chunks_of_elements(parts, table, SLOTS: tl.constexpr, MOST: tl.constexpr):
    """[SLOTS, 1] of one gate, for blocks of one row."""
    chunk = tl.load(table + tl.arange(0, SLOTS * MOST)).to(tl.int32)
    found = tl.gather(parts, tl.maximum(chunk, 0), 0)
    found = tl.where(chunk >= 0, found, 0.0)
    return tl.sum(tl.reshape(found, (SLOTS, MOST)), axis=1)[:, None]


@triton.jit
def _gates(sums, SLOTS: tl.constexpr, N: tl.constexpr):
    """The four parts of [4, SLOTS, N]."""
    last = tl.permute(tl.reshape(sums, (2, 2, SLOTS, N)), (2, 3, 0, 1))
    even, odd = tl.split(last)
    a_0, a_2 = tl.split(even)
    a_1, a_3 = tl.split(odd)
    return a_0, a_1, a_2, a_3


@triton.jit
def _chunk_sums(h, column, value, CHUNKS: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """[CHUNKS] or [CHUNKS, N]: each chunk's blocks times h. A column of -1 is padding, which multiplies nothing.

    Single elements of a chunk are neighbours; taller blocks of a chunk lie CHUNKS apart. Either way a thread, which
    loads 16 bytes at a time, adds up its own.
    """
    x = tl.gather(h, tl.maximum(column, 0).to(tl.int32), 0).to(tl.float32)
    x = tl.where(column >= 0, x, 0.0)
    if N == 1:
        return tl.sum(tl.reshape(x * value.to(tl.float32), (CHUNKS, K)), axis=1)
    else:
        return tl.sum(tl.reshape(x[:, None] * value.to(tl.float32), (K, CHUNKS, N)), axis=0)


@triton.jit
def recur_vectors(
    u,  # [rows, G]
    y,  # [rows, H], the bits of floats as integers; -1, a NaN no arithmetic makes, where nothing is written yet
    h0,  # [B, H], bits
    c,  # [B, H], fp32, of an LSTM; read and written
    values,  # [programs, TILES * CHUNKS * K, N]
    columns,  # [programs, TILES * CHUNKS * K]
    groups,  # [programs, SLOTS], -1 for none
    chunks,  # [programs, TILES, 1 or 4 gates, SLOTS, MOST], numbers within a tile
    new_bias,  # [H]
    lengths,  # [B]
    offsets,  # [T], first row of a step
    failed,  # [1], set where a program gave up
    stream_of_first,
    first,
    last,
    steps,
    B,
    H,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    MOST: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # of the tile that holds h: at least H and the number of threads
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BIASED: tl.constexpr,
    NOT_A_NUMBER: tl.constexpr,
):
    """One stream a row of programs: each multiplies its units' weights with h, which it waits for at every step.

    The data is its own flag: y starts as a bit pattern that no result has, and a program looks at the h it needs until
    none of it is there. Arithmetic that is not a number is written as another NaN, so that it does not look unwritten.
    """
    program = tl.program_id(0)
    stream = (stream_of_first + tl.program_id(1)).to(tl.int64)
    FLOAT = u.dtype.element_ty
    group = tl.load(groups + program * SLOTS + tl.arange(0, SLOTS)).to(tl.int32)
    unit = group[:, None] * N + tl.arange(0, N)[None, :]
    owned = (group[:, None] >= 0) & (unit < H)
    everyone = tl.arange(0, WIDTH)
    there = everyone < H
    length = steps
    if not EQUAL:
        length = tl.load(lengths + stream)
    end = tl.minimum(last, length)

    TILE: tl.constexpr = CHUNKS * K
    block = tl.arange(0, TILE)
    columns += program * (TILES * TILE)
    values += program.to(tl.int64) * (TILES * TILE * N)
    ALL_GATES: tl.constexpr = 1 if GATES == 1 else 4
    chunks += program * (TILES * ALL_GATES * SLOTS * MOST)
    if TILES == 1:  # stays in registers
        column = tl.load(columns + block)
        if N == 1:
            value = tl.load(values + block)
        else:
            value = tl.load(values + block[:, None] * N + tl.arange(0, N)[None, :])

    t = first
    if REVERSE:
        t = length - 1 - first
    before = t.to(tl.int64)  # row of the step before; of none at the first
    if first > 0:
        earlier = t - 1
        if REVERSE:
            earlier = t + 1
        before = earlier.to(tl.int64) * B
        if not EQUAL:
            before = tl.load(offsets + earlier).to(tl.int64)
    source = h0 + stream * H
    if first > 0:
        source = y + (before + stream) * H
    mine = tl.load(source + unit, mask=owned & (first < end), other=0).to(FLOAT, bitcast=True).to(tl.float32)
    if CELL == "lstm":
        cell = tl.load(c + stream * H + unit, mask=owned, other=0.0)
    bias = tl.zeros((SLOTS, N), tl.float32)
    if BIASED:
        bias = tl.load(new_bias + unit, mask=owned, other=0.0)

    patience = PATIENCE
    for k in range(first, end):
        t = k
        if REVERSE:
            t = length - 1 - k
        row = t.to(tl.int64) * B
        if not EQUAL:
            row = tl.load(offsets + t).to(tl.int64)
        row += stream
        u_0 = _inputs(u, row, H, unit, owned, GATES, 0)  # before waiting: nobody has to write them first
        if GATES > 1:
            u_1 = _inputs(u, row, H, unit, owned, GATES, 1)
            u_2 = _inputs(u, row, H, unit, owned, GATES, 2)
        if GATES > 3:
            u_3 = _inputs(u, row, H, unit, owned, GATES, 3)

        bits = tl.load(source + everyone, mask=there, other=0, volatile=True)
        if k > first:
            tries = 0
            missing = tl.max((bits == -1).to(tl.int32), axis=0)
            while (missing > 0) & (tries < patience):
                bits = tl.load(source + everyone, mask=there, other=0, volatile=True)
                missing = tl.max((bits == -1).to(tl.int32), axis=0)
                tries += 1
            if missing > 0:
                patience = 0  # the rest will not come either
                tl.store(failed, 1)
        h = bits.to(FLOAT, bitcast=True)

        a_0 = tl.zeros((SLOTS, N), tl.float32)
        a_1, a_2, a_3 = a_0, a_0, a_0
        for tile in range(TILES):
            if TILES > 1:
                column = tl.load(columns + tile * TILE + block)
                if N == 1:
                    value = tl.load(values + tile * TILE + block)
                else:
                    value = tl.load(values + (tile * TILE + block)[:, None] * N + tl.arange(0, N)[None, :])
            parts = _chunk_sums(h, column, value, CHUNKS, K, N)
            table = chunks + tile * (ALL_GATES * SLOTS * MOST)
            if N == 1:
                a_0 += _of_chunks_of_elements(parts, table, SLOTS, MOST)
                if GATES > 1:
                    a_1 += _of_chunks_of_elements(parts, table + SLOTS * MOST, SLOTS, MOST)
                    a_2 += _of_chunks_of_elements(parts, table + 2 * SLOTS * MOST, SLOTS, MOST)
                if GATES > 3:
                    a_3 += _of_chunks_of_elements(parts, table + 3 * SLOTS * MOST, SLOTS, MOST)
            else:
                sums = _of_chunks(parts, table, ALL_GATES, SLOTS, MOST, N)
                if GATES == 1:
                    a_0 += tl.reshape(sums, (SLOTS, N))
                else:
                    b_0, b_1, b_2, b_3 = _gates(sums, SLOTS, N)
                    a_0 += b_0
                    a_1 += b_1
                    a_2 += b_2
                    a_3 += b_3

        if CELL == "gru":
            mine = _gru(u_0 + a_0, u_1 + a_1, u_2, a_2 + bias, mine)
        elif CELL == "lstm":
            mine, cell = _lstm(u_0 + a_0, u_1 + a_1, u_2 + a_2, u_3 + a_3, cell)
        else:
            mine = _activated(u_0 + a_0, CELL)
        rounded = mine.to(FLOAT)
        out = tl.where(mine != mine, NOT_A_NUMBER, rounded.to(y.dtype.element_ty, bitcast=True)).to(y.dtype.element_ty)
        source = y + row * H
        tl.store(source + unit, out, mask=owned)
        mine = rounded.to(tl.float32)
    if CELL == "lstm":
        tl.store(c + stream * H + unit, cell, mask=owned)


@triton.jit
def _products(values, columns, pointers, row, h, batch, UNITS: tl.constexpr, KT: tl.constexpr, BP: tl.constexpr,
              PRECISION: tl.constexpr, WIDEN: tl.constexpr):  # fmt: skip
    """[UNITS, BP]: a row group's blocks times h, which is complete."""
    begin = tl.load(pointers + row)
    end = tl.load(pointers + row + 1)
    sums = tl.zeros((UNITS, BP), tl.float32)
    lane = tl.arange(0, UNITS)
    for start in range(begin, end, KT):
        block = start + tl.arange(0, KT)
        used = block < end
        column = tl.load(columns + block, mask=used, other=0).to(tl.int32)
        value = tl.load(values + block[:, None].to(tl.int64) * UNITS + lane[None, :], mask=used[:, None], other=0.0)
        x = tl.load(h + column[:, None] * BP + batch[None, :], mask=used[:, None], other=0.0)
        if WIDEN:
            value, x = value.to(tl.float32), x.to(tl.float32)
        sums = tl.dot(tl.trans(value.to(x.dtype)), x, sums, input_precision=PRECISION)
    return sums


@triton.jit
def recur_batch(
    u,  # [rows, G]
    y,  # [rows, H]
    h,  # [T + 1, H, BP], the state before and after each step
    c,  # [B, H], fp32, of an LSTM; read and written
    values,  # [blocks, N]
    columns,  # [blocks]
    pointers,  # [G / N + 1]
    new_bias,  # [H]
    sizes,  # [T], streams of a step
    offsets,  # [T], first row of a step
    flags,  # [programs], steps done
    failed,  # [1], set where a program gave up
    stream_of_first,
    first,
    last,
    steps,
    B,
    H,
    groups,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    UNITS: tl.constexpr,
    KT: tl.constexpr,
    BP: tl.constexpr,
    WAITED: tl.constexpr,  # of the tile of flags: at least the programs and the threads
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """All streams at once, N units a program. A program says when it has done a step, and waits until all others have.

    What it then reads of h is new memory at each step, so that no L1 holds an older copy of it.
    """
    program = tl.program_id(0)
    FLOAT = h.dtype.element_ty
    unit = (program * UNITS + tl.arange(0, UNITS))[:, None]
    batch = tl.arange(0, BP)
    stream = stream_of_first + batch[None, :]
    owned = (unit < H) & (stream < B)
    everyone = tl.arange(0, WAITED)
    SIZE = tl.cast(H, tl.int64) * BP  # H is a plain number where it is 1
    mine = tl.load(h + first * SIZE + unit * BP + batch[None, :], mask=owned, other=0.0).to(tl.float32)
    if CELL == "lstm":
        cell = tl.load(c + stream * H + unit, mask=owned, other=0.0)
    bias = tl.zeros((UNITS, BP), tl.float32)
    if BIASED:
        bias = tl.load(new_bias + unit + stream * 0, mask=owned, other=0.0)
    patience = PATIENCE
    for k in range(first, last):
        t = k
        if REVERSE:
            t = steps - 1 - k
        size = B
        row = t.to(tl.int64) * B
        if not EQUAL:
            size = tl.load(sizes + t)
            row = tl.load(offsets + t).to(tl.int64)
        active = owned & (stream < size)
        row = row + stream
        u_0 = _inputs(u, row, H, unit, active, GATES, 0)
        if GATES > 1:
            u_1 = _inputs(u, row, H, unit, active, GATES, 1)
            u_2 = _inputs(u, row, H, unit, active, GATES, 2)
        if GATES > 3:
            u_3 = _inputs(u, row, H, unit, active, GATES, 3)
        if k > first:
            done = tl.load(flags + everyone, mask=everyone < groups, other=1 << 30, volatile=True)
            slowest = tl.min(done, axis=0)
            tries = 0
            while (slowest < k) & (tries < patience):
                done = tl.load(flags + everyone, mask=everyone < groups, other=1 << 30, volatile=True)
                slowest = tl.min(done, axis=0)
                tries += 1
            if slowest < k:
                patience = 0
        now = h + k * SIZE
        a_0 = _products(values, columns, pointers, program, now, batch, UNITS, KT, BP, PRECISION, WIDEN)
        if GATES > 1:
            second, third = groups + program, 2 * groups + program
            a_1 = _products(values, columns, pointers, second, now, batch, UNITS, KT, BP, PRECISION, WIDEN)
            a_2 = _products(values, columns, pointers, third, now, batch, UNITS, KT, BP, PRECISION, WIDEN)
        if GATES > 3:
            fourth = 3 * groups + program
            a_3 = _products(values, columns, pointers, fourth, now, batch, UNITS, KT, BP, PRECISION, WIDEN)
        if patience == 0:
            tl.store(failed, 1)
            a_0 += float("nan")  # what stands in h is not what was waited for, and must not look like a result
        if CELL == "gru":
            new = _gru(u_0 + a_0, u_1 + a_1, u_2, a_2 + bias, mine)
        elif CELL == "lstm":
            new, after = _lstm(u_0 + a_0, u_1 + a_1, u_2 + a_2, u_3 + a_3, cell)
            cell = tl.where(active, after, cell)
        else:
            new = _activated(u_0 + a_0, CELL)
        rounded = new.to(FLOAT)
        mine = tl.where(active, rounded.to(tl.float32), mine)
        tl.store(h + (k + 1) * SIZE + unit * BP + batch[None, :], mine.to(FLOAT), mask=unit < H)
        tl.debug_barrier()
        tl.atomic_xchg(flags + program, k + 1, sem="release", scope="gpu")
        tl.store(y + row * H + unit, rounded, mask=active)
    if CELL == "lstm":
        tl.store(c + stream * H + unit, cell, mask=owned)
