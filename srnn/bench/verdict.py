"""One line at the end of a bench: what to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import geometric_mean

from srnn.bench.gpu_network import NetworkRow
from srnn.bench.layers import LayerRow
from srnn.bench.onnx_baseline import ONNX_BASELINES
from srnn.bench.packed_network import PackedRow
from srnn.bench.small_networks import SmallNetworkRow
from srnn.bench.stream import StreamRow
from srnn.terminal import plural


def layers_verdict(rows: Sequence[LayerRow]) -> str | None:
    """The sparse backend and format that are fastest over all cases, on the geometric mean; None if none was timed.

    Only those count that ran in as many cases as any other.
    """
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row.structure != "dense" and row.over_dense is not None:
            ratios.setdefault(f"{row.backend}, {row.structure} {row.values}", []).append(row.over_dense)
    if not ratios:
        return None
    most = max(map(len, ratios.values()))
    best, found = max(
        ((name, several) for name, several in ratios.items() if len(several) == most),
        key=lambda named: geometric_mean(named[1]),
    )
    mean = geometric_mean(found)
    spread = f", on the mean of {plural(most, 'case')}: {min(found):.1f}x to {max(found):.1f}x" if most > 1 else ""
    if mean > 1:
        return f"Use {best}: {mean:.1f}x the best dense{spread}."
    return f"Stay dense: the best sparse, {best}, is {mean:.2f}x as fast{spread}."


def packed_verdict(rows: Sequence[PackedRow]) -> str:
    """The kernel of a network for sequences and for single steps, where one is faster than all dense ones."""
    words = []
    in_onnx = "stay dense, as an ONNX file in onnxruntime (srnn export format=onnx)"
    dense = {"torch": "stay dense", "dense": "stay dense", "onnxruntime": in_onnx}
    for what in dict.fromkeys(row.what for row in rows):
        # In onnxruntime's int8 it is another network.
        alike = (row for row in rows if row.backend in dense or row.backend not in ONNX_BASELINES)
        best = min((row for row in alike if row.what == what), key=lambda row: row.seconds)
        use = dense.get(best.backend, f"kernel={best.backend}, {best.over_dense:.1f}x the best dense")
        words.append(f"for {'sequences' if what == 'sequence' else 'single steps'} {use}")
    return f"Use: {'; '.join(words)}."


def stream_verdict(rows: Sequence[StreamRow]) -> str | None:
    """The sparse network of the shortest step, at the median, over the best dense one."""
    named = [(f"{row.network} with {plural(row.threads, 'thread')}", row.p50_us) for row in rows]
    return _over_dense(named, lambda name: name.startswith("cpu "))


def small_verdict(rows: Sequence[SmallNetworkRow]) -> str | None:
    """How ``auto`` compares with the fastest fp32 dense, over all networks and lengths."""
    if not rows:
        return None
    told = []
    compared = {
        "torch and oneDNN": [row.auto_over_torch for row in rows],
        "the best dense, onnxruntime too": [row.auto_over_dense for row in rows],
    }
    for what, ratios in compared.items():
        slower = sum(ratio < 1 / 1.05 for ratio in ratios)
        spread = f"{geometric_mean(ratios):.2f}x on the mean, {min(ratios):.2f}x to {max(ratios):.2f}x"
        told.append(f"over {what}: {spread}, slower by more than 5 % in {slower} of {len(ratios)}")
    return f"auto {'; '.join(told)}."


def network_verdict(rows: Sequence[NetworkRow]) -> str | None:
    """The sparse network of the shortest sequence, over the best dense one."""
    named = [(f"{row.network}, {row.what}", row.median_us) for row in rows if row.what.startswith("sequence")]
    return _over_dense(named, lambda name: not name.startswith("dense"))


def _over_dense(named: Sequence[tuple[str, float]], is_sparse: Callable[[str], bool]) -> str | None:
    dense = min((us for name, us in named if not is_sparse(name)), default=None)
    name, us = min(((name, us) for name, us in named if is_sparse(name)), key=lambda pair: pair[1], default=("", 0.0))
    if dense is None or not name:
        return None
    return f"Use {name}: {dense / us:.1f}x the best dense." if us < dense else "Stay dense: no sparse one is faster."
