"""The inner products of the CPU kernels: row groups of a sparse matrix times columns of a dense one, as machine code.

``dot_address`` gives a C function that computes, for the row groups ``begin`` to ``end``,

    out[group - begin, b, lane] = scale[group] * sum over blocks p of values[p, lane] * h[columns[p], b]

The loops are built as LLVM code, because numba's own loops leave the sums in memory, which is 2 to 3 times slower.
Blocks N x 1 are vectors over their N rows; single elements are vectors over the streams, or, for one stream, over eight
neighbours of a row. Several sums run side by side, so that additions do not wait for each other. Values are widened to
fp32 as they are loaded.

7680 x 2560 at 90 %, one stream, one thread of an AMD EPYC (AVX2), in ms: 0.71 for single elements in fp32, 0.16, 0.13
and 0.15 for 16 x 1 in fp32, fp16 and int8; torch's dense product takes 4.7, its dynamic int8 one 1.2.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.core import cgutils
from numba.extending import intrinsic

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
NEIGHBOURS = 8  # entries of a row that one stream multiplies at a time

F32, I64 = ir.FloatType(), ir.IntType(64)
STORED = {"fp32": F32, "fp16": ir.HalfType(), "bf16": ir.IntType(16), "int8": ir.IntType(8)}
_KINDS = tuple(STORED)

ARGUMENTS = ("values", "columns", "row_pointers", "scales", "begin", "end", "h", "streams", "out")
DOT = types.void(*[types.int64] * len(ARGUMENTS))


class _Emitter:
    """Builds the code of one product."""

    def __init__(self, builder: Any, lanes: int, kind: str, wide: bool, tile: int, arguments: list[Any]) -> None:
        self.builder, self.lanes, self.kind, self.tile = builder, lanes, kind, tile
        self.unrolled = UNROLLED[lanes, tile]
        self.a = dict(zip(ARGUMENTS, arguments, strict=True))
        self.values = builder.inttoptr(self.a["values"], STORED[kind].as_pointer())
        self.columns = builder.inttoptr(self.a["columns"], ir.IntType(32 if wide else 16).as_pointer())
        self.row_pointers = builder.inttoptr(self.a["row_pointers"], ir.IntType(32).as_pointer())
        self.h = builder.inttoptr(self.a["h"], F32.as_pointer())
        self.out = builder.inttoptr(self.a["out"], F32.as_pointer())
        self.gathers = lanes == 1 and tile == 1
        self.width = NEIGHBOURS if self.gathers else tile if lanes == 1 else lanes
        self.vector = ir.VectorType(F32, self.width)
        sums = 1 if lanes == 1 else tile
        slots = [[cgutils.alloca_once(builder, self.vector) for _ in range(sums)] for _ in range(self.unrolled)]
        self.sums = slots
        self.rest = cgutils.alloca_once(builder, F32) if self.gathers else None

    def emit(self) -> None:
        b = self.builder
        with cgutils.for_range_slice(b, self.a["begin"], self.a["end"], I64(1), I64) as (group, _):
            first = self._pointer(group)
            last = self._pointer(b.add(group, I64(1)))
            with cgutils.for_range_slice(b, I64(0), self.a["streams"], I64(self.tile), I64) as (stream, _):
                self._clear()
                self._blocks(first, last, stream)
                self._store(group, stream)

    def _pointer(self, group: Any) -> Any:
        return self.builder.zext(self.builder.load(self.builder.gep(self.row_pointers, [group])), I64)

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
                b.store(self._add(value, x, b.load(self.rest)), self.rest)
            else:
                self._block(p, stream, self.sums[0])

    def _block(self, p: Any, stream: Any, sums: list[Any]) -> None:
        b, x = self.builder, self._x(p, stream)
        if self.lanes == 1:
            many = self._load(x, self.vector)
            b.store(self._add(self._splat(self._value(p)), many, b.load(sums[0])), sums[0])
            return
        values = self._widen(self._load(b.gep(self.values, [b.mul(p, I64(self.lanes))]), self._stored(self.lanes)))
        for i, slot in enumerate(sums):
            one = self._splat(b.load(b.gep(x, [I64(i)])))
            b.store(self._add(values, one, b.load(slot)), slot)

    def _neighbours(self, p: Any, slot: Any) -> None:
        """Eight entries of a row; the compiler's own gather instruction is three times slower than eight loads."""
        b = self.builder
        values = self._widen(self._load(b.gep(self.values, [p]), self._stored(NEIGHBOURS)))
        gathered = ir.Constant(self.vector, ir.Undefined)
        for i in range(NEIGHBOURS):
            x = b.load(self._x(b.add(p, I64(i)), I64(0)))
            gathered = b.insert_element(gathered, x, ir.IntType(32)(i))
        b.store(self._add(values, gathered, b.load(slot)), slot)

    def _x(self, p: Any, stream: Any) -> Any:
        """Where the inputs of a block begin."""
        b = self.builder
        column = b.zext(b.load(b.gep(self.columns, [p])), I64)
        if self.gathers:
            return b.gep(self.h, [column])
        return b.gep(self.h, [b.add(b.mul(column, self.a["streams"]), stream)])

    def _stored(self, width: int) -> Any:
        return ir.VectorType(STORED[self.kind], width)

    def _load(self, pointer: Any, vector: Any) -> Any:
        """A vector from memory that is aligned to its elements only."""
        loaded = self.builder.load(self.builder.bitcast(pointer, vector.as_pointer()))
        loaded.align = 1
        return loaded

    def _value(self, p: Any) -> Any:
        return self._widen(self.builder.load(self.builder.gep(self.values, [p])))

    def _widen(self, value: Any) -> Any:
        """Stored values to fp32, one or a vector."""
        b = self.builder

        def shaped(element: Any) -> Any:
            return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element

        if self.kind == "fp16":
            return b.fpext(value, shaped(F32))
        if self.kind == "int8":
            return b.sitofp(value, shaped(F32))
        if self.kind == "bf16":
            bits = b.zext(value, shaped(ir.IntType(32)))
            sixteen = ir.IntType(32)(16)
            shift = ir.Constant(bits.type, [16] * value.type.count) if bits.type != ir.IntType(32) else sixteen
            return b.bitcast(b.shl(bits, shift), shaped(F32))
        return value

    def _splat(self, x: Any) -> Any:
        b = self.builder
        one = b.insert_element(ir.Constant(self.vector, ir.Undefined), x, ir.IntType(32)(0))
        mask = ir.Constant(ir.VectorType(ir.IntType(32), self.width), [0] * self.width)
        return b.shuffle_vector(one, ir.Constant(self.vector, ir.Undefined), mask)

    def _add(self, a: Any, x: Any, total: Any) -> Any:
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        kind = ir.FunctionType(a.type, [a.type] * 3)
        fused = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.{suffix}")
        return self.builder.call(fused, [a, x, total])

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
                scale = b.load(b.gep(b.inttoptr(self.a["scales"], F32.as_pointer()), [group]))
                total = b.fmul(total, scale if self.gathers else self._splat(scale))
            target = b.gep(self.out, [b.mul(b.add(position, I64(i)), I64(self.lanes))])
            stored = b.store(total, b.bitcast(target, total.type.as_pointer()))
            stored.align = 4

    def _horizontal(self, total: Any) -> Any:
        b, result = self.builder, self.builder.load(self.rest)
        for i in range(self.width):
            result = b.fadd(result, b.extract_element(total, ir.IntType(32)(i)))
        return result


@intrinsic(prefer_literal=True)
def _emit_dot(typing, lanes, kind, wide, tile, values, columns, row_pointers, scales, begin, end, h, streams, out):
    """The code of ``dot_address`` in place."""
    signature = types.void(lanes, kind, wide, tile, *[types.int64] * len(ARGUMENTS))
    options = (lanes.literal_value, _KINDS[kind.literal_value], bool(wide.literal_value), tile.literal_value)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _Emitter(builder, *options, arguments[4:]).emit()
        return context.get_dummy_value()

    return signature, codegen


def _source(lanes: int, kind: int, wide: int, tile: int) -> Callable[..., None]:
    def dot(values, columns, row_pointers, scales, begin, end, h, streams, out):
        _emit_dot(lanes, kind, wide, tile, values, columns, row_pointers, scales, begin, end, h, streams, out)

    return dot


@cache
def dot_function(lanes: int, values: str, wide: bool, tile: int) -> Any:
    """The compiled product; compiled once, then read from disk.

    Args:
        lanes: N of the blocks.
        values: what is stored: fp32, fp16, bf16 or int8.
        wide: whether columns take 32 bits.
        tile: streams a time: 1, or ``TILES[lanes]``.
    """
    return cfunc(DOT, cache=True)(_source(lanes, _KINDS.index(values), int(wide), tile))


def dot_address(lanes: int, values: str, wide: bool, tile: int) -> int:
    """Address of the C function, for ``call_dot``."""
    return int(dot_function(lanes, values, wide, tile).address)


@intrinsic
def call_dot(typing, address, values, columns, row_pointers, scales, begin, end, h, streams, out):
    """Call the function at ``address``."""
    signature = types.void(*[types.int64] * (1 + len(ARGUMENTS)))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), arguments[1:])
        return context.get_dummy_value()

    return signature, codegen
