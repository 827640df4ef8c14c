"""Timing calls against each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Call = Callable[[], object]


def timed(call: Call, device: torch.device) -> float:
    """Seconds that a call takes, all of its work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def interleaved(calls: Mapping[str, Call], device: torch.device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time calls in turns, so that whatever else the machine does meets all of them.

    Args:
        calls: name -> what to time; each is called once before.
        device: whose work to wait for.
        rounds: at most so many.
        seconds: no further round is begun after so long; one always is.

    Returns:
        name -> seconds of each round.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for call in calls.values():
            call()
        began = time.perf_counter()
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(timed(call, device))
            if time.perf_counter() - began > seconds:
                break
    return times
