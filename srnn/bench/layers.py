"""Layers and products: outputs checked first, then dense and sparse timed in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from srnn.bench.cases import Case, Format, LayerPlan, Problem, dense_format
from srnn.bench.onnx_baseline import ONNX_BASELINES
from srnn.kernels.contract import Kernel
from srnn.kernels.dense import Int8, OneDnn, Torch
from srnn.kernels.timing import Call, graphed, hardware, interleaved, timed

_ROUNDS = 30
_REPEATS = 50  # of a product or a step, in one CUDA graph
_CHECKED_STEPS = 8  # of the sequence whose outputs are compared; more only adds up the same errors
# What outputs rounded to their dtype may differ by.
_ROUNDING = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
_BASELINES: dict[str, Kernel] = {"torch": Torch(), "onednn": OneDnn(), "int8": Int8(), **ONNX_BASELINES}


@dataclass(frozen=True)
class LayerRow:
    """One backend at one case. Times are microseconds of a whole call; speed-ups are over dense of the same run.

    Attributes:
        error: relative norm of the outputs from float64's with the same weights; if too large, there are no times.
        min_us: the shortest, which is what a busy machine leaves to compare.
        over_dense: how many times faster than the fastest dense in the inputs' dtype.
        over_int8: the same over the fastest dynamic int8; None where none can run.
    """

    device: str
    shape: str
    batch: int
    steps: int
    threads: int
    backend: str
    structure: str
    values: str
    sparsity: float
    error: float
    rounds: int
    median_us: float | None
    p20_us: float | None
    p80_us: float | None
    min_us: float | None
    over_dense: float | None
    over_int8: float | None


def measure_layers(
    plan: LayerPlan,
    kernels: Mapping[str, Kernel],
    device: torch.device,
    limit: float,
    report: Callable[[Case, list[LayerRow]], None],
) -> tuple[list[LayerRow], list[str]]:
    """Measure all of a plan that fits into the time.

    Args:
        plan: what.
        kernels: the sparse backends.
        device: where.
        limit: seconds; no case is begun after them, and each gets an equal share of what is left.
        report: called with the rows of each case.

    Returns:
        All rows, and what was left out and why.
    """
    rows: list[LayerRow] = []
    reasons_here = {name: kernel.supports(None, device, plan.dtype) for name, kernel in _BASELINES.items()}
    left_out = [f"{name}: {reason}" for name, reason in reasons_here.items() if reason is not None]
    cases, began, threads = list(plan.cases()), time.monotonic(), torch.get_num_threads()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # else dense fp32 layers on a GPU are not
    try:
        for index, case in enumerate(cases):
            left = limit - (time.monotonic() - began)
            if left <= 0:
                left_out += [f"{rest}: the time was over (--limit={limit:g})" for rest in cases[index:]]
                break
            torch.set_num_threads(case.threads)
            found, reasons = measure_case(
                case, plan.formats(), kernels, device, left / (len(cases) - index), plan.dtype
            )
            left_out += reasons
            rows += found
            report(case, found)
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32
    return rows, left_out


def measure_case(
    case: Case,
    formats: Sequence[Format],
    kernels: Mapping[str, Kernel],
    device: torch.device,
    seconds: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[LayerRow], list[str]]:
    """Measure one case with all formats, in turns; on a GPU each call also as a CUDA graph."""
    calls: dict[tuple[str, Format], Call] = {}
    errors: dict[tuple[str, Format], float] = {}
    left_out = []
    repeats = _REPEATS if case.steps == 1 else 1
    baseline = dense_format(dtype)
    baselines = {name: kernel for name, kernel in _BASELINES.items() if kernel.supports(None, device, dtype) is None}
    for format, several in ((baseline, baselines), *((f, kernels) for f in formats)):
        problem = Problem(case, format, device, dtype)
        steps = min(case.steps, _CHECKED_STEPS)
        truth = problem.truth(steps)
        for name, kernel in several.items():
            if name == "csr" and format.values != formats[0].values:
                continue  # it computes in fp32 whatever is stored
            reason = kernel.supports(problem.weights, device, problem.dtype, case.batch)
            if reason is not None:
                left_out.append(f"{case} {name}: {reason}")
                continue
            ready = problem.prepare(kernel)
            variants = {name: ready(steps)}
            if device.type == "cuda":
                try:
                    variants[f"{name}, graph"] = _graph_that_returns(ready(steps), device)
                except RuntimeError as error:
                    left_out.append(f"{case} {name}, graph: {str(error).splitlines()[0]}")
            for variant, call in variants.items():
                away = errors[variant, format] = relative_error(call(), truth)
                if not away <= max(kernel.tolerance, _ROUNDING[dtype]):
                    left_out.append(f"{case} {variant} {format}: WRONG, its error is {away:.1e}")
                elif variant == name:
                    calls[variant, format] = ready(case.steps)
                else:
                    calls[variant, format] = graphed(ready(case.steps), device, repeats)[0]
    keys = list(calls)
    times = interleaved({str(i): calls[key] for i, key in enumerate(keys)}, device, _ROUNDS, seconds)
    measured = {key: np.array(times[str(i)]) / (repeats if "graph" in key[0] else 1) for i, key in enumerate(keys)}
    return _rows(case, errors, measured, device, baseline), left_out


def _graph_that_returns(call: Call, device: torch.device) -> Call:
    """Its result poisoned before each replay."""
    replay, result = graphed(call, device)

    def run() -> object:
        with torch.inference_mode():
            result.fill_(torch.nan)
            replay()
            return result.clone()

    return run


def relative_error(outputs: Any, truth: torch.Tensor) -> float:
    """Norm of the difference over norm of the truth; NaN for outputs that hold one."""
    return float((outputs.double() - truth).norm() / truth.norm())


def _rows(
    case: Case, errors: dict[Any, float], times: dict[Any, Any], device: torch.device, baseline: Format
) -> list[LayerRow]:
    def median(key: Any) -> float | None:
        return float(np.median(times[key])) if key in times else None

    dense = {name: m for name, format in times if format == baseline and (m := median((name, baseline))) is not None}
    best = min((m for name, m in dense.items() if not _is_int8(name)), default=None)
    int8 = min((m for name, m in dense.items() if _is_int8(name)), default=None)
    rows = []
    for (name, format), error in errors.items():
        mine = median((name, format))
        low, high = np.percentile(times[name, format], [20, 80]) if mine else (None, None)
        rows.append(
            LayerRow(
                device=hardware(device),
                shape=str(case.shape),
                batch=case.batch,
                steps=case.steps,
                threads=case.threads,
                backend=name,
                structure="dense" if format is baseline else format.structure,
                values="int8" if format is baseline and _is_int8(name) else format.values,
                sparsity=format.sparsity,
                error=float(f"{error:.2g}"),
                rounds=len(times.get((name, format), ())),
                median_us=_micro(mine),
                p20_us=_micro(low),
                p80_us=_micro(high),
                min_us=_micro(min(times[name, format]) if mine else None),
                over_dense=_ratio(best, mine),
                over_int8=_ratio(int8, mine),
            )
        )
    return rows


def _is_int8(baseline: str) -> bool:
    """Of the name of a dense baseline, which may be followed by ``, graph``."""
    return baseline.partition(",")[0].endswith("int8")


def _micro(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * float(seconds), 2)


def _ratio(dense: float | None, mine: float | None) -> float | None:
    return None if dense is None or mine is None else round(dense / mine, 3)


def barrier_us(device: torch.device, rounds: int = 1000) -> float:
    """Microseconds that a barrier over a program a multiprocessor takes: a yardstick for a step of a recurrence."""
    from srnn.kernels.triton.barrier import barriers

    programs = torch.cuda.get_device_properties(device).multi_processor_count

    def call() -> Call:
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        return lambda: barriers[(programs,)](counter, rounds, num_warps=4, launch_cooperative_grid=True)

    with torch.cuda.device(device):
        call()()
        return min(1e6 * timed(call(), device) / rounds for _ in range(5))
