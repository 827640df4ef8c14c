"""Products of sparse matrices with rows of inputs, ``y_MO = x_MI W' + bias``.

Letters: M rows, I inputs, O outputs, N rows of a block.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_many(
    x,  # [I, M]
    y,  # [M, O]
    values,  # [blocks, N]
    columns,  # [blocks]
    pointers,  # [row groups + 1]
    bias,  # [O]
    M,
    UNITS,  # of a gate
    per_gate,  # row groups of a gate
    gates,
    y_row,  # strides of y
    y_output,
    N: tl.constexpr,
    KT: tl.constexpr,
    MT: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A row group times MT rows of x, which lies transposed so that a block's input is contiguous."""
    group = tl.program_id(0)
    begin = tl.load(pointers + group)
    end = tl.load(pointers + group + 1)
    row = tl.program_id(1) * MT + tl.arange(0, MT)
    lane = tl.arange(0, N)
    sums = tl.zeros((N, MT), tl.float32)
    for start in range(begin, end, KT):
        block = start + tl.arange(0, KT)
        used = block < end
        column = tl.load(columns + block, mask=used, other=0).to(tl.int64)
        value = tl.load(values + block[:, None].to(tl.int64) * N + lane[None, :], mask=used[:, None], other=0.0)
        inputs = tl.load(x + column[:, None] * M + row[None, :], mask=used[:, None] & (row < M)[None, :], other=0.0)
        if WIDEN:
            value, inputs = value.to(tl.float32), inputs.to(tl.float32)
        else:
            value = value.to(inputs.dtype)
        sums = tl.dot(tl.trans(value), inputs, sums, input_precision=PRECISION)
    unit = group % per_gate * N + lane
    output = group // per_gate * UNITS + unit
    if BIASED:
        sums += tl.load(bias + output, mask=unit < UNITS, other=0.0)[:, None]
    inside = (unit < UNITS)[:, None] & (row < M)[None, :]
    where = row[None, :].to(tl.int64) * y_row + output[:, None].to(tl.int64) * y_output
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=inside)


@triton.jit
def multiply_few(
    x,  # [M, I]
    y,  # [M, O]
    values,  # [blocks, N]
    columns,  # [blocks]
    pointers,  # [row groups + 1]
    bias,  # [O]
    inputs,
    UNITS,
    per_gate,
    gates,
    y_row,  # strides of y
    y_output,
    N: tl.constexpr,
    GROUPS: tl.constexpr,
    KT: tl.constexpr,
    BIASED: tl.constexpr,
):
    """GROUPS row groups times one row of x."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    real = group < per_gate * gates
    m = tl.program_id(1).to(tl.int64)
    begin = tl.load(pointers + group, mask=real, other=0)
    count = tl.load(pointers + group + 1, mask=real, other=0) - begin
    lane = tl.arange(0, N)
    k = tl.arange(0, KT)
    sums = tl.zeros((GROUPS, KT, N), tl.float32)
    for start in range(0, tl.max(count, axis=0), KT):
        used = (start + k)[None, :] < count[:, None]
        block = begin[:, None] + start + k[None, :]
        column = tl.load(columns + block, mask=used, other=0).to(tl.int32)
        h = tl.load(x + m * inputs + column, mask=used, other=0.0).to(tl.float32)
        where = block.to(tl.int64)[:, :, None] * N + lane[None, None, :]
        value = tl.load(values + where, mask=used[:, :, None], other=0.0).to(tl.float32)
        sums += value * h[:, :, None]
    out = tl.sum(sums, axis=1)
    unit = (group % per_gate * N)[:, None] + lane[None, :]
    output = (group // per_gate * UNITS)[:, None] + unit
    inside = real[:, None] & (unit < UNITS)
    if BIASED:
        out += tl.load(bias + output, mask=inside, other=0.0)
    tl.store(y + m * y_row + output.to(tl.int64) * y_output, out.to(y.dtype.element_ty), mask=inside)
