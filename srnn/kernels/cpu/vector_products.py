"""Products of row groups as they are stored, blocks N x 1 and single elements, as machine code.

For the row groups ``begin`` to ``end``, with x [columns, streams],

    out[group - begin, b, lane] = scale[group] * sum over blocks p of values[p, lane] * x[columns[p], b]

The loops are built as LLVM code, because numba's own loops leave the sums in memory, which is 2 to 3 times slower.
Blocks N x 1 are vectors over their N rows; single elements are vectors over the streams, or, for one stream, over eight
neighbours of a row. Several sums run side by side, so that additions do not wait for each other. Values are widened to
fp32 as they are loaded.

7680 x 2560 at 90 %, one stream, one thread of an AMD EPYC (AVX2), in ms: 0.71 for single elements in fp32, 0.16, 0.13
and 0.15 for 16 x 1 in fp32, fp16 and int8; torch's dense product takes 4.7, its dynamic int8 one 1.2.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from srnn.kernels.cpu.compiled import processor_features
from srnn.kernels.cpu.shapes import COLUMNS_AT, ROW_POINTERS_AT, SCALES_AT, VALUES_AT
from srnn.kernels.cpu.vector_code import F32, I32, I64, STORED, VectorCode

# Blocks whose sums run side by side, for one stream and for a tile of streams.
UNROLLED = {
    (1, 1): 2,
    (4, 1): 8,
    (8, 1): 8,
    (16, 1): 4,
    (32, 1): 2,
    (1, 8): 8,
    (4, 4): 2,
    (8, 4): 2,
    (16, 4): 1,
    (32, 2): 1,
}
# With AVX-512, whose 32 registers hold sixteen numbers each: 0.80 and 0.74 times the time for GRU 1024 at 90 % with 16
# streams.
UNROLLED_WIDE = {(16, 4): 2, (32, 2): 2}
NEIGHBOURS = 8  # entries of a row that one stream multiplies at a time


class RowProduct(VectorCode):
    """Builds the code of one product."""

    def __init__(self, builder: Any, lanes: int, kind: str, wide: bool, tile: int, arguments: list[Any]) -> None:
        super().__init__(builder, kind, tile, arguments)
        unrolled = UNROLLED | (UNROLLED_WIDE if processor_features().get("avx512f") else {})
        self.lanes, self.unrolled = lanes, unrolled[lanes, tile]
        self.values = self.pointer(self.number(VALUES_AT), STORED[kind])
        self.columns = self.pointer(self.number(COLUMNS_AT), ir.IntType(32 if wide else 16))
        self.row_pointers = self.pointer(self.number(ROW_POINTERS_AT), I32)
        self.scales = self.pointer(self.number(SCALES_AT), F32)
        self.gathers = lanes == 1 and tile == 1
        self.width = NEIGHBOURS if self.gathers else tile if lanes == 1 else lanes
        self.vector = ir.VectorType(F32, self.width)
        sums = 1 if lanes == 1 else tile
        slots = [[cgutils.alloca_once(builder, self.vector) for _ in range(sums)] for _ in range(self.unrolled)]
        self.sums = slots
        self.rest = cgutils.alloca_once(builder, F32) if self.gathers else None

    def emit(self) -> None:
        """Row groups, one after the other."""
        b = self.builder
        with cgutils.for_range_slice(b, self.a["begin"], self.a["end"], I64(1), I64) as (group, _):
            first = self.index(self.row_pointers, group)
            last = self.index(self.row_pointers, b.add(group, I64(1)))
            with cgutils.for_range_slice(b, I64(0), self.a["streams"], I64(self.tile), I64) as (stream, _):
                self._clear()
                self._blocks(first, last, stream)
                self._store(group, stream)

    def _clear(self) -> None:
        for slot in (s for row in self.sums for s in row):
            self.builder.store(ir.Constant(self.vector, [0.0] * self.width), slot)
        if self.rest is not None:
            self.builder.store(F32(0.0), self.rest)

    def _blocks(self, first: Any, last: Any, stream: Any) -> None:
        """Most blocks in strides with all sums, the rest one by one."""
        b = self.builder
        stride = self.unrolled * (NEIGHBOURS if self.gathers else 1)
        count = b.sub(last, first)
        middle = b.add(first, b.sub(count, b.urem(count, I64(stride))))
        with cgutils.for_range_slice(b, first, middle, I64(stride), I64) as (p, _):
            for i, row in enumerate(self.sums):
                if self.gathers:
                    self._neighbours(b.add(p, I64(i * NEIGHBOURS)), row[0])
                else:
                    self._block(b.add(p, I64(i)), stream, row)
        with cgutils.for_range_slice(b, middle, last, I64(1), I64) as (p, _):
            if self.gathers:
                value, x = self._value(p), b.load(self._x(p, stream))
                b.store(self.add(value, x, b.load(self.rest)), self.rest)
            else:
                self._block(p, stream, self.sums[0])

    def _block(self, p: Any, stream: Any, sums: list[Any]) -> None:
        b, x = self.builder, self._x(p, stream)
        if self.lanes == 1:
            many = self.load(x, self.vector)
            b.store(self.add(self._splat(self._value(p)), many, b.load(sums[0])), sums[0])
            return
        values = self.widen(self.load(b.gep(self.values, [b.mul(p, I64(self.lanes))]), self._stored(self.lanes)))
        for i, slot in enumerate(sums):
            one = self._splat(b.load(b.gep(x, [I64(i)])))
            b.store(self.add(values, one, b.load(slot)), slot)

    def _neighbours(self, p: Any, slot: Any) -> None:
        """Eight entries of a row; the compiler's own gather instruction is three times slower than eight loads."""
        b = self.builder
        values = self.widen(self.load(b.gep(self.values, [p]), self._stored(NEIGHBOURS)))
        gathered = ir.Constant(self.vector, ir.Undefined)
        for i in range(NEIGHBOURS):
            x = b.load(self._x(b.add(p, I64(i)), I64(0)))
            gathered = b.insert_element(gathered, x, I32(i))
        b.store(self.add(values, gathered, b.load(slot)), slot)

    def _x(self, p: Any, stream: Any) -> Any:
        """Where the inputs of a block begin."""
        b = self.builder
        column = self.index(self.columns, p)
        if self.gathers:
            return b.gep(self.x, [column])
        return b.gep(self.x, [b.add(b.mul(column, self.a["streams"]), stream)])

    def _stored(self, width: int) -> Any:
        return ir.VectorType(STORED[self.kind], width)

    def _value(self, p: Any) -> Any:
        return self.widen(self.builder.load(self.builder.gep(self.values, [p])))

    def _splat(self, x: Any) -> Any:
        b = self.builder
        one = b.insert_element(ir.Constant(self.vector, ir.Undefined), x, I32(0))
        mask = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return b.shuffle_vector(one, ir.Constant(self.vector, ir.Undefined), mask)

    def _store(self, group: Any, stream: Any) -> None:
        b = self.builder
        position = b.add(b.mul(b.sub(group, self.a["begin"]), self.a["streams"]), stream)
        for i in range(len(self.sums[0])):
            total = b.load(self.sums[0][i])
            for row in self.sums[1:]:
                total = b.fadd(total, b.load(row[i]))
            if self.gathers:
                total = self._horizontal(total)
            if self.kind == "int8":
                scale = b.load(b.gep(self.scales, [group]))
                total = b.fmul(total, scale if self.gathers else self._splat(scale))
            target = b.gep(self.out, [b.mul(b.add(position, I64(i)), I64(self.lanes))])
            stored = b.store(total, b.bitcast(target, total.type.as_pointer()))
            stored.align = 4

    def _horizontal(self, total: Any) -> Any:
        b, result = self.builder, self.builder.load(self.rest)
        for i in range(self.width):
            result = b.fadd(result, b.extract_element(total, I32(i)))
        return result
