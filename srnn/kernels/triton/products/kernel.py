"""Products of sparse matrices with rows of inputs, ``y_MO = x_MI W' + bias``.

Letters: M rows, I inputs, O outputs, N rows of a block.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from srnn.kernels.triton.arrange import power
from srnn.kernels.triton.chip import interpreted
from srnn.kernels.triton.products.plan import few_of, tile_of
from srnn.kernels.triton.tuning import Tuning
from srnn.sparse import SparseMatrix


@triton.jit
def transpose(
    x,  # [M, I]
    out,  # [I + 1, S]: S at least M; the last row, which places without a block multiply, is zero
    M,
    I,
    S,
    MT: tl.constexpr,
    IT: tl.constexpr,
):
    """``out_IM = x_MI'``, and zeros beyond; six times as fast as torch's copy on an H100 (4096 x 2560: 13 us, 83)."""
    m = tl.program_id(0) * MT + tl.arange(0, MT)
    i = tl.program_id(1) * IT + tl.arange(0, IT)
    where = m[:, None].to(tl.int64) * I + i[None, :]
    tile = tl.load(x + where, mask=(m < M)[:, None] & (i < I)[None, :], other=0.0)
    where = i[:, None].to(tl.int64) * S + m[None, :]
    tl.store(out + where, tl.trans(tile), mask=(i <= I)[:, None] & (m < S)[None, :])


@triton.jit
def multiply_many(
    x,  # [I + 1, S], as transpose leaves it; S is a multiple of MT
    y,  # [M, O]
    values,  # [blocks, N]
    columns,  # [blocks], of a type that can hold I
    pointers,  # [row groups + 1]
    bias,  # [O]
    M,
    I,
    S,
    UNITS,  # of a gate
    per_gate,  # row groups of a gate
    y_row,  # strides of y
    y_output,
    N: tl.constexpr,
    KT: tl.constexpr,
    MT: tl.constexpr,
    STAGES: tl.constexpr,
    ACROSS: tl.constexpr,
    BIASED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """A row group times MT rows of x, which lies transposed so that a block's input is contiguous.

    ACROSS makes the rows of x the first side of products, which a Hopper GPU's warpgroup instructions want larger; they
    take it so of 16 bits only.
    """
    group = tl.program_id(0)
    begin = tl.load(pointers + group)
    end = tl.load(pointers + group + 1)
    row = tl.program_id(1) * MT + tl.arange(0, MT)
    lane = tl.arange(0, N)
    sums = tl.zeros((MT, N) if ACROSS else (N, MT), tl.float32)
    for start in tl.range(begin, end, KT, num_stages=STAGES):
        block = start + tl.arange(0, KT)
        used = block < end
        column = tl.load(columns + block, mask=used, other=I).to(tl.int64)
        value = tl.load(values + block[:, None].to(tl.int64) * N + lane[None, :], mask=used[:, None], other=0.0)
        inputs = tl.load(x + column[:, None] * S + row[None, :])
        if WIDEN:
            value, inputs = value.to(tl.float32), inputs.to(tl.float32)
        else:
            value = value.to(inputs.dtype)
        if ACROSS:
            sums = tl.dot(tl.trans(inputs), value, sums, input_precision=PRECISION)
        else:
            sums = tl.dot(tl.trans(value), inputs, sums, input_precision=PRECISION)
    if not ACROSS:
        sums = tl.trans(sums)
    unit = group % per_gate * N + lane
    output = group // per_gate * UNITS + unit
    if BIASED:
        sums += tl.load(bias + output, mask=unit < UNITS, other=0.0)[None, :]
    where = row[:, None].to(tl.int64) * y_row + output[None, :].to(tl.int64) * y_output
    tl.store(y + where, sums.to(y.dtype.element_ty), mask=(row < M)[:, None] & (unit < UNITS)[None, :])


@triton.jit
def multiply_few(
    x,  # [M / R, I, R]
    y,  # [M, O]
    values,  # [blocks, N]
    columns,  # [blocks]
    pointers,  # [row groups + 1]
    bias,  # [O]
    M,
    I,
    UNITS,  # of a gate
    per_gate,  # row groups of a gate
    gates,
    y_row,  # strides of y
    y_output,
    N: tl.constexpr,
    R: tl.constexpr,
    GROUPS: tl.constexpr,
    KT: tl.constexpr,
    BIASED: tl.constexpr,
):
    """GROUPS row groups times R rows of x, which lie side by side: one look-up finds them all. R or N is 1."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    real = group < per_gate * gates
    part = tl.program_id(1)
    x += part.to(tl.int64) * R * I
    begin = tl.load(pointers + group, mask=real, other=0)
    count = tl.load(pointers + group + 1, mask=real, other=0) - begin
    n = tl.arange(0, N)
    r = tl.arange(0, R)
    k = tl.arange(0, KT)
    sums = tl.zeros((GROUPS, KT, N * R), tl.float32)
    for start in range(0, tl.max(count, axis=0), KT):
        used = (start + k)[None, :] < count[:, None]
        block = begin[:, None] + start + k[None, :]
        column = (tl.load(columns + block, mask=used, other=0).to(tl.int32) * R)[:, :, None]
        inputs = tl.load(x + column + r[None, None, :], mask=used[:, :, None], other=0.0).to(tl.float32)
        if N == 1:
            value = tl.load(values + block.to(tl.int64), mask=used, other=0.0).to(tl.float32)[:, :, None]
        else:
            where = (block.to(tl.int64) * N)[:, :, None] + n[None, None, :]
            value = tl.load(values + where, mask=used[:, :, None], other=0.0).to(tl.float32)
        sums += value * inputs
    unit = (group % per_gate * N)[:, None] + n[None, :]
    output = (group // per_gate * UNITS)[:, None] + unit
    row = (part * R + r)[None, :]
    inside = real[:, None] & (unit < UNITS) & (row < M)
    out = tl.sum(sums, axis=1)
    if BIASED:
        out += tl.load(bias + output, mask=real[:, None] & (unit < UNITS), other=0.0)
    where = row.to(tl.int64) * y_row + output.to(tl.int64) * y_output
    tl.store(y + where, out.to(y.dtype.element_ty), mask=inside)


def multiply_with_few(matrix: SparseMatrix, bias: Tensor | None, x_MI: Tensor, y_MO: Tensor) -> None:
    """Launch ``multiply_few``: ``y_MO = x_MI W' + bias`` for a few rows."""
    rows, inputs = x_MI.shape
    together = power(rows) if matrix.height == 1 else 1
    groups, kt = few_of(matrix)
    multiply_few[(-(-matrix.groups // groups), -(-rows // together))](
        **_arguments(matrix, bias, y_MO),
        x=_transposed(x_MI, together) if together > 1 else x_MI.contiguous(),
        M=rows, I=inputs, gates=matrix.gates, R=together, GROUPS=groups, KT=kt, num_warps=4,
    )  # fmt: skip


def multiply_with_many(
    matrix: SparseMatrix, bias: Tensor | None, x_MI: Tensor, y_MO: Tensor, precision: str, tuning: Tuning
) -> None:
    """Launch ``multiply_many``: ``y_MO = x_MI W' + bias`` for many rows, on tensor cores."""
    rows, inputs = x_MI.shape
    tall, kt = tile_of(rows, x_MI.dtype, tuning)
    widen = matrix.values.dtype != x_MI.dtype
    x = _transposed(x_MI, -(-rows // tall) * tall)
    multiply_many[(matrix.groups, -(-rows // tall))](
        **_arguments(matrix, bias, y_MO),
        x=x, M=rows, I=inputs, S=x.shape[1], KT=kt, MT=tall, STAGES=4, ACROSS=x.itemsize == 2 and not widen,
        PRECISION=precision, WIDEN=widen or interpreted(), num_warps=4,
    )  # fmt: skip


def _arguments(matrix: SparseMatrix, bias: Tensor | None, y_MO: Tensor) -> dict[str, Any]:
    """Those of both kernels, by their names."""
    y_row, y_output = y_MO.stride()
    return {
        "y": y_MO,
        "values": matrix.values,
        "columns": matrix.columns,
        "pointers": matrix.row_pointers,
        "bias": y_MO if bias is None else bias,  # something to point to
        "UNITS": matrix.units,
        "per_gate": matrix.groups // matrix.gates,
        "y_row": y_row,
        "y_output": y_output,
        "N": matrix.height,
        "BIASED": bias is not None,
    }


def _transposed(x_MI: Tensor, wide: int) -> Tensor:
    """[I + 1, wide], zero beyond M and I."""
    rows, inputs = x_MI.shape
    out = x_MI.new_empty(inputs + 1, wide)
    tall = min(64, power(wide))
    grid = -(-wide // tall), -(-(inputs + 1) // 64)
    transpose[grid](x=x_MI.contiguous(), out=out, M=rows, I=inputs, S=wide, MT=tall, IT=64, num_warps=4)
    return out
