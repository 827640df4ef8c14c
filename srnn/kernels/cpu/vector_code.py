"""What the products' machine code is built with: LLVM vectors from a matrix's memory.

A product is a C function that takes ``ARGUMENTS``: the address of the numbers that ``shapes`` lists, the row groups
``begin`` to ``end``, the address of x, its streams, whether x holds what is not finite, and the address of the outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I8, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
V16 = ir.VectorType(F32, 16)
STORED = {"fp32": F32, "fp16": ir.HalfType(), "bf16": ir.IntType(16), "int8": ir.IntType(8)}

ARGUMENTS = ("matrix", "begin", "end", "x", "streams", "careful", "out")


class VectorCode:
    """Builds the code of one product; a form of matrix derives from it and has ``emit``."""

    def __init__(self, builder: Any, kind: str, tile: int, arguments: list[Any]) -> None:
        self.builder, self.kind, self.tile = builder, kind, tile
        self.a = dict(zip(ARGUMENTS, arguments, strict=True))
        self.matrix = self.pointer(self.a["matrix"], I64)
        self.x = self.pointer(self.a["x"], F32)
        self.out = self.pointer(self.a["out"], F32)

    def emit(self) -> None:
        """The whole body."""
        raise NotImplementedError

    def pointer(self, address: Any, element: Any) -> Any:
        """An address as a pointer."""
        return self.builder.inttoptr(address, element.as_pointer())

    def number(self, index: int) -> Any:
        """One of the matrix's numbers."""
        return self.builder.load(self.builder.gep(self.matrix, [I64(index)]))

    def index(self, pointer: Any, at: Any) -> Any:
        """An unsigned index from memory."""
        return self.builder.zext(self.builder.load(self.builder.gep(pointer, [at])), I64)

    def load(self, pointer: Any, vector: Any) -> Any:
        """A vector from memory that is aligned to its elements only."""
        loaded = self.builder.load(self.builder.bitcast(pointer, vector.as_pointer()))
        loaded.align = 1
        return loaded

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """A call of one of LLVM's own functions."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def add(self, a: Any, x: Any, total: Any) -> Any:
        """a x + total, of numbers or vectors."""
        suffix = f"v{a.type.count}f32" if isinstance(a.type, ir.VectorType) else "f32"
        return self.call(f"llvm.fmuladd.{suffix}", a.type, a, x, total)

    def widen(self, value: Any) -> Any:
        """Stored values to fp32, one or a vector."""
        b = self.builder

        def shaped(element: Any) -> Any:
            return ir.VectorType(element, value.type.count) if isinstance(value.type, ir.VectorType) else element

        if self.kind == "fp16":
            return b.fpext(value, shaped(F32))
        if self.kind == "int8":
            return b.sitofp(value, shaped(F32))
        if self.kind == "bf16":
            bits = b.zext(value, shaped(I32))
            sixteen = I32(16)
            shift = ir.Constant(bits.type, [16] * value.type.count) if bits.type != I32 else sixteen
            return b.bitcast(b.shl(bits, shift), shaped(F32))
        return value


@intrinsic
def call_dot(typing, address, matrix, begin, end, x, streams, careful, out):
    """Call the function at ``address``."""
    signature = types.void(*[types.int64] * (1 + len(ARGUMENTS)))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = ir.FunctionType(ir.VoidType(), [I64] * len(ARGUMENTS)).as_pointer()
        builder.call(builder.inttoptr(arguments[0], function), arguments[1:])
        return context.get_dummy_value()

    return signature, codegen


class Lanes:
    """Sixteen numbers at a time from an index on, the last ones masked.

    Args:
        builder: of the function.
        at: index of the first number.
        mask: which lanes hold any; None if all do.
    """

    def __init__(self, builder: Any, at: Any, mask: Any) -> None:
        self.builder, self.mask, self.offset = builder, mask, builder.mul(at, I64(4))

    def pointer(self, address: Any) -> Any:
        """To these numbers of what begins at an address."""
        return self.builder.inttoptr(self.builder.add(address, self.offset), V16.as_pointer())

    def load(self, address: Any) -> Any:
        """Sixteen numbers; zeros past the last one."""
        if self.mask is None:
            loaded = self.builder.load(self.pointer(address))
            loaded.align = 4
            return loaded
        return self._masked("load", V16, self.pointer(address), I32(4), self.mask, sixteen(0.0))

    def store(self, value: Any, address: Any) -> None:
        """Nothing past the last one."""
        if self.mask is None:
            self.builder.store(value, self.pointer(address)).align = 4
        else:
            self._masked("store", ir.VoidType(), value, self.pointer(address), I32(4), self.mask)

    def _masked(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        name = f"llvm.masked.{name}.v16f32.p0v16f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)


def sixteen(number: float) -> Any:
    """The same number sixteen times."""
    return ir.Constant(V16, [number] * 16)


def by_sixteen(builder: Any, n: Any, emit: Callable[[Lanes], None]) -> None:
    """A loop over ``n`` numbers."""
    some = builder.urem(n, I64(16))
    whole = builder.sub(n, some)
    with cgutils.for_range_slice(builder, I64(0), whole, I64(16), I64) as (at, _):
        emit(Lanes(builder, at, None))
    with builder.if_then(builder.icmp_unsigned(">", some, I64(0))):
        dwords = ir.VectorType(I32, 16)
        nothing = ir.Constant(dwords, ir.Undefined)
        count = builder.insert_element(nothing, builder.trunc(some, I32), I32(0))
        count = builder.shuffle_vector(count, nothing, ir.Constant(dwords, [0] * 16))
        emit(Lanes(builder, whole, builder.icmp_unsigned("<", ir.Constant(dwords, list(range(16))), count)))


@intrinsic
def add(typing, n, a, b, total):
    """total = a + b, of ``n`` floats at addresses; in a loop the compiler would ask each time whether they overlap."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, *at = arguments
        by_sixteen(builder, n, lambda x: x.store(builder.fadd(x.load(at[0]), x.load(at[1])), at[2]))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@intrinsic
def copy(typing, n, target, source):
    """``n`` floats from one address to another; numba's own assignment of a slice looks for overlaps."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        n, target, source = arguments
        by_sixteen(builder, n, lambda x: x.store(x.load(source), target))
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def clear(typing, n, target):
    """``n`` zeros at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        by_sixteen(builder, arguments[0], lambda x: x.store(sixteen(0.0), arguments[1]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def number(typing, at, index):
    """An int64 of those at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.gep(builder.inttoptr(arguments[0], I64.as_pointer()), [arguments[1]]))

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def take_memory(typing, size):
    """The address of ``size`` bytes, 0 if there are not so many: numba's arrays would need numba when they are run."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(I8.as_pointer(), [I64])
        memory = builder.call(cgutils.get_or_insert_function(builder.module, kind, "malloc"), arguments)
        return builder.ptrtoint(memory, I64)

    return types.int64(types.int64), codegen


@intrinsic
def free_memory(typing, address):
    """Gives back what ``take_memory`` gave."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I8.as_pointer()])
        free = cgutils.get_or_insert_function(builder.module, kind, "free")
        builder.call(free, [builder.inttoptr(arguments[0], I8.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


def _pointer_to(kind: Any) -> Any:
    """A function of compiled code: an address as a pointer."""
    result = types.CPointer(kind)

    def pointer(typing, address):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(types.int64), codegen

    return intrinsic(pointer)


_floats, _integers = _pointer_to(types.float32), _pointer_to(types.int64)
_integers_32, _bytes = _pointer_to(types.int32), _pointer_to(types.uint8)


# Arrays at an address are free; views of an array are not: each counts who holds its memory, twice, by atomic adds.
@njit(inline="always")
def floats(at, count):
    """The fp32 numbers at an address, as an array."""
    return carray(_floats(at), (count,))


@njit(inline="always")
def integers(at, count):
    """The int64 numbers at an address, as an array."""
    return carray(_integers(at), (count,))


@njit(inline="always")
def integers_32(at, count):
    """The int32 numbers at an address, as an array."""
    return carray(_integers_32(at), (count,))


@njit(inline="always")
def bytes_at(at, count):
    """The bytes at an address, as an array."""
    return carray(_bytes(at), (count,))


@njit(nogil=True, cache=True)
def keep(array):
    """Uses an array: its memory is freed after its last use, which taking its address would be."""
