"""Timing calls against each other, and what machine and versions a time is good for."""

from __future__ import annotations

import functools
import os
import platform
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from srnn.cuda_graphs import Graph, recorded

Call = Callable[[], object]


def timed(call: Call, device: torch.device) -> float:
    """Seconds that a call takes, all of its work on the device included."""
    if device.type == "cuda":
        return _timed_on_gpu(call, device)
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _timed_on_gpu(call: Call, device: torch.device) -> float:
    """Between two events on the device's own clock; where the host is slower than the device, it is the host's time."""
    torch.cuda.synchronize(device)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    call()
    after.record()
    after.synchronize()
    return 1e-3 * before.elapsed_time(after)


def graphed(call: Call, device: torch.device, times: int = 1) -> tuple[Call, Any]:
    """The call as a CUDA graph's replay, and its result, which each replay writes anew.

    Args:
        call: what to record.
        device: of all it does.
        times: that a replay runs it, one after the other: what launching a graph takes, 20 us on an H100, then counts
            once for all of them.

    Raises:
        RuntimeError: what it does cannot be captured.
    """
    with torch.cuda.device(device), torch.inference_mode():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        graph = Graph()
        with recorded(graph, device):
            for _ in range(times):
                result = call()
    return partial(_replay, graph, call, result), result


def _replay(graph: torch.cuda.CUDAGraph, reads: Call, result: Any) -> Any:
    """A graph does not keep alive what it reads; the call that was captured does."""
    graph.replay()
    return result


def interleaved(calls: Mapping[str, Call], device: torch.device, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Time calls in turns, so that whatever else the machine does meets all of them.

    Each round has another order: what comes right after a call of the same code finds it in the processor's caches.

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
        order, shuffle = list(calls), random.Random(0).shuffle
        began = time.perf_counter()
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                times[name].append(timed(calls[name], device))
            if time.perf_counter() - began > seconds:
                break
    return times


@functools.cache
def hardware(device: torch.device) -> str:
    """What a measurement is good for: the processor and the versions of what runs on it."""
    versions = [f"torch {torch.__version__}"]
    for package in ("srnn", "numba", "triton"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return f"{processor(device)}; {'; '.join(versions)}"


@functools.cache
def processor(device: torch.device) -> str:
    """Its name, as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    forced = os.environ.get("NUMBA_CPU_FEATURES")
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}" + (f", numba {forced}" if forced else "")
