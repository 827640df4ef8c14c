"""Timing the pruner: an update of the masks, the masking between updates, and the memory an update takes beside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from srnn.bench.cases import Shape
from srnn.pruning import Pruner, RunLength

# Each takes another way through the code: thresholds, ranks, blocks, N:M, growing by gradients.
METHODS: dict[str, dict[str, Any]] = {
    "gradual": {},
    "gradual 16x1": {"structure": "16x1"},
    "cubic": {},
    "cubic 16x1": {"structure": "16x1"},
    "cubic 2:4": {"structure": "2:4", "sparsity": 0.5},
    "rigl": {},
}
REPEATS = 5


@dataclass(frozen=True)
class PruningRow:
    """What pruning one layer costs, with Adam's state.

    Attributes:
        shape: the layer.
        method: and its structure.
        weights: that are pruned.
        update_ms: a step that finds new masks, the median.
        step_ms: a step that only masks, the median.
        extra_bytes: the most that was allocated in an update beside what there was; None on a CPU.
        device: name and torch's version.
    """

    shape: str
    method: str
    weights: int
    update_ms: float
    step_ms: float
    extra_bytes: int | None
    device: str


def rows(shapes: tuple[Shape, ...], device: torch.device) -> Iterator[PruningRow]:
    """A row for each layer and method."""
    for shape in shapes:
        for name, options in METHODS.items():
            yield _row(shape, name, options, device)


def _row(shape: Shape, name: str, options: dict[str, Any], device: torch.device) -> PruningRow:
    torch.manual_seed(0)
    model = _layer(shape).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    pruner = Pruner(model, name.split()[0], RunLength(1000, 50), optimizer, **options)
    updates = list(pruner.method.updates)
    middle = updates[len(updates) // 2]
    # The first update finds memory and libraries as they are afterwards.
    pruner.itr = updates[0] - 1
    pruner.step()
    update = [_milliseconds(pruner, middle - 1, device) for _ in range(REPEATS)]
    step = [_milliseconds(pruner, pruner.run.total_steps - 1, device) for _ in range(REPEATS)]
    extra = _extra_bytes(lambda: _milliseconds(pruner, middle - 1, device)) if device.type == "cuda" else None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    weights = sum(part.size for part in pruner.parts)
    return PruningRow(
        str(shape), name, weights, median(update), median(step), extra, f"{where}, torch {torch.__version__}"
    )


def _layer(shape: Shape) -> nn.Module:
    if shape.kind == "product":
        return nn.Linear(shape.inputs, shape.outputs, bias=False)
    made: nn.Module = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[shape.kind](shape.inputs, shape.outputs)
    return made


def _milliseconds(pruner: Pruner, before: int, device: torch.device) -> float:
    """Of the step after iteration ``before``."""
    pruner.itr = before
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    pruner.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def _extra_bytes(action: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before
