"""The arithmetic of gates, from the products of a few units to their new state, as machine code.

Sixteen units at a time, the last ones masked, all of a cell in registers: numba's own loops leave what does not fill a
register to single numbers, and 24 units are mostly that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from srnn.cells import CELLS, CLIP
from srnn.kernels.cpu.vector_code import F32, I32, I64

TANH, RELU, CLIPPED, GRU, LSTM = (CELLS.index(cell) for cell in ("tanh", "relu", "clipped_relu", "gru", "lstm"))

# tanh(x) = x P(x^2) / Q(x^2) up to 9, where it is 1 in fp32; our own weighted least-squares fit, 4e-11 off before
# rounding, 3.2e-7 in fp32.
LARGEST = 9.0
P = (3.683663790665648e-11, 1.1132286914516953e-07, 4.2299179767724127e-05, 0.004426933825016022, 0.14099948108196259, 1)
Q = (2.956636269146884e-09, 2.6062236884172307e-06, 0.0005010237800888717, 0.029204538092017174, 0.4743328094482422, 1)
LANES = 16
V16 = ir.VectorType(F32, LANES)


class GateCode:
    """Builds the code of one cell for sixteen units.

    Args:
        builder: of the function.
        arguments: those of ``gate_arithmetic``, without the cell and the number of units.
        at: index of the first unit.
        mask: which lanes are units; None if all are.
    """

    def __init__(self, builder: Any, arguments: list[Any], at: Any, mask: Any) -> None:
        self.builder, self.mask = builder, mask
        self.offset = builder.mul(at, I64(4))
        self.v, self.v_step, self.u, self.u_step, self.old, self.new, self.y, self.c, self.bias = arguments

    def pointer(self, address: Any) -> Any:
        """To this code's units of what begins at an address."""
        return self.builder.inttoptr(self.builder.add(address, self.offset), V16.as_pointer())

    def load(self, address: Any) -> Any:
        """Sixteen numbers; zeros past the last unit."""
        if self.mask is None:
            loaded = self.builder.load(self.pointer(address))
            loaded.align = 4
            return loaded
        return self._masked("load", V16, self.pointer(address), I32(4), self.mask, constant(0.0))

    def store(self, value: Any, address: Any) -> None:
        """Of the units alone."""
        if self.mask is None:
            self.builder.store(value, self.pointer(address)).align = 4
        else:
            self._masked("store", ir.VoidType(), value, self.pointer(address), I32(4), self.mask)

    def _masked(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        name = f"llvm.masked.{name}.v16f32.p0v16f32"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def gate(self, addresses: tuple[Any, Any], index: int) -> Any:
        """Numbers of a gate, from where the first gate's are and how many bytes lie between gates."""
        b = self.builder
        return self.load(b.add(addresses[0], b.mul(addresses[1], I64(index))))

    def sum(self, index: int) -> Any:
        """Of a gate's products with x and with h."""
        return self.builder.fadd(self.gate((self.u, self.u_step), index), self.gate((self.v, self.v_step), index))

    def fma(self, a: Any, x: Any, total: Any) -> Any:
        """a x + total."""
        kind = ir.FunctionType(V16, [V16] * 3)
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.fmuladd.v16f32")
        return self.builder.call(function, [a, x, total])

    def tanh(self, x: Any) -> Any:
        """Comparisons this way round let NaN through."""
        b, largest, smallest = self.builder, constant(LARGEST), constant(-LARGEST)
        x = b.select(b.fcmp_ordered(">", x, largest), largest, x)
        x = b.select(b.fcmp_ordered("<", x, smallest), smallest, x)
        square = b.fmul(x, x)
        sums = []
        for numbers in (P, Q):
            total = constant(numbers[0])
            for number in numbers[1:]:
                total = self.fma(total, square, constant(number))
            sums.append(total)
        return b.fdiv(b.fmul(x, sums[0]), sums[1])

    def sigmoid(self, x: Any) -> Any:
        """From tanh."""
        half = constant(0.5)
        return self.fma(half, self.tanh(self.builder.fmul(half, x)), half)

    def done(self, new: Any) -> None:
        """The new h, also where the outputs are to be."""
        self.store(new, self.new)
        self.store(new, self.y)


def constant(number: float) -> Any:
    """The same number sixteen times."""
    return ir.Constant(V16, [number] * LANES)


def _gru(code: GateCode) -> None:
    b = code.builder
    reset, update = code.sigmoid(code.sum(0)), code.sigmoid(code.sum(1))
    of_h = b.fadd(code.gate((code.v, code.v_step), 2), code.load(code.bias))
    new = code.tanh(code.fma(reset, of_h, code.gate((code.u, code.u_step), 2)))
    one = constant(1.0)
    code.done(code.fma(update, code.load(code.old), b.fmul(b.fsub(one, update), new)))


def _lstm(code: GateCode) -> None:
    b = code.builder
    entering, forgetting = code.sigmoid(code.sum(0)), code.sigmoid(code.sum(1))
    new, leaving = code.tanh(code.sum(2)), code.sigmoid(code.sum(3))
    c = code.fma(forgetting, code.load(code.c), b.fmul(entering, new))
    code.store(c, code.c)
    code.done(b.fmul(leaving, code.tanh(c)))


def _tanh(code: GateCode) -> None:
    code.done(code.tanh(code.sum(0)))


def _relu(code: GateCode) -> None:
    code.done(_not_negative(code))


def _clipped_relu(code: GateCode) -> None:
    ceiling, h = constant(float(CLIP)), _not_negative(code)
    code.done(code.builder.select(code.builder.fcmp_ordered(">", h, ceiling), ceiling, h))


def _not_negative(code: GateCode) -> Any:
    b, h = code.builder, code.sum(0)
    return b.select(b.fcmp_ordered("<", h, constant(0.0)), constant(0.0), h)


def _compiled(emit: Callable[[GateCode], None]) -> Any:
    """A function of compiled code: ``gate_arithmetic`` of one cell."""

    def arithmetic(typing, n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            n, *rest = arguments
            some = builder.urem(n, I64(LANES))
            whole = builder.sub(n, some)
            with cgutils.for_range_slice(builder, I64(0), whole, I64(LANES), I64) as (at, _):
                emit(GateCode(builder, rest, at, None))
            with builder.if_then(builder.icmp_unsigned(">", some, I64(0))):
                everywhere = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
                nothing = ir.Constant(ir.VectorType(I32, LANES), ir.Undefined)
                count = builder.insert_element(nothing, builder.trunc(some, I32), I32(0))
                lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
                mask = builder.icmp_unsigned("<", lanes, builder.shuffle_vector(count, nothing, everywhere))
                emit(GateCode(builder, rest, whole, mask))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 10), codegen

    return intrinsic(arithmetic)


_of_gru, _of_lstm, _of_tanh = _compiled(_gru), _compiled(_lstm), _compiled(_tanh)
_of_relu, _of_clipped_relu = _compiled(_relu), _compiled(_clipped_relu)


@njit(nogil=True, cache=True, error_model="numpy")
def gate_arithmetic(cell, n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at):
    """The new h of ``n`` units, which may be where the old one is, and as outputs; an LSTM's c in place.

    v is the product with h, u that with x. Of each comes a gate, then after ``step`` bytes the next one.
    """
    if cell == GRU:
        _of_gru(n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at)
    elif cell == LSTM:
        _of_lstm(n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at)
    elif cell == TANH:
        _of_tanh(n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at)
    elif cell == RELU:
        _of_relu(n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at)
    else:
        _of_clipped_relu(n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at)
