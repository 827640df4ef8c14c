"""What the products' machine code is built with: LLVM vectors from a matrix's memory.

A product is a C function that takes ``ARGUMENTS``: the address of the numbers that ``shapes`` lists, the row groups
``begin`` to ``end``, the address of x, its streams, whether x holds what is not finite, and the address of the outputs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
STORED = {"fp32": F32, "fp16": ir.HalfType(), "bf16": ir.IntType(16), "int8": ir.IntType(8)}

ARGUMENTS = ("matrix", "begin", "end", "x", "streams", "careful", "out")
DOT = types.void(*[types.int64] * len(ARGUMENTS))


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


@intrinsic
def add_sixteen(typing, a, b, total):
    """total = a + b, of sixteen floats at addresses: in a loop the compiler asks each time whether they overlap."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        at = [builder.inttoptr(one, ir.VectorType(F32, 16).as_pointer()) for one in arguments]
        parts = [builder.load(one) for one in at[:2]]
        for part in parts:
            part.align = 4
        builder.store(builder.fadd(*parts), at[2]).align = 4
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _pointer_to(kind: Any) -> Any:
    """A function of compiled code: an address as a pointer."""
    result = types.CPointer(kind)

    def pointer(typing, address):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(types.int64), codegen

    return intrinsic(pointer)


_floats, _integers = _pointer_to(types.float32), _pointer_to(types.int64)


# Arrays at an address are free; views of an array are not: each counts who holds its memory, twice, by atomic adds.
@njit(inline="always")
def floats(at, count):
    """The fp32 numbers at an address, as an array."""
    return carray(_floats(at), (count,))


@njit(inline="always")
def integers(at, count):
    """The int64 numbers at an address, as an array."""
    return carray(_integers(at), (count,))


@njit(nogil=True, cache=True)
def keep(array):
    """Uses an array: its memory is freed after its last use, which taking its address would be."""
