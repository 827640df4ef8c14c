"""``kernel=cpu``: compiled kernels for element and N x 1 matrices."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from srnn.cells import CELLS
from srnn.kernels.contract import (
    ComposedLayer,
    Kernel,
    Layer,
    LayerWeights,
    NetworkStep,
    Product,
    Recurrence,
    State,
)
from srnn.kernels.cpu.announcing import announced
from srnn.kernels.cpu.compiled import Compiled, code_of, numbers
from srnn.kernels.cpu.keeping import where_it_can_be_kept
from srnn.kernels.cpu.operands import Operand
from srnn.kernels.cpu.shapes import NUMBERS_OF_MATRIX, ROWS, Array, chunk_size
from srnn.registry import register
from srnn.sparse import SparseMatrix

# Entries times streams of a step from which on a second thread pays: starting it costs 2 to 10 us here. A GRU of 512
# units at 90 % (79,000) loses by it, one of 1024 (315,000) wins.
WORTH_THREADS = 200_000
NONE = np.zeros(NUMBERS_OF_MATRIX, np.int64)  # in place of a projection

Plan = tuple[Compiled, int, Array]  # a compiled call, where the numbers that it takes are, and these


@register.kernel("cpu")
class Cpu(Kernel):
    """One compiled loop over time for element and N x 1 matrices, on as many threads as torch uses.

    Needs numba, which compiles the first time on a machine. One stream on one thread needs no more than what it made.
    """

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """Little-endian CPUs with numba, inputs and outputs in fp32."""
        if device.type != "cpu":
            return f"its kernels run on a CPU, not on {device.type}"
        if dtype != torch.float32:
            return f"inputs and outputs are fp32 on a CPU, not {dtype}"
        if sys.byteorder != "little":
            return "its kernels need a little-endian CPU"
        return None if importlib.util.find_spec("numba") else "numba is not installed: pip install numba"

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """A sparse product; the matrix's memory is used as it is."""
        return _Product(matrix, bias)

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """A loop over time; the matrices' memory is used as it is."""
        return _Recurrence(weights)

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """Product and recurrence one after the other; of a single step of one stream both in one call."""
        return _Layer(_Product(weights.w_ih, weights.input_bias), _Recurrence(weights))

    def stack(self, layers: Sequence[Layer]) -> Layer | None:
        """One compiled call for all layers without projections."""
        able = [layer for layer in layers if isinstance(layer, _Layer) and layer.can_step]
        return _Stack(tuple(able)) if len(able) == len(layers) else None

    def network_step(self, table: Tensor | None, stack: Layer, decoder: Product | None) -> NetworkStep | None:
        """One compiled call, on one thread."""
        if not isinstance(stack, _Stack) or not isinstance(decoder, _Product | None):
            return None
        return _NetworkStep(table, stack, decoder)


def _vector(bias: Tensor | None, size: int) -> Array:
    return np.zeros(size, np.float32) if bias is None else _array(bias).copy()


class _Product:
    """``y_NO = x_NI W' + bias``."""

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None) -> None:
        self.operand, self.bias = Operand(matrix), _vector(bias, matrix.shape[0])
        self.outputs = matrix.shape[0]
        self._plans: dict[int, Plan] = {}

    def __call__(self, x_NI: Tensor) -> Tensor:
        return self.shaped(x_NI, x_NI.shape[0], (x_NI.shape[0], self.outputs))

    def shaped(self, x: Tensor, rows: int, shape: tuple[int, ...]) -> Tensor:
        """The product with so many rows, however x is shaped; y gets this shape."""
        some = min(rows, ROWS)
        if _threads(self.operand.work(rows) * some) > 1:
            return self._on_threads(x.reshape(rows, -1)).view(shape)
        x = _plain(x)
        y = x.new_empty(shape)  # fp32 on a CPU, whatever torch makes by default
        call, at, _ = self._plans.get(some) or self.plan(some)
        if call(numbers(at, rows, x.data_ptr(), y.data_ptr())):
            raise MemoryError(_no_memory(rows, self.outputs))
        return y

    def _on_threads(self, x_NI: Tensor) -> Tensor:
        matrix, rows = self.operand.matrix, x_NI.shape[0]
        threads = _threads(self.operand.work(rows) * min(rows, ROWS))
        y = np.empty((rows, matrix.shape[0]), np.float32)
        with announced("multiply", True, self.operand.kind, rows > 1):
            code, form = _compiled_code("multiplying"), self.operand.form(rows)
            chunk = chunk_size(matrix.units, min(rows, ROWS), threads, form.lanes)
            failed = code.multiply_parallel(
                chunk,
                self.operand.numbers(rows),
                matrix.gates,
                _array(x_NI),
                form.tile,
                self.bias,
                self.operand.bounds(threads, chunk, rows),
                y,
            )
        if failed:
            raise MemoryError(_no_memory(rows, self.outputs))
        return torch.from_numpy(y)

    def plan(self, rows: int) -> Plan:
        """The compiled call for so many rows, and the numbers that it takes."""
        matrix = self.operand.matrix
        with announced("product", self.operand.kind, rows > 1):
            form = self.operand.form(rows)
            chunk = chunk_size(matrix.units, rows, 1, form.lanes)
            of_product = [chunk, -(-matrix.units // chunk), form.tile, matrix.gates, *matrix.shape]
            plan = np.array([*of_product, self.bias.ctypes.data, *self.operand.numbers(rows)], np.int64)
            found = self._plans[rows] = code_of("run_product"), plan.ctypes.data, plan
        return found


class _Recurrence(Recurrence):
    """The loop over time."""

    def __init__(self, weights: LayerWeights) -> None:
        self.cell, self.reverse = weights.cell, weights.reverse
        self.operand = Operand(weights.w_hh)
        self.project = None if weights.w_hr is None else Operand(weights.w_hr)
        self.new_bias = _vector(weights.new_bias, weights.hidden_size)

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        streams, outputs = state[0].shape
        threads = _threads(self.operand.work(len(batch_sizes)) * streams)
        y_NP = np.empty((u_NG.shape[0], outputs), np.float32)
        project, matrix = self.project, self.operand
        with announced("recur", threads > 1, matrix.kind, project and project.kind, streams > 1):
            code = _compiled_code("loops")
            forms = [one.form(streams) for one in (matrix, project) if one is not None]
            tile = max(form.tile for form in forms)  # a multiple of the others
            chunk = chunk_size(len(self.new_bias), streams, threads, max(form.lanes for form in forms))
            c_HS = np.zeros((len(self.new_bias) if self.cell == "lstm" else 0, -(-streams // tile) * tile), np.float32)
            if self.cell == "lstm":
                c_HS[:, :streams] = _array(state[1]).T
            run = code.recur_serial if threads == 1 else code.recur_parallel
            h_PS = run(
                CELLS.index(self.cell),
                chunk,
                matrix.numbers(streams),
                NONE if project is None else project.numbers(streams),
                _array(u_NG),
                batch_sizes.numpy(),
                self.reverse,
                tile,
                self.new_bias,
                np.ascontiguousarray(_array(state[0]).T),
                c_HS,
                matrix.bounds(threads, chunk, streams),
                NONE if project is None else project.bounds(threads, chunk, streams),
                y_NP,
            )
        parts = (h_PS, c_HS) if self.cell == "lstm" else (h_PS,)
        return torch.from_numpy(y_NP), tuple(torch.from_numpy(part[:, :streams].T.copy()) for part in parts)


@dataclass(frozen=True)
class _Layer(ComposedLayer):
    product: _Product
    recurrence: _Recurrence

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        if x_NI.shape[0] != 1 or not self.can_step or _threads(self.work(1)) > 1:
            return super().run(x_NI, batch_sizes, state)
        return self._alone.run(x_NI, batch_sizes, state)

    @property
    def can_step(self) -> bool:
        """Whether the compiled calls of one stream can run it."""
        return self.recurrence.project is None and self.recurrence.new_bias.size > 0

    def work(self, steps: int) -> int:
        """Of its larger matrix."""
        return max(self.product.operand.work(steps), self.recurrence.operand.work(steps))

    @cached_property
    def _alone(self) -> _Stack:
        return _Stack((self,))


class _Stack(Layer):
    """All layers of one stream, in one compiled call on one thread."""

    def __init__(self, layers: tuple[_Layer, ...]) -> None:
        self.layers, first = layers, layers[0]
        self.lstm, self.units = first.recurrence.cell == "lstm", len(first.recurrence.new_bias)
        self.inputs = first.product.operand.matrix.shape[1]
        self.work = {alone: max(layer.work(1 if alone else 2) for layer in layers) for alone in (False, True)}
        self._plans: dict[int, Plan] = {}

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """Of a sequence [T, I] and states [L, 1, H]."""
        steps = x_NI.shape[0]
        if not steps or _threads(self.work[steps == 1]) > 1:
            return self._one_after_the_other(x_NI, batch_sizes, state)
        return self._shaped(x_NI, steps, (steps, self.units), state)

    def run_one(self, x: Tensor, steps: int, state: State) -> tuple[Tensor, State]:
        """Of one stream, however it is shaped."""
        if _threads(self.work[steps == 1]) > 1:
            return super().run_one(x, steps, state)
        return self._shaped(x, steps, (x.shape[0], x.shape[1], self.units), state)

    def _shaped(self, x: Tensor, steps: int, shape: tuple[int, ...], state: State) -> tuple[Tensor, State]:
        x, h0 = _plain(x), _plain(state[0])
        rows = 1 if steps == 1 else min(ROWS, -(-steps // 4) * 4)
        call, at, _ = self._plans.get(rows) or self.plan(rows)
        y, h = x.new_empty(shape), torch.empty_like(h0)
        c0, c = (_plain(state[1]), torch.empty_like(h0)) if self.lstm else (h0, h)
        ends = y.data_ptr(), h.data_ptr(), c.data_ptr()
        if call(numbers(at, steps, x.data_ptr(), h0.data_ptr(), c0.data_ptr(), *ends)):
            raise MemoryError(f"{steps} steps of {len(self.layers)} layers need more memory than there is")
        return y, (h, c) if self.lstm else (h,)

    def _one_after_the_other(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        y, ends = x_NI, []
        for index, layer in enumerate(self.layers):
            y, end = layer.run(y, batch_sizes, tuple(part[index] for part in state))
            ends.append(end)
        return y, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def plan(self, rows: int) -> Plan:
        """The compiled call for products of so many rows, and the numbers that it takes; compiled where it was not."""
        recurrence = self.layers[0].recurrence
        gates = self.layers[0].product.operand.matrix.gates
        plan = [CELLS.index(recurrence.cell), len(self.layers), self.units, gates, self.inputs]
        for layer in self.layers:
            operands = layer.product.operand, layer.recurrence.operand
            forms = operands[0].form(rows), operands[1].form(1)
            for operand, form, streams in zip(operands, forms, (min(rows, ROWS), 1), strict=True):
                chunk = chunk_size(operand.matrix.units, streams, 1, form.lanes)
                plan += [chunk, -(-operand.matrix.units // chunk)]
            plan += [forms[0].tile, layer.product.bias.ctypes.data, layer.recurrence.new_bias.ctypes.data]
            plan += [*operands[0].numbers(rows), *operands[1].numbers(1)]
        with announced("stack"):
            call, array = code_of("run_stack"), np.array(plan, np.int64)
        found = self._plans[rows] = call, array.ctypes.data, array
        return found


class _NetworkStep:
    """A step of a whole network: the token's vector, all layers, the decoder."""

    def __init__(self, table: Tensor | None, stack: _Stack, decoder: _Product | None) -> None:
        self.stack, self.decoder, self.lstm = stack, decoder, stack.lstm
        matrix = None if decoder is None else decoder.operand.matrix
        self.work = max(stack.work[True], 0 if decoder is None else decoder.operand.work(1))
        self.outputs = stack.units if matrix is None else matrix.shape[0]
        self.state = (len(stack.layers), 1, stack.units)
        self.kind = torch.float32 if table is None else torch.int64
        self.input: tuple[int, ...] = (1, stack.inputs) if table is None else (1,)
        self.table = table  # held for its address
        self.at, self.vocabulary = (0, 0) if table is None else (table.data_ptr(), len(table))
        plans = [stack.plan(1)[2]] + ([] if decoder is None else [decoder.plan(1)[2]])
        self.plan = np.concatenate(plans)
        self.same = self.plan.ctypes.data, len(plans[0]), int(decoder is not None), self.at, self.vocabulary
        with announced("network step"):
            self.run = code_of("run_step")

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """None of what is no plain memory of the right size, and where several threads pay."""
        h0, c0 = state[0], state[-1]
        if x.dtype != self.kind or x.shape != self.input or not x.is_contiguous() or _threads(self.work) > 1:
            return None
        for part in state:
            if part.dtype != torch.float32 or part.shape != self.state or not part.is_contiguous():
                return None
        y, h = h0.new_empty(1, self.outputs), torch.empty_like(h0)
        c = torch.empty_like(h0) if self.lstm else h
        addresses = (x.data_ptr(), h0.data_ptr(), c0.data_ptr(), y.data_ptr(), h.data_ptr(), c.data_ptr())
        if self.run(numbers(*self.same, *addresses)):
            if 0 <= int(x.view(-1)[0]) < self.vocabulary or not self.vocabulary:
                raise MemoryError("a step needs more memory than there is")
            raise IndexError(f"a token must lie between 0 and {self.vocabulary - 1}, not be {int(x)}")
        return y, (h, c) if self.lstm else (h,)


def _no_memory(rows: int, outputs: int) -> str:
    return f"a product of {rows} rows with {outputs} outputs needs more memory than there is"


def _plain(x: Tensor) -> Tensor:
    """As addresses are taken of it: fp32, one number after the other, none of which stands for its negative."""
    plain = x.dtype == torch.float32 and x.is_contiguous() and not x.is_neg()
    return x if plain else x.float().contiguous().resolve_neg()


def _array(x: Tensor) -> Array:
    """As the compiled loops take it."""
    x = x.detach() if x.requires_grad else x
    array: Array = (x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()).numpy()
    return array


def _threads(work: int) -> int:
    """As many as torch uses, for work that is worth starting them; numba cannot have more than at its start."""
    if work < WORTH_THREADS:
        return 1
    threads = torch.get_num_threads()
    threads = 1 if threads == 1 else min(threads, _most_threads())
    if threads > 1:
        import numba

        numba.set_num_threads(threads)
    return threads


@lru_cache
def _most_threads() -> int:
    """What numba can have: one without OpenMP, because its own pool takes no calls from two threads at once."""
    import numba

    if importlib.util.find_spec("numba.np.ufunc.omppool") is None:
        return 1
    try:
        importlib.import_module("numba.np.ufunc.omppool")
    except ImportError:
        return 1
    numba.config.THREADING_LAYER = "omp"  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    numba.set_num_threads(1)  # starts the pool, which sets OpenMP's number of threads to all there are, torch's too
    torch.set_num_threads(before)
    return int(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]


@lru_cache
def _compiled_code(name: str) -> ModuleType:
    """A module of compiled loops."""
    return where_it_can_be_kept(lambda: importlib.import_module(f"srnn.kernels.cpu.{name}"))
