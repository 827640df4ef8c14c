"""The recurrent loop as one launch: programs stay on the chip and hand each other h at every step, stream by stream.

Nothing here may be launched unless all programs of the grid run at the same time: they wait for each other. The
``first`` and ``last`` steps make a form that does not wait: one launch a step.

Letters: T steps, B streams, N rows of a block, H hidden units, G gates * H. A *slot* is a group of N units of a
program, a *chunk* some blocks of one row group.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srnn.kernels.contract import State
from srnn.kernels.triton.call import RecurrentCall
from srnn.kernels.triton.gate_math import activated, bits_of, gru_state, lstm_state, quarters
from srnn.kernels.triton.prologue import direction_of, inputs_of
from srnn.kernels.triton.vectors.layout import VectorLayout, padded
from srnn.kernels.triton.wait import written


@triton.jit
def _of_chunks(parts, table, GATES: tl.constexpr, SLOTS: tl.constexpr, MOST: tl.constexpr, N: tl.constexpr):
    """[GATES, SLOTS, N], GATES 1 or 4: the sums of each slot's chunks, of which it has at most MOST; -1 fills up."""
    chunk = tl.load(table + tl.arange(0, GATES * SLOTS * MOST)).to(tl.int32)
    if N == 1:
        found = tl.gather(parts, tl.maximum(chunk, 0), 0)
        found = tl.where(chunk >= 0, found, 0.0)
        return tl.sum(tl.reshape(found, (GATES, SLOTS, MOST)), axis=2)[:, :, None]
    else:
        wanted = chunk[:, None] + tl.zeros((1, N), tl.int32)
        found = tl.gather(parts, tl.maximum(wanted, 0), 0)
        found = tl.where(wanted >= 0, found, 0.0)
        return tl.sum(tl.reshape(found, (GATES, SLOTS, MOST, N)), axis=2)


@triton.jit
def _chunk_sums(h, column, value, CHUNKS: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """[CHUNKS] or [CHUNKS, N]: each chunk's blocks times h. Padding has the column of a zero.

    Single elements of a chunk are neighbours; taller blocks of a chunk lie CHUNKS apart. Either way a thread, which
    loads 16 bytes at a time, adds up its own.
    """
    x = tl.gather(h, column.to(tl.int32), 0).to(tl.float32)
    if N == 1:
        return tl.sum(tl.reshape(x * value.to(tl.float32), (CHUNKS, K)), axis=1)
    else:
        return tl.sum(tl.reshape(x[:, None] * value.to(tl.float32), (K, CHUNKS, N)), axis=0)


@triton.jit
def recur_vectors(
    u,  # [rows, D, G], D directions
    h,  # [B + rows, D, STRIDE], bits of floats: the initial state, then the outputs, all ones where not written yet
    c,  # [D, B, H], fp32, of an LSTM; read and written
    values,  # [D * programs, TILES * CHUNKS * K, N]
    columns,  # [D * programs, TILES * CHUNKS * K]
    groups,  # [D * programs, SLOTS], -1 for none
    groups_in_h,  # [D * programs, SLOTS], where h, c and new_bias have them
    chunks,  # [D * programs, TILES, 1 or 4 gates, SLOTS, MOST], numbers within a tile
    new_bias,  # [D, H]
    lengths,  # [B]
    offsets,  # [T], first row of a step
    failed,  # [1], set where a program gave up
    stream_of_first,
    first,
    last,
    steps,
    B,
    H,
    u_row,  # strides of u, of which one is 1
    u_unit,
    STRIDE,  # a multiple of 16
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    MOST: tl.constexpr,
    TILES: tl.constexpr,
    CHUNKS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # of the tile that holds h: over STRIDE, and a vector of 16 bytes a thread
    VECTORS: tl.constexpr,  # of that tile, a thread
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BOTH: tl.constexpr,  # directions, of which the second is reversed
    BIASED: tl.constexpr,
    ALONE: tl.constexpr,  # one program a stream, which keeps h to itself
    WAITS: tl.constexpr,
):
    """One stream a row of programs: each multiplies its units' weights with h, which it waits for at every step."""
    program = tl.program_id(0)
    ROW = 2 * STRIDE if BOTH else STRIDE  # of h
    direction, reverse, u = direction_of(u, u_unit, H, GATES, REVERSE, BOTH)
    if BOTH:
        h += direction * STRIDE
        c += direction * B * H
        new_bias += direction * H
    stream = (stream_of_first + tl.program_id(1)).to(tl.int64)
    FLOAT = u.dtype.element_ty
    BITS = h.dtype.element_ty
    group = tl.load(groups + program * SLOTS + tl.arange(0, SLOTS)).to(tl.int32)
    unit = group[:, None].to(tl.int64) * N + tl.arange(0, N)[None, :]
    owned = (group[:, None] >= 0) & (unit < H)
    place = tl.load(groups_in_h + program * SLOTS + tl.arange(0, SLOTS)).to(tl.int64)[:, None] * N
    place += tl.arange(0, N)[None, :]
    everyone = tl.arange(0, WIDTH)
    PER_VECTOR: tl.constexpr = 128 // BITS.primitive_bitwidth
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

    source = h + stream * ROW
    if first > 0:
        earlier = first - 1
        if reverse:
            earlier = length - first
        before = earlier.to(tl.int64) * B
        if not EQUAL:
            before = tl.load(offsets + earlier, mask=first < end, other=0).to(tl.int64)
        source = h + (B + before + stream) * ROW
    mine = tl.load(source + place, mask=owned & (first < end), other=0).to(FLOAT, bitcast=True).to(tl.float32)
    if CELL == "lstm":
        cell = tl.load(c + stream * H + place, mask=owned, other=0.0)
    bias = tl.zeros((SLOTS, N), tl.float32)
    if BIASED:
        bias = tl.load(new_bias + place, mask=owned, other=0.0)

    for k in range(first, end):
        t = k
        if reverse:
            t = length - 1 - k
        row = t.to(tl.int64) * B
        if not EQUAL:
            row = tl.load(offsets + t).to(tl.int64)
        row += stream
        # Before waiting: nobody has to write them first.
        u_0, u_1, u_2, u_3 = inputs_of(u, u_row, u_unit, row, unit, owned, H, GATES)

        if ALONE:
            whole = tl.reshape(mine.to(FLOAT), (SLOTS * N,))
        else:
            bits = tl.load(source + everyone, mask=everyone < STRIDE, other=0, volatile=True)
            if WAITS:
                wait = (k > first).to(tl.int32)
                bits = written(bits, everyone & -PER_VECTOR, source, failed, wait, VECTORS)
            whole = bits.to(FLOAT, bitcast=True)

        a_0 = tl.zeros((SLOTS, N), tl.float32)
        a_1, a_2, a_3 = a_0, a_0, a_0
        for tile in range(TILES):
            if TILES > 1:
                column = tl.load(columns + tile * TILE + block)
                if N == 1:
                    value = tl.load(values + tile * TILE + block)
                else:
                    value = tl.load(values + (tile * TILE + block)[:, None] * N + tl.arange(0, N)[None, :])
            parts = _chunk_sums(whole, column, value, CHUNKS, K, N)
            table = chunks + tile * (ALL_GATES * SLOTS * MOST)
            sums = _of_chunks(parts, table, ALL_GATES, SLOTS, MOST, N)
            if GATES == 1:
                a_0 += tl.reshape(sums, (SLOTS, N))
            else:
                b_0, b_1, b_2, b_3 = quarters(tl.permute(tl.reshape(sums, (2, 2, SLOTS, N)), (2, 3, 0, 1)))
                a_0 += b_0
                a_1 += b_1
                a_2 += b_2
                a_3 += b_3

        a_0 += u_0.to(tl.float32)
        if GATES > 1:
            a_1 += u_1.to(tl.float32)
        if CELL == "gru":
            mine = gru_state(a_0, a_1, u_2.to(tl.float32), a_2 + bias, mine)
        elif CELL == "lstm":
            mine, cell = lstm_state(a_0, a_1, a_2 + u_2.to(tl.float32), a_3 + u_3.to(tl.float32), cell)
        else:
            mine = activated(a_0, CELL)
        rounded = mine.to(FLOAT)
        source = h + (B + row) * ROW
        tl.store(source + place, bits_of(rounded, BITS), mask=owned)
        mine = rounded.to(tl.float32)
    if CELL == "lstm":
        tl.store(c + stream * H + place, cell, mask=owned)


def run_vectors(call: RecurrentCall, layout: VectorLayout) -> tuple[Tensor, State]:
    """Launch ``recur_vectors``, as often as streams that all run at once take.

    Returns:
        The call's outputs, [N, D * H], and each stream's state after its last step.
    """
    plan, streams, state = layout.plan, call.streams, call.state
    programs = call.directions * plan.programs
    h = _states(call, layout)
    c_DBH = _in_order(_cells(call), layout.units if len(state) > 1 else None)
    given = _arguments(call, layout, h, c_DBH)
    at_once = max(1, call.chip.processors // programs)
    for stream in range(0, streams, at_once):
        for first, last in call.launches():
            grid = programs, min(at_once, streams - stream)
            recur_vectors[grid](**given, stream_of_first=stream, first=first, last=last)
    y = h[streams:, :, : call.hidden].transpose(0, 1)
    y = _in_order(y, layout.places).transpose(0, 1).view(call.u_NG.dtype)
    end = torch.stack([call.rows.ends(y[:, d], call.reverse(d)) for d in range(call.directions)])  # a copy
    y_NH = y.reshape(call.u_NG.shape[0], call.directions * call.hidden)
    if len(state) == 1:
        return y_NH, (end,)
    return y_NH, (end, _in_order(c_DBH, layout.places).to(state[1].dtype))


def _states(call: RecurrentCall, layout: VectorLayout) -> Tensor:
    """Memory for h, [B + rows, D, STRIDE]: the given state, then outputs that are marked as not written yet."""
    streams, hidden, stride = call.streams, call.hidden, padded(call.hidden)
    size = streams + call.u_NG.shape[0], call.directions, stride
    h = torch.empty(*size, dtype=call.bits, device=call.u_NG.device)
    if call.rows.steps > 1:
        h[streams:].fill_(-1)
    h[:streams, :, :hidden] = _in_order(call.state[0].view(call.bits), layout.units).transpose(0, 1)
    if stride > hidden:
        h[:, :, hidden:] = 0
    return h


def _cells(call: RecurrentCall) -> Tensor:
    """A copy of an LSTM's c in fp32, which the kernel updates; for others, something to point to."""
    if len(call.state) == 1:
        return call.u_NG
    return call.state[1].to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _arguments(call: RecurrentCall, layout: VectorLayout, h: Tensor, c_DBH: Tensor) -> dict[str, Any]:
    plan, stride, per_vector = layout.plan, h.shape[2], 16 // h.itemsize
    a_vector_each = 32 * plan.warps * per_vector
    width = max(1 << stride.bit_length(), a_vector_each)  # over stride
    new_bias = c_DBH if call.new_bias is None else _in_order(call.new_bias[:, None], layout.units)
    return call.arguments() | {
        "h": h,
        "c": c_DBH,
        "values": layout.values,
        "columns": layout.columns,
        "groups": layout.groups,
        "groups_in_h": layout.groups_in_h,
        "chunks": layout.chunks,
        "new_bias": new_bias,
        "lengths": call.rows.lengths,
        "STRIDE": stride,
        "SLOTS": plan.slots,
        "MOST": plan.most,
        "TILES": plan.tiles,
        "CHUNKS": plan.chunks,
        "K": plan.chunk,
        "WIDTH": width,
        "VECTORS": width // a_vector_each,
        "ALONE": plan.programs == 1,
        "num_warps": plan.warps,
    }


def _in_order(part_DXH: Tensor, index_DH: Tensor | None) -> Tensor:
    """Each direction's units as ``index`` wants them; as they are without."""
    if index_DH is None:
        return part_DXH
    return part_DXH.gather(2, index_DH[:, None].expand(-1, part_DXH.shape[1], -1))
