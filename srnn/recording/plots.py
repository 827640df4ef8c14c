"""The pictures of a run, from its own ``metrics.csv`` and weights."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from torch import Tensor

from srnn.cells import GATE_LETTERS
from srnn.files import write_atomically
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import GradualSchedule
from srnn.recording.summary import Points, read_metrics
from srnn.run_folder import RunFolder

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend that needs no display

LEGEND_ROWS = 12  # more would hide the curves


def plot_run(
    folder: RunFolder,
    phases: Mapping[str, int] | None,
    layers: list[dict[str, Any]],
    mask: tuple[str, Tensor] | None,
    loss: str = "loss",
) -> list[Path]:
    """Draw all plots of a run into its folder of plots.

    Args:
        folder: the run's folder, with ``metrics.csv``.
        phases: start_itr, ramp_itr (if any) and end_itr; None for a dense run.
        layers: rows with ``parameter`` and ``sparsity``.
        mask: name and weight of a recurrent matrix to show; None for a dense run.
        loss: what the loss is called, with its unit.

    Returns:
        The PNG files.
    """
    metrics = read_metrics(folder.metrics)
    target = folder.plots
    target.mkdir(exist_ok=True)
    drawn = [_loss_and_sparsity(metrics, phases, loss, target / "loss_and_sparsity.png")]
    if phases is not None and mask is not None:
        if any(name.startswith("threshold/") for name in metrics):
            drawn.append(_thresholds(metrics, phases, target / "thresholds.png"))
        drawn.append(_layers(layers, target / "sparsity_per_layer.png"))
        drawn.append(_mask(*mask, target / "mask.png"))
    return drawn


def plot_plan(pruner: Pruner, path: Path) -> Path:
    """Draw a schedule's forecast: the sparsity of each group over the run, and Algorithm 1's threshold over q.

    Args:
        pruner: before its first step.
        path: the PNG file.
    """
    method, total = pruner.method, pruner.run.total_steps
    steps = sorted({0, max(0, method.dense_until), *method.updates, total})
    figure, axes = plt.subplots(figsize=(8, 4.5))
    lines: list[Any] = []
    for group in pruner.groups:
        shares = [method.expected(itr, group) for itr in steps]
        if None in shares:
            continue
        curve = [100 * (share or 0.0) for share in shares]
        # One that lies on another, but for a weight that a share is rounded to, would hide it.
        same = [line for line in lines if max(abs(a - b) for a, b in zip(line.get_ydata(), curve, strict=True)) < 0.3]
        if same:
            same[0].set_label(f"{same[0].get_label()}, {group.name}")
        else:
            lines += axes.step(steps, curve, where="post", label=group.name)
    schedule = getattr(method, "schedule", None)
    if isinstance(schedule, GradualSchedule):
        right = axes.twinx()
        updates = list(schedule.updates)
        right.plot(updates, [schedule.epsilon(itr, 1.0) for itr in updates], color="0.5", linestyle=":")
        right.set(ylabel="threshold / q (dotted)", ylim=(0, None))
    _mark_phases(axes, method.phases)
    axes.set(xlabel="step", ylabel="expected sparsity, %", xlim=(0, total), ylim=(0, 100), title="Forecast")
    if lines and len(pruner.groups) <= LEGEND_ROWS:
        axes.legend(loc="lower right", fontsize=8)
    return save_figure(figure, path)


def save_figure(figure: Any, path: Path, dpi: int = 120) -> Path:
    """Write a figure as PNG, whole or not at all, and close it. Raises OSError as ``write_atomically``."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    write_atomically(path, drawn.getvalue())
    return path


def _mark_phases(axes: Any, phases: Mapping[str, int]) -> None:
    for name, step in phases.items():
        if step == 0:  # pruned from the first step, as rigl does
            continue
        axes.axvline(step, color="0.6", linewidth=1, linestyle="--")
        right = -11 if name == "start_itr" else 3  # of its line; hard pruning ends a step after it starts
        axes.annotate(
            name, (step, 1.0), xycoords=("data", "axes fraction"), xytext=(right, -4), textcoords="offset points",
            va="top", rotation=90, fontsize=8, color="0.4",
        )  # fmt: skip


def _loss_and_sparsity(metrics: dict[str, Points], phases: Mapping[str, int] | None, loss: str, path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8, 4.5))
    none: Points = ([], [])
    axes.plot(*metrics.get("train_loss", none), color="tab:blue", alpha=0.4, linewidth=1, label="training loss")
    axes.plot(*metrics.get("valid_loss", none), color="tab:blue", marker="o", markersize=4, label="validation loss")
    axes.set(xlabel="step", ylabel=loss)
    handles, labels = axes.get_legend_handles_labels()
    if phases is not None:
        _mark_phases(axes, phases)
        right = axes.twinx()
        steps, shares = metrics.get("sparsity/total", none)
        last = max([*metrics.get("train_loss", none)[0], *metrics.get("valid_loss", none)[0], *steps], default=0)
        steps, shares = [0, *steps, last], [0.0, *shares, shares[-1] if shares else 0.0]
        right.step(steps, [100 * share for share in shares], where="post", color="tab:orange", label="sparsity")
        right.set(ylabel="sparsity, %", ylim=(0, 100))
        more_handles, more_labels = right.get_legend_handles_labels()
        handles, labels = handles + more_handles, labels + more_labels
    axes.legend(handles, labels, loc="center right")
    axes.set_title("Loss and sparsity")
    return save_figure(figure, path)


def _thresholds(metrics: dict[str, Points], phases: Mapping[str, int], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8, 4))
    for name, points in metrics.items():
        if name.startswith("threshold/"):
            axes.plot(*points, label=name.removeprefix("threshold/"), marker=".", markersize=4)
    _mark_phases(axes, phases)
    # Embeddings' thresholds are ten times the recurrent ones.
    axes.set(xlabel="step", ylabel="threshold epsilon", yscale="log", title="Thresholds")
    axes.legend(loc="lower right")
    return save_figure(figure, path)


def _layers(layers: list[dict[str, Any]], path: Path) -> Path:
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(layers)))
    names, shares = [row["parameter"] for row in layers], [100 * row["sparsity"] for row in layers]
    bars = axes.barh(names, shares, color="tab:orange")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set(xlabel="sparsity, %", xlim=(0, 108), title="Sparsity of each layer")
    axes.invert_yaxis()
    return save_figure(figure, path)


def _mask(name: str, weight: Tensor, path: Path) -> Path:
    rows, columns = weight.shape
    figure, axes = plt.subplots(figsize=(6, max(2.0, min(12.0, 6 * rows / columns))))
    axes.imshow((weight != 0).numpy(), cmap="Greys", interpolation="nearest", aspect="auto")
    axes.set(xlabel="input unit", ylabel="output unit", title=f"Weights left in {name}")
    gates = GATE_LETTERS.get(rows // columns, "") if "weight_hh" in name else ""
    for index, gate in enumerate(gates):
        axes.axhline((index + 1) * columns - 0.5, color="tab:red", linewidth=1)
        axes.annotate(gate, (1.02, (index + 0.5) * columns), xycoords=("axes fraction", "data"), color="tab:red")
    return save_figure(figure, path)
