"""A stream of single steps: two layers of GRU 1024, 90 % sparse in 16x1 blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.inference.sparsify import sparsify
from srnn.sparse import Values

_SIZE, _LAYERS = 1024, 2
_TURN, _WARM = 100, 10


@dataclass(frozen=True)
class StreamRow:
    """Microseconds of one network's single steps."""

    network: str
    threads: int
    steps: int
    p50_us: float
    p99_us: float
    mean_us: float


def measure_stream(steps: int, threads: Sequence[int]) -> Iterator[StreamRow]:
    """A row a network, for each number of threads.

    Args:
        steps: to time of each.
        threads: of the CPU.
    """
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            models, x_TBI = stream_networks()
            for name, seconds in step_times(models, x_TBI, steps).items():
                p50, p99, mean = 1e6 * np.array([*np.percentile(seconds, [50, 99]), np.mean(seconds)])
                yield StreamRow(name, count, steps, *(round(float(us), 1) for us in (p50, p99, mean)))
    finally:
        torch.set_num_threads(before)


def step_times(models: Mapping[str, Any], x_TBI: Tensor, steps: int) -> dict[str, list[float]]:
    """Seconds of single steps, state carried along.

    Networks take turns of ``_TURN`` steps: within a turn a network finds its weights where its last step left them, as
    it does where it runs alone. The first steps of a turn are not counted.

    Args:
        models: name -> module with ``step(x_BI, state)``.
        x_TBI: inputs, gone through again and again.
        steps: to time.

    Returns:
        name -> seconds of each step.
    """
    states: dict[str, Any] = dict.fromkeys(models)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for first in range(0, steps, _TURN):
            for name, model in models.items():
                for t in range(first - _WARM, min(first + _TURN, steps)):
                    began = time.perf_counter()
                    _, states[name] = model.step(x_TBI[t % len(x_TBI)], states[name])
                    if t >= first:
                        times[name].append(time.perf_counter() - began)
    return times


class _TorchSteps:
    """``nn.GRU``, a step a call."""

    def __init__(self, module: nn.GRU) -> None:
        self.module = module

    def step(self, x_BI: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of B streams."""
        y_TBH, state = self.module(x_BI[None], state)
        return y_TBH[0], state


def stream_networks() -> tuple[dict[str, Any], Tensor]:
    """The stream_networks by name, checked against each other, and inputs [T, 1, I]."""
    generator = torch.Generator().manual_seed(0)
    gru = nn.GRU(_SIZE, _SIZE, _LAYERS).eval()
    with torch.no_grad():
        for weight in gru.parameters():
            if weight.ndim == 2:
                weight.copy_(pruned(weight.shape[0], weight.shape[1], 3, Format(0.9, "16x1", "fp32"), generator))
    gru.requires_grad_(False)
    x_TBI = torch.randn(256, 1, _SIZE, generator=generator)
    models: dict[str, Any] = {"nn.GRU": _TorchSteps(gru), "best dense": sparsify(gru, kernel="dense")}
    formats: tuple[Values, ...] = ("fp32", "fp16", "int8")
    for values in formats:
        models[f"cpu 16x1 {values}"] = sparsify(gru, "16x1", values, "cpu")
    with torch.inference_mode():
        truth = gru(x_TBI[:8])[0]
        for name, model in models.items():
            state, steps = None, []
            for x_BI in x_TBI[:8]:
                y_BH, state = model.step(x_BI, state)
                steps.append(y_BH)
            error = float((torch.stack(steps) - truth).norm() / truth.norm())
            if not error < (0.05 if "int8" in name else 1e-2 if "fp16" in name else 1e-4):
                raise RuntimeError(f"{name} computes wrong: its error is {error:.1e}")
    return models, x_TBI
