"""Timing whole networks: sequences and single steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from srnn.kernels.timing import Call, interleaved

_CPU = torch.device("cpu")
STEPS = 100  # of a timed sequence


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
        kind: {name: median(t) for name, t in interleaved(several, _CPU, 200, seconds).items()}
        for kind, several in calls.items()
    }
