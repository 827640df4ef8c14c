"""A matrix made ready for the compiled loops, in the form that is fastest on this processor."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from srnn.kernels.cpu import element_layouts
from srnn.kernels.cpu.compiled import address_of, processor_features
from srnn.kernels.cpu.shapes import ROWS, ROWS_OF_DENSE, TILES, Array, padded_width
from srnn.kernels.remembering import busy, recall, remember
from srnn.kernels.timing import hardware
from srnn.sparse import SparseMatrix

_DOT = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 7)
_log = logging.getLogger("srnn.kernels")

# What forms need of a processor beside its own.
NEEDS = {"rows": (), "windows": ("avx512f",), "gathers": ("avx2",), "dense": ()}
# Numbers of a matrix, zeros included, up to which the form that stores them is tried: 1 MB, half of a second cache.
SMALL = 1 << 18
_TILE = 4  # streams that share a slot of a window
_ROUNDS, _REPEATS = 5, 3
_SECONDS = 0.02  # after which no further round is begun

_fastest: dict[tuple[object, ...], str] = {}  # what was measured or remembered in this process
_measuring = threading.Lock()


@dataclass(frozen=True)
class Form:
    """A matrix as one product takes it.

    Attributes:
        name: ``rows``, as it is stored; ``windows``, ``gathers`` or ``dense``, rows side by side.
        tile: streams the product takes at a time.
        lanes: rows of a row group.
        groups: row groups of a gate.
        width: floats a stream of x takes; 0 where x is [columns, streams].
        parts: values, columns, row pointers, scales, order and bases, None for what it has not.
        work: entries of each row group of all gates.
        dot: address of the compiled product.
    """

    name: str
    tile: int
    lanes: int
    groups: int
    width: int
    parts: tuple[Tensor | None, ...]
    work: Array
    dot: int

    @property
    def numbers(self) -> Array:
        """As the compiled loops take it."""
        addresses = [0 if part is None else part.data_ptr() for part in self.parts]
        return np.array([self.dot, *addresses[:4], self.lanes, self.groups, self.width, *addresses[4:]], np.int64)


class Operand:
    """A matrix as the compiled loops take it.

    Args:
        matrix: whose memory is used as it is, or laid out anew where that is faster.
        form: the name of one, in place of the fastest; it has to be able to run.
    """

    def __init__(self, matrix: SparseMatrix, form: str | None = None) -> None:
        self.matrix, self.name, self.entries = matrix, form, matrix.entries
        self.kind = (matrix.height, matrix.values_name, matrix.columns.dtype == torch.int32)
        self.made = lru_cache(self._made)
        self.numbers = lru_cache(self._numbers)
        self.bounds = lru_cache(self._bounds)
        self._several = lru_cache(self._form)

    def work(self, steps: int) -> int:
        """What says whether several threads pay: entries.

        A single step starts threads for each product, so that blocks, which take a third of the time, have to be more:
        two layers of GRU 1024 in 16 x 1 blocks took 381 us a step on one thread, 431 on two.
        """
        return self.entries // 5 if steps == 1 and self.matrix.height > 1 else self.entries

    def form(self, streams: int) -> Form:
        """The form for so many streams; measured at the first call with about as many."""
        return self._several(1 if streams <= 1 else min(ROWS, -(-streams // _TILE) * _TILE))

    def _form(self, streams: int) -> Form:
        with torch.device("cpu"):  # whatever device torch makes tensors on by default
            return self._chosen(streams)

    def _chosen(self, streams: int) -> Form:
        tile = TILES[self.matrix.height] if streams > 1 else 1
        if self.name is not None:
            return self.made(self.name, tile if self.name == "rows" else min(streams, _TILE))
        able = [(name, tile if name == "rows" else min(streams, _TILE)) for name in self._able(streams)]
        if len(able) == 1:
            return self.made(*able[0])
        key = (*self.kind, self.matrix.shape, float(f"{self.matrix.blocks:.1e}"), streams)
        with _measuring:
            if key not in _fastest:
                _fastest[key] = self._fastest_of(able, streams, str(key))
            chosen = _fastest[key]
        return self.made(*next(one for one in able if one[0] == chosen))

    def _fastest_of(self, able: list[tuple[str, int]], streams: int, key: str) -> str:
        """Measured, or remembered of this machine."""
        where = f"{hardware(torch.device('cpu'))}; forms {' '.join(name for name, _ in able)}"
        known = (recall(where, key) or {}).get("form")
        if known in dict(able):
            return str(known)
        seconds = _timed({one: self.made(*one) for one in able}, self.matrix, streams)
        self.made.cache_clear()  # forms that lost
        found = min(seconds, key=seconds.__getitem__)[0]
        _log.debug("%s: %s", key, ", ".join(f"{name} {1e6 * s:.1f} us" for (name, _), s in seconds.items()))
        if not busy():
            remember(where, key, {"form": found})
        return found

    def _able(self, streams: int) -> list[str]:
        """Forms that can run; blocks are side by side as they are, and gathers are for one stream."""
        if not self.matrix.blocks:
            return ["rows"]
        rows, columns = self.matrix.shape
        dense = ["dense"] if rows * columns <= SMALL and "dense" in able_forms() else []
        if self.matrix.height > 1:
            return ["rows", *dense]
        if streams == 1:
            return [*(form for form in able_forms() if form != "dense"), *dense]
        # Not measured: with 16 streams bare products of rows can be faster than windows from 90 % on, but what they
        # write lies stream by stream, and taking it apart costs more: GRU 256 at 95 % took 1.3 times as long in all.
        return ["windows" if "windows" in able_forms() else "rows", *dense]

    def _made(self, name: str, tile: int) -> Form:
        matrix, kind = self.matrix, (ROWS_OF_DENSE, "fp32", False) if name == "dense" else self.kind
        dot = address_of("dot", name, *kind, tile)
        if name == "rows":
            parts = {part: tensor.contiguous() for part, tensor in matrix.parts.items()}
            work = parts["row_pointers"].diff().numpy()
            several = (parts["values"], parts["columns"], parts["row_pointers"], parts.get("scales"), None, None)
            return Form(name, tile, matrix.height, matrix.groups // matrix.gates, 0, several, work, dot)
        layout = getattr(element_layouts, name)(matrix)
        several = (layout.values, layout.columns, layout.turns, layout.scales, layout.order, layout.bases)
        groups = -(-matrix.units // layout.lanes)
        return Form(name, tile, layout.lanes, groups, padded_width(matrix.shape[1]), several, layout.work, dot)

    def _numbers(self, streams: int) -> Array:
        return self.form(streams).numbers

    def _bounds(self, parts: int, chunk: int, streams: int) -> Array:
        """Chunks of units for each thread, so that all get about the same number of blocks."""
        matrix, form = self.matrix, self.form(streams)
        chunks = -(-matrix.units // chunk)
        per_group = form.work.reshape(matrix.gates, -1).sum(axis=0)
        starts = np.arange(chunks) * (chunk // form.lanes)
        # The gates' arithmetic counts too: about as much as a block a row.
        cost = np.add.reduceat(per_group, starts) + chunk if chunks else np.zeros(0)
        shares = np.concatenate([[0], np.cumsum(cost)])
        wanted = np.linspace(0, shares[-1], parts + 1)
        return np.maximum.accumulate(np.abs(shares[None] - wanted[:, None]).argmin(axis=1)).astype(np.int64)


@cache
def able_forms() -> tuple[str, ...]:
    """Names of the forms that the processor, and numba's settings, allow.

    ``NUMBA_CPU_FEATURES=-avx512f`` forbids what needs AVX-512, ``-avx512f,-avx2`` also gathers.
    """
    features = processor_features()
    return tuple(name for name, needed in NEEDS.items() if all(features.get(one, False) for one in needed))


def _timed(forms: dict[tuple[str, int], Form], matrix: SparseMatrix, streams: int) -> dict[tuple[str, int], float]:
    """The shortest time of each in turns, several times in a row, so that its matrix is in the cache."""
    x_IS = torch.randn(matrix.shape[1], streams, dtype=torch.float32)
    calls = {key: product_call(form, matrix, x_IS)[0] for key, form in forms.items()}
    best = dict.fromkeys(forms, float("inf"))
    for call in calls.values():
        call()
    began = time.perf_counter()
    for _ in range(_ROUNDS):
        for key, call in calls.items():
            for _ in range(_REPEATS):
                start = time.perf_counter()
                call()
                best[key] = min(best[key], time.perf_counter() - start)
        if time.perf_counter() - began > _SECONDS:
            break
    return best


def product_call(
    form: Form, matrix: SparseMatrix, x_IS: Tensor, place: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> tuple[Callable[[], object], Tensor]:
    """A call of the bare product with all rows, and the outputs [gates, groups, streams, lanes] that it writes.

    Args:
        form: of the matrix.
        matrix: what is multiplied.
        x_IS: [columns, streams]; streams are filled up to the form's tile.
        place: where x and the outputs are to lie.
    """
    streams = -(-x_IS.shape[1] // form.tile) * form.tile
    wide = torch.zeros(matrix.shape[1], streams, dtype=torch.float32)
    wide[:, : x_IS.shape[1]] = x_IS
    if form.width:
        wide = torch.nn.functional.pad(wide.T, (0, form.width - matrix.shape[1]))
    x, numbers = place(wide.contiguous()), form.numbers
    shape = (matrix.gates, form.groups, streams, form.lanes)
    y = place(torch.full(shape, torch.nan, dtype=torch.float32)).view(shape)
    careful = int(not bool(x.isfinite().all()))
    arguments = (numbers.ctypes.data, 0, matrix.gates * form.groups, x.data_ptr(), streams, careful, y.data_ptr())

    dot = _DOT(form.dot)

    def run(_kept: object = (x, numbers, y, form)) -> None:
        dot(*arguments)

    return run, y
