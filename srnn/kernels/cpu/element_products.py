"""Products of single elements whose rows lie side by side in registers, as machine code.

Rows are sorted by length within a row group, then taken 16 or 8 at a time, a row a lane of a register. A *slot* is an
entry of each: values [lanes], and where in x each is to be multiplied. Slots that a row has no entry for hold zero.
``element_layouts`` makes both forms:

*Windows*, for AVX-512: all columns of a slot lie in a window of 32, which two registers hold, so that one instruction
(``vpermi2ps``) looks all 16 up. Places in the window take five bits; a quad of four slots keeps them in a dword a row.

*Gathers*, for AVX2: eight columns a slot, anywhere, fetched by the processor's gather instruction. One stream only.

*Dense*, for any processor: a slot is a column, zeros included, rows in their own order. Of few columns, or where a
third of the weights is left, multiplying zeros takes less than looking up what to multiply.

    out[group - begin, b, order[row]] = scales[row] * sum over slots p of values[p, row] * x[b, columns[p, row]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from srnn.kernels.cpu.compiled import processor_features
from srnn.kernels.cpu.shapes import (
    BASES_AT,
    COLUMNS_AT,
    LANES_OF_GROUP,
    ORDER_AT,
    ROW_POINTERS_AT,
    ROWS_OF_DENSE,
    SCALES_AT,
    SLOTS_OF_DENSE,
    VALUES_AT,
    WIDTH_OF_X,
)
from srnn.kernels.cpu.vector_code import F32, I32, I64, STORED, VectorCode

Fetch = Callable[[Any], Any]  # a stream's x -> its numbers of a slot


class _ElementProduct(VectorCode):
    """The loops; a form says how x is fetched."""

    lanes: int  # rows side by side
    unrolled: int  # slots of a turn of the loop

    def __init__(self, builder: Any, kind: str, wide: bool, tile: int, arguments: list[Any]) -> None:
        super().__init__(builder, kind, tile, arguments)
        self.vector = ir.VectorType(F32, self.lanes)
        self.zeros = ir.Constant(self.vector, [0.0] * self.lanes)
        self.values = self.pointer(self.number(VALUES_AT), STORED[kind])
        self.turns = self.pointer(self.number(ROW_POINTERS_AT), I32)
        self.order = self.pointer(self.number(ORDER_AT), I32)
        self.scales = self.pointer(self.number(SCALES_AT), F32)
        self.block, self.width = self.number(LANES_OF_GROUP), self.number(WIDTH_OF_X)
        # One stream has a sum for each slot of a turn, several have fewer each, so that additions need not wait.
        self.parts = self.unrolled if tile == 1 else self.parts_of_several()
        self.sums = [cgutils.alloca_once(builder, self.vector) for _ in range(self.parts * tile)]

    def parts_of_several(self) -> int:
        """Sums of each of several streams."""
        return 1

    def emit(self) -> None:
        """Sets of rows side by side."""
        b = self.builder
        many = b.udiv(self.block, I64(self.lanes))  # sets of rows of a row group
        self.sets(b.mul(self.a["begin"], many), b.mul(self.a["end"], many), many)

    def sets(self, first: Any, last: Any, many: Any) -> None:
        """One after the other."""
        b = self.builder
        with cgutils.for_range_slice(b, first, last, I64(1), I64) as (rows, _):
            turns = self.index(self.turns, rows), self.index(self.turns, b.add(rows, I64(1)))
            group = b.sub(b.udiv(rows, many), self.a["begin"])
            with cgutils.for_range_slice(b, I64(0), self.a["streams"], I64(self.tile), I64) as (stream, _):
                for total in self.sums:
                    b.store(self.zeros, total)
                each = [b.add(stream, I64(i)) for i in range(self.tile)]
                xs = [b.gep(self.x, [b.mul(one, self.width)]) for one in each]
                self.with_care(lambda careful: self._turns(*turns, xs, careful))
                self._store(rows, [b.add(b.mul(group, self.a["streams"]), one) for one in each])

    def with_care(self, emit: Callable[[bool], None]) -> None:
        """Code for x that holds what is not finite, and faster code."""
        with self.builder.if_else(self.builder.icmp_signed("!=", self.a["careful"], I64(0))) as (then, otherwise):
            with then:
                emit(True)
            with otherwise:
                emit(False)

    def multiplied(self, value: Any, x: Any, total: Any, careful: bool) -> None:
        """Adds a product to a sum; zero times NaN or infinity would be NaN, in a row that has no weight there."""
        b = self.builder
        if careful:
            x = b.select(b.fcmp_ordered("==", value, self.zeros), self.zeros, x)
        b.store(self.add(value, x, b.load(total)), total)

    def _turns(self, first: Any, last: Any, xs: list[Any], careful: bool) -> None:
        b = self.builder
        with cgutils.for_range_slice(b, first, last, I64(1), I64) as (turn, _):
            for k, (slot, fetch) in enumerate(self.slots(turn, first)):
                stored = self.load(b.gep(self.values, [slot]), ir.VectorType(STORED[self.kind], self.lanes))
                value = self.widen(stored)
                for i, x in enumerate(xs):
                    self.multiplied(value, fetch(x), self.sums[k % self.parts * self.tile + i], careful)

    def slots(self, turn: Any, first: Any) -> list[tuple[Any, Fetch]]:
        """Of a turn, and the first one of its rows: where the values begin, and how x is fetched."""
        raise NotImplementedError

    def _store(self, rows: Any, positions: list[Any]) -> None:
        b = self.builder
        totals = [b.load(total) for total in self.sums]
        while len(totals) > len(positions):  # halves, which is as exact as it gets
            half = len(totals) // 2
            totals = [b.fadd(*pair) for pair in zip(totals[:half], totals[half:], strict=True)]
        at = b.mul(rows, I64(self.lanes))
        if self.kind == "int8":
            totals = [b.fmul(total, self.load(b.gep(self.scales, [at]), self.vector)) for total in totals]
        targets = [b.gep(self.out, [b.mul(position, self.block)]) for position in positions]
        self.put(totals, targets, at)

    def put(self, totals: list[Any], targets: list[Any], at: Any) -> None:
        """The sums of sorted rows, of each stream, to where the rows came from."""
        b = self.builder
        order = [self.index(self.order, b.add(at, I64(lane))) for lane in range(self.lanes)]
        for total, target in zip(totals, targets, strict=True):
            for lane, row in enumerate(order):
                b.store(b.extract_element(total, I32(lane)), b.gep(target, [row]))


class WindowProduct(_ElementProduct):
    """Looks x up in registers."""

    lanes, unrolled = 16, 4

    def __init__(self, builder: Any, kind: str, wide: bool, tile: int, arguments: list[Any]) -> None:
        super().__init__(builder, kind, wide, tile, arguments)
        self.places = self.pointer(self.number(COLUMNS_AT), I32)
        self.bases = self.pointer(self.number(BASES_AT), I32)

    def slots(self, turn: Any, first: Any) -> list[tuple[Any, Fetch]]:
        """Four windows, whose places are parts of the same dwords."""
        b = self.builder
        quad = self.load(b.gep(self.places, [b.mul(turn, I64(self.lanes))]), ir.VectorType(I32, self.lanes))
        found = []
        for k in range(self.unrolled):
            slot = b.add(b.mul(turn, I64(self.unrolled)), I64(k))
            # Only the lowest five bits of a place count, so what is above them can stay.
            places = b.lshr(quad, ir.Constant(quad.type, [8 * k] * self.lanes)) if k else quad
            found.append((b.mul(slot, I64(self.lanes)), self._window(self.index(self.bases, slot), places)))
        return found

    def _window(self, base: Any, places: Any) -> Fetch:
        def fetch(x: Any) -> Any:
            low, high = (self.load(self.builder.gep(x, [at]), self.vector) for at in (base, self._next(base)))
            return self.call("llvm.x86.avx512.vpermi2var.ps.512", self.vector, low, places, high)

        return fetch

    def _next(self, base: Any) -> Any:
        return self.builder.add(base, I64(self.lanes))


class GatherProduct(_ElementProduct):
    """Lets the processor gather x."""

    lanes, unrolled = 8, 2

    def __init__(self, builder: Any, kind: str, wide: bool, tile: int, arguments: list[Any]) -> None:
        super().__init__(builder, kind, wide, tile, arguments)
        self.columns = self.pointer(self.number(COLUMNS_AT), ir.IntType(32 if wide else 16))

    def slots(self, turn: Any, first: Any) -> list[tuple[Any, Fetch]]:
        """Two gathers."""
        b = self.builder
        indices = ir.VectorType(I32, self.lanes)
        found = []
        for k in range(self.unrolled):
            slot = b.mul(b.add(b.mul(turn, I64(self.unrolled)), I64(k)), I64(self.lanes))
            columns = self.load(b.gep(self.columns, [slot]), ir.VectorType(self.columns.type.pointee, self.lanes))
            found.append((slot, self._gather(b.zext(columns, indices) if columns.type != indices else columns)))
        return found

    def _gather(self, columns: Any) -> Fetch:
        b, byte = self.builder, ir.IntType(8)
        everything = b.bitcast(ir.Constant(columns.type, [-1] * self.lanes), self.vector)

        def fetch(x: Any) -> Any:
            x = b.bitcast(x, byte.as_pointer())
            name = "llvm.x86.avx2.gather.d.ps.256"
            return self.call(name, self.vector, self.zeros, x, columns, everything, byte(4))

        return fetch


class DenseProduct(_ElementProduct):
    """Multiplies all columns."""

    lanes, unrolled = ROWS_OF_DENSE, SLOTS_OF_DENSE

    def parts_of_several(self) -> int:
        """Two, where sixteen numbers are one register and not two: more would not fit."""
        return 2 if processor_features().get("avx512f") else 1

    def sets(self, first: Any, last: Any, many: Any) -> None:
        """Of one stream several together, which share what is fetched of x: as many as there are registers for."""
        b = self.builder
        if self.tile > 1:
            super().sets(first, last, many)
            return
        for together in (4, 2, 1) if processor_features().get("avx512f") else (2, 1):
            middle = b.sub(last, b.urem(b.sub(last, first), I64(together)))
            with cgutils.for_range_slice(b, first, middle, I64(together), I64) as (rows, _):
                self._together(rows, together)
            first = middle

    def _together(self, rows: Any, together: int) -> None:
        """Sets of rows from ``rows`` on. However many, a row's sum is the same: odd columns, and even ones."""
        b = self.builder
        sums = [[cgutils.alloca_once(b, self.vector) for _ in range(2)] for _ in range(together)]
        for total in (total for both in sums for total in both):
            b.store(self.zeros, total)
        begins = [self.index(self.turns, b.add(rows, I64(i))) for i in range(together + 1)]

        def columns(careful: bool) -> None:
            with cgutils.for_range_slice(b, I64(0), b.sub(begins[1], begins[0]), I64(1), I64) as (turn, _):
                for k in range(self.unrolled):
                    x = self._splat_of(b.add(b.mul(turn, I64(self.unrolled)), I64(k)))(self.x)
                    for both, begin in zip(sums, begins, strict=False):
                        slot = b.add(b.mul(b.add(begin, turn), I64(self.unrolled)), I64(k))
                        value = self.load(b.gep(self.values, [b.mul(slot, I64(self.lanes))]), self.vector)
                        self.multiplied(value, x, both[k % 2], careful)

        self.with_care(columns)
        for i, both in enumerate(sums):
            position = b.sub(b.add(rows, I64(i)), self.a["begin"])
            target = b.gep(self.out, [b.mul(position, self.block)])
            self.put([b.fadd(*map(b.load, both))], [target], None)

    def slots(self, turn: Any, first: Any) -> list[tuple[Any, Fetch]]:
        """Four columns; past the last one x is zero."""
        b = self.builder
        column = b.mul(b.sub(turn, first), I64(self.unrolled))
        slot = b.mul(turn, I64(self.unrolled))
        each = [(b.add(slot, I64(k)), b.add(column, I64(k))) for k in range(self.unrolled)]
        return [(b.mul(place, I64(self.lanes)), self._splat_of(at)) for place, at in each]

    def _splat_of(self, column: Any) -> Fetch:
        b, nothing = self.builder, ir.Constant(self.vector, ir.Undefined)
        everywhere = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)

        def fetch(x: Any) -> Any:
            one = b.insert_element(nothing, b.load(b.gep(x, [column])), I32(0))
            return b.shuffle_vector(one, nothing, everywhere)

        return fetch

    def put(self, totals: list[Any], targets: list[Any], at: Any) -> None:
        """Rows are in their own order, and a row group is as long as a register."""
        for total, target in zip(totals, targets, strict=True):
            self.builder.store(total, self.builder.bitcast(target, self.vector.as_pointer())).align = 4
