"""The arithmetic of gates, from the products of a few units to their new state, as machine code.

Sixteen units at a time, all of a cell in registers: numba's own loops leave what does not fill several registers to
single numbers, which is most of 24 units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from srnn.cells import CELLS, CLIP
from srnn.kernels.cpu.vector_code import I64, V16, Lanes, by_sixteen, sixteen

TANH, RELU, CLIPPED, GRU, LSTM = (CELLS.index(cell) for cell in ("tanh", "relu", "clipped_relu", "gru", "lstm"))

# tanh(x) = x A(x^2) / B(x^2) up to 9, where it is 1 in fp32; our own weighted least-squares fit, 4e-11 off before
# rounding, 3.2e-7 in fp32.
LARGEST = 9.0
ABOVE: tuple[float, ...] = (3.683663790665648e-11, 1.1132286914516953e-07, 4.2299179767724127e-05)
ABOVE += (0.004426933825016022, 0.14099948108196259, 1.0)
BELOW: tuple[float, ...] = (2.956636269146884e-09, 2.6062236884172307e-06, 0.0005010237800888717)
BELOW += (0.029204538092017174, 0.4743328094482422, 1.0)


class GateCode:
    """Builds the code of one cell for sixteen units.

    Args:
        lanes: the units.
        arguments: those of ``gate_arithmetic``, without the cell and the number of units.
    """

    def __init__(self, lanes: Lanes, arguments: list[Any]) -> None:
        self.builder, self.load, self.store = lanes.builder, lanes.load, lanes.store
        self.v, self.v_step, self.u, self.u_step, self.old, self.new, self.y, self.c, self.bias = arguments

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
        b, largest, smallest = self.builder, sixteen(LARGEST), sixteen(-LARGEST)
        x = b.select(b.fcmp_ordered(">", x, largest), largest, x)
        x = b.select(b.fcmp_ordered("<", x, smallest), smallest, x)
        square = b.fmul(x, x)
        sums = []
        for numbers in (ABOVE, BELOW):
            total = sixteen(numbers[0])
            for number in numbers[1:]:
                total = self.fma(total, square, sixteen(number))
            sums.append(total)
        return b.fdiv(b.fmul(x, sums[0]), sums[1])

    def sigmoid(self, x: Any) -> Any:
        """From tanh."""
        half = sixteen(0.5)
        return self.fma(half, self.tanh(self.builder.fmul(half, x)), half)

    def done(self, new: Any) -> None:
        """The new h, also where the outputs are to be."""
        self.store(new, self.new)
        self.store(new, self.y)


def _gru(code: GateCode) -> None:
    b = code.builder
    reset, update = code.sigmoid(code.sum(0)), code.sigmoid(code.sum(1))
    of_h = b.fadd(code.gate((code.v, code.v_step), 2), code.load(code.bias))
    new = code.tanh(code.fma(reset, of_h, code.gate((code.u, code.u_step), 2)))
    one = sixteen(1.0)
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
    ceiling, h = sixteen(float(CLIP)), _not_negative(code)
    code.done(code.builder.select(code.builder.fcmp_ordered(">", h, ceiling), ceiling, h))


def _not_negative(code: GateCode) -> Any:
    b, h = code.builder, code.sum(0)
    return b.select(b.fcmp_ordered("<", h, sixteen(0.0)), sixteen(0.0), h)


def _compiled(emit: Callable[[GateCode], None]) -> Any:
    """A function of compiled code: ``gate_arithmetic`` of one cell."""

    def arithmetic(typing, n, v_at, v_step, u_at, u_step, old_at, new_at, y_at, c_at, bias_at):
        def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            n, *rest = arguments
            by_sixteen(builder, n, lambda lanes: emit(GateCode(lanes, rest)))
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
