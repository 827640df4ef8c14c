"""``kernel=cpu``: compiled kernels for element and N x 1 matrices."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srnn.cells import CELLS
from srnn.kernels.contract import Kernel, LayerWeights, Product, Recurrence, State
from srnn.kernels.cpu.shapes import ROWS, TILES, chunk_size
from srnn.registry import register
from srnn.sparse import SparseMatrix

Array = np.ndarray[Any, Any]

# Entries times streams of a step from which on a second thread pays: starting it costs 2 to 10 us here. A GRU of 512
# units at 90 % (79,000) loses by it, one of 1024 (315,000) wins.
WORTH_THREADS = 200_000
MESSAGE = "srnn: making the CPU kernels ready; once on a machine they are compiled, which takes some seconds."
NONE = np.zeros(7, np.int64)  # in place of a projection


@register.kernel("cpu")
class Cpu(Kernel):
    """One compiled loop over time for element and N x 1 matrices, on as many threads as torch uses.

    Needs numba, which is imported and, the first time on a machine, compiles when a layer is first run.
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


def _vector(bias: Tensor | None, size: int) -> Array:
    return np.zeros(size, np.float32) if bias is None else _array(bias).copy()


class _Operand:
    """A matrix as the compiled loops take it."""

    def __init__(self, matrix: SparseMatrix) -> None:
        self.matrix = matrix
        self.parts = {name: part.contiguous() for name, part in matrix.parts.items()}  # kept alive for the addresses
        wide = matrix.columns.dtype == torch.int32
        self.kind = (matrix.height, matrix.values_name, wide)
        self.numbers = lru_cache(self._numbers)
        self.bounds = lru_cache(self._bounds)

    def tile(self, streams: int) -> int:
        """Streams the product takes at a time."""
        return 1 if streams == 1 else TILES[self.matrix.height]

    def _numbers(self, tile: int) -> Array:
        """The seven numbers that ``loops`` speaks of."""
        from srnn.kernels.cpu.vector_products import dot_address

        names = ("values", "columns", "row_pointers", "scales")
        parts = [self.parts[name].data_ptr() if name in self.parts else 0 for name in names]
        groups = self.matrix.groups // self.matrix.gates
        return np.array([dot_address(*self.kind, tile), *parts, self.matrix.height, groups], np.int64)

    def _bounds(self, parts: int, chunk: int) -> Array:
        """Chunks of units for each thread, so that all get about the same number of blocks."""
        matrix = self.matrix
        chunks = -(-matrix.units // chunk)
        per_group = self.parts["row_pointers"].diff().numpy().reshape(matrix.gates, -1).sum(axis=0)
        starts = np.arange(chunks) * (chunk // matrix.height)
        # The gates' arithmetic counts too: about as much as a block a row.
        cost = np.add.reduceat(per_group, starts) + chunk if chunks else np.zeros(0)
        shares = np.concatenate([[0], np.cumsum(cost)])
        wanted = np.linspace(0, shares[-1], parts + 1)
        return np.maximum.accumulate(np.abs(shares[None] - wanted[:, None]).argmin(axis=1)).astype(np.int64)


class _Product:
    """``y_NO = x_NI W' + bias``."""

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None) -> None:
        self.operand, self.bias = _Operand(matrix), _vector(bias, matrix.shape[0])

    def __call__(self, x_NI: Tensor) -> Tensor:
        matrix, rows = self.operand.matrix, x_NI.shape[0]
        y_NO = np.empty((rows, matrix.shape[0]), np.float32)
        threads = _threads(matrix.entries * min(rows, ROWS))
        tile = self.operand.tile(rows)
        chunk = chunk_size(matrix.units, min(rows, ROWS), threads)
        with _announced("multiply", threads > 1, self.operand.kind, tile):
            loops = _loops()
            run = loops.multiply if threads == 1 else loops.multiply_parallel
            run(
                chunk,
                self.operand.numbers(tile),
                matrix.gates,
                _array(x_NI),
                tile,
                self.bias,
                self.operand.bounds(threads, chunk),
                y_NO,
            )
        return torch.from_numpy(y_NO)


class _Recurrence(Recurrence):
    """The loop over time."""

    def __init__(self, weights: LayerWeights) -> None:
        self.cell, self.reverse = weights.cell, weights.reverse
        self.operand = _Operand(weights.w_hh)
        self.project = None if weights.w_hr is None else _Operand(weights.w_hr)
        self.new_bias = _vector(weights.new_bias, weights.hidden_size)

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        streams, outputs = state[0].shape
        threads = _threads(self.operand.matrix.entries * streams)
        tile = self.operand.tile(streams)
        y_NP = np.empty((u_NG.shape[0], outputs), np.float32)
        c_HS = np.zeros((len(self.new_bias) if self.cell == "lstm" else 0, -(-streams // tile) * tile), np.float32)
        if self.cell == "lstm":
            c_HS[:, :streams] = _array(state[1]).T
        project, chunk = self.project, chunk_size(len(self.new_bias), streams, threads)
        with _announced("recur", threads > 1, self.operand.kind, project and project.kind, tile):
            loops = _loops()
            run = loops.recur if threads == 1 else loops.recur_parallel
            h_PS = run(
                CELLS.index(self.cell),
                chunk,
                self.operand.numbers(tile),
                NONE if project is None else project.numbers(tile),
                _array(u_NG),
                batch_sizes.numpy(),
                self.reverse,
                tile,
                self.new_bias,
                np.ascontiguousarray(_array(state[0]).T),
                c_HS,
                self.operand.bounds(threads, chunk),
                NONE if project is None else project.bounds(threads, chunk),
                y_NP,
            )
        parts = (h_PS, c_HS) if self.cell == "lstm" else (h_PS,)
        return torch.from_numpy(y_NP), tuple(torch.from_numpy(part[:, :streams].T.copy()) for part in parts)


def _array(x: Tensor) -> Array:
    """As the compiled loops take it."""
    x = x.detach() if x.requires_grad else x
    array: Array = (x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()).numpy()
    return array


def _threads(work: int) -> int:
    """As many as torch uses, for work that is worth starting them; numba cannot have more than at its start."""
    threads = torch.get_num_threads()
    if threads == 1 or work < WORTH_THREADS:
        return 1
    threads = min(threads, _most_threads())
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


class _Announced:
    """Says on standard error what a call does that takes over a second: the first one on a machine compiles."""

    def __init__(self, key: tuple[object, ...]) -> None:
        self.key = key
        self.timer = threading.Timer(1.0, _announce)
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *error: object) -> None:
        self.timer.cancel()
        _compiled.add(self.key)


@lru_cache  # once
def _announce() -> None:
    print(MESSAGE, file=sys.stderr, flush=True)


_compiled: set[tuple[object, ...]] = set()


def _announced(*key: object) -> AbstractContextManager[None]:
    """For the first call of a kind; nothing after it."""
    return nullcontext() if key in _compiled else _Announced(key)


@lru_cache
def _loops() -> ModuleType:
    """The compiled loops; where neither the package nor the home can be written, compiled in each process anew."""
    name = "srnn.kernels.cpu.loops"
    try:
        return importlib.import_module(name)
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    import numba

    folder = tempfile.mkdtemp(prefix="srnn-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    return importlib.import_module(name)
