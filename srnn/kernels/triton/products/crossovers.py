"""Where one form of a product overtakes another on this card: what ``srnn doctor --tune`` measures.

A sparse product reads from caches what a dense one multiplies on tensor cores. Where they are equally fast depends on
the card, and a wrong answer costs up to the factor between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch

from srnn.kernels.remembering import remember
from srnn.kernels.timing import Call, graphed, hardware, interleaved
from srnn.kernels.triton.chip import chip_of
from srnn.kernels.triton.products.layout import TritonProduct
from srnn.kernels.triton.tuning import BOUNDS, KEPT, Tuning
from srnn.sparse import PackedStructure, SparseMatrix

_SHAPE = (7680, 2560)  # the input matrix of a GRU of 2,560 units
_DENSITY = 0.1
_DENSITIES = (0.1, 0.2)  # of blocks, where a product of many rows is about as fast as a dense one
_MANY = 4096
_FEW = (1, 2, 4, 8)
_HEIGHT = 32
_REPEATS = 10  # in a graph
_ROUNDS, _SECONDS = 21, 0.5

Timer = Callable[[Mapping[str, Call]], Mapping[str, float]]  # calls -> seconds of each


def tune(device: torch.device) -> dict[str, int]:
    """Measure the crossovers of a GPU and keep them in the cache folder, for this and later processes.

    Takes some 10 seconds and 0.5 GB. Networks that were made ready for their kernels before go on as they are.
    """
    found = crossovers(device, _timer(device))
    remember(hardware(device), KEPT, dict(found))
    chip_of.cache_clear()
    return found


def crossovers(device: torch.device, seconds_of: Timer, shape: tuple[int, int] = _SHAPE) -> dict[str, int]:
    """The numbers of ``tuning.BOUNDS`` on this device.

    Args:
        device: where the products run.
        seconds_of: times calls against each other.
        shape: of the matrix, rows and columns.
    """
    with torch.inference_mode():
        elements, blocks = (_random(shape, height, _DENSITY) for height in (1, _HEIGHT))
        found = {
            "few_rows": _rows_up_to(_of_few(elements, device), _dense(elements, device), seconds_of, shape[1], device),
            "few_rows_of_blocks": _rows_up_to(
                _of_few(blocks, device), _of_many(blocks, device), seconds_of, shape[1], device
            ),
            "dense_from": round(_HEIGHT / _density_of_equals(device, seconds_of, shape)),
        }
    return {name: max(BOUNDS[name][0], min(BOUNDS[name][1], value)) for name, value in found.items()}


def _rows_up_to(few: TritonProduct, other: TritonProduct, seconds_of: Timer, inputs: int, device: torch.device) -> int:
    """Rows up to which the form for a few of them is the faster."""
    most = 0
    for rows in _FEW:
        x_MI = torch.randn(rows, inputs, dtype=torch.float16, device=device)
        took = seconds_of({"few": partial(few, x_MI), "other": partial(other, x_MI)})
        if took["few"] > took["other"]:
            break
        most = rows
    return most


def _density_of_equals(device: torch.device, seconds_of: Timer, shape: tuple[int, int]) -> float:
    """At which a product of many rows takes as long in blocks as dense, of 16 bits; 1 if it always is the faster."""
    x_MI = torch.randn(_MANY, shape[1], dtype=torch.float16, device=device)
    least, more = (_random(shape, _HEIGHT, density) for density in _DENSITIES)
    products = {
        "least": _of_many(least, device), "more": _of_many(more, device), "dense": _dense(least, device),
    }  # fmt: skip
    took = seconds_of({name: partial(product, x_MI) for name, product in products.items()})
    slope = (took["more"] - took["least"]) / (_DENSITIES[1] - _DENSITIES[0])
    if slope <= 0:
        return 1.0 if took["more"] < took["dense"] else _DENSITIES[0]
    equal = _DENSITIES[0] + (took["dense"] - took["least"]) / slope
    return max(0.01, min(1.0, equal))


def _random(shape: tuple[int, int], height: int, density: float) -> SparseMatrix:
    """A matrix of random blocks."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(shape[0] // height, shape[1], generator=generator) < density
    dense_OI = kept.repeat_interleave(height, dim=0) * torch.randn(shape, generator=generator)
    structure: PackedStructure = "element" if height == 1 else "32x1"
    return SparseMatrix.from_dense(dense_OI, structure, "fp16", 3)


def _of_few(matrix: SparseMatrix, device: torch.device) -> TritonProduct:
    return _product(matrix, device, few_rows=_MANY, few_rows_of_blocks=_MANY)


def _of_many(matrix: SparseMatrix, device: torch.device) -> TritonProduct:
    return _product(matrix, device, few_rows=0, few_rows_of_blocks=0, dense_from=0)


def _dense(matrix: SparseMatrix, device: torch.device) -> TritonProduct:
    return _product(matrix, device, few_rows=0, few_rows_of_blocks=0, dense_from=1 << 30)


def _product(matrix: SparseMatrix, device: torch.device, **numbers: Any) -> TritonProduct:
    """In the form that these numbers of ``Tuning`` lead to."""
    return TritonProduct(matrix.to(device), None, torch.float16, "ieee", replace(Tuning(), **numbers))


def _timer(device: torch.device) -> Timer:
    def seconds_of(calls: Mapping[str, Call]) -> dict[str, float]:
        graphs = {name: graphed(call, device, _REPEATS)[0] for name, call in calls.items()}
        return {name: median(took) for name, took in interleaved(graphs, device, _ROUNDS, _SECONDS).items()}

    return seconds_of
