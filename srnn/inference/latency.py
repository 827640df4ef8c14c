"""Timing whole networks: sequences, and one step after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srnn.kernels.timing import Call, interleaved

CPU = torch.device("cpu")
STEPS = 100
TURN, WARM = 100, 10


def latencies(models: Mapping[str, Any], inputs_T: Tensor, seconds: float = 2.0) -> dict[str, dict[str, float]]:
    """Median seconds of one stream: of a sequence, and of a step, for networks with ``step``.

    Args:
        models: name -> network of ``srnn.models``, or one with the same call.
        inputs_T: what they read, tokens or x_TI; ``STEPS`` of it are used.
        seconds: to spend on each of the two.

    Returns:
        ``{"sequence": {name: ...}, "step": {name: ...}}``; ``step`` only if all can.
    """
    sequence_BT = inputs_T[None, :STEPS]
    calls: dict[str, dict[str, Call]] = {"sequence": {name: partial(m, sequence_BT) for name, m in models.items()}}
    if all(hasattr(m, "step") and getattr(m, "directions", 1) == 1 for m in models.values()):
        with torch.inference_mode():
            states = {name: m(sequence_BT)[1] for name, m in models.items()}
        calls["step"] = {name: partial(m.step, inputs_T[:1], states[name]) for name, m in models.items()}
    return {
        kind: {name: median(t) for name, t in interleaved(several, CPU, 200, seconds).items()}
        for kind, several in calls.items()
    }


def stream(models: Mapping[str, Any], x_TBI: Tensor, steps: int) -> dict[str, dict[str, float]]:
    """Percentiles of single steps, state carried along.

    Networks take turns of ``TURN`` steps: within a turn a network finds its weights where its last step left them, as
    it does where it runs alone. The first steps of a turn are not counted.

    Args:
        models: name -> module with ``step(x_BI, state)``.
        x_TBI: inputs, gone through again and again.
        steps: to time.

    Returns:
        name -> ``p50_us``, ``p99_us``, ``mean_us``.
    """
    states: dict[str, Any] = dict.fromkeys(models)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for first in range(0, steps, TURN):
            for name, model in models.items():
                for t in range(first - WARM, min(first + TURN, steps)):
                    began = time.perf_counter()
                    _, states[name] = model.step(x_TBI[t % len(x_TBI)], states[name])
                    if t >= first:
                        times[name].append(time.perf_counter() - began)
    percentiles = {name: np.percentile(many, [50, 99]) * 1e6 for name, many in times.items()}
    return {
        name: {"p50_us": float(p[0]), "p99_us": float(p[1]), "mean_us": 1e6 * float(np.mean(times[name]))}
        for name, p in percentiles.items()
    }
