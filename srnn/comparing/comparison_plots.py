"""The pictures of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from srnn.comparing.comparison import Comparison, Setting, pareto
from srnn.recording.plots import save_figure
from srnn.recording.summary import Points

mpl.use("Agg")
import matplotlib.pyplot as plt  # after the backend that needs no display
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

MARKERS = "os^Dv*P"  # lines that lie on each other are told apart
DASHES = ("-", "--", ":", "-.")
CURVES = 12  # settings in one picture of curves; more cannot be told apart


def plot_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw what the runs allow: metric over sparsity if some are sparse, over weights, and over steps."""
    drawn = [_over_weights(comparison, folder / "over_weights.png"), _curves(comparison, folder / "curves.png")]
    if any(setting.mean("final/sparsity") for setting in comparison.settings):
        drawn.insert(0, _over_sparsity(comparison, folder / "over_sparsity.png"))
    return drawn


def _over_sparsity(comparison: Comparison, path: Path) -> Path:
    """A line for each method, over its sparsities; a dense setting is a level to compare with."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    sparse = [s for s in comparison.settings if s.mean("final/sparsity")]
    dense = [s for s in comparison.settings if not s.mean("final/sparsity")]
    looks = _looks(comparison)
    for label, settings in _lines(sparse).items():
        settings.sort(key=lambda s: s.mean("final/sparsity") or 0.0)
        x = [100 * _mean(s, "final/sparsity") for s in settings]
        axes.errorbar(
            x, [_mean(s, comparison.key) for s in settings], [s.deviation(comparison.key) or 0.0 for s in settings],
            label=label, markersize=5, capsize=3, alpha=0.8, **looks[label],
        )  # fmt: skip
    for setting in dense:
        mean, deviation = _mean(setting, comparison.key), setting.deviation(comparison.key) or 0.0
        color = looks[_line(setting)]["color"]
        axes.axhline(mean, color=color, linestyle="--", linewidth=1, label=f"{setting.label()} (dense)")
        axes.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)
    axes.set(xlabel="sparsity reached, %", ylabel=_words(comparison), title="Score over sparsity")
    return _save(figure, axes, path)


def _over_weights(comparison: Comparison, path: Path) -> Path:
    """Every setting, and those that no other beats with as few weights."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    sign = -1 if comparison.higher_is_better else 1
    looks = _looks(comparison)
    for label, settings in _lines(comparison.settings).items():
        axes.errorbar(
            [_mean(s, "final/nonzeros") for s in settings], [_mean(s, comparison.key) for s in settings],
            [s.deviation(comparison.key) or 0.0 for s in settings],
            label=label, markersize=5, capsize=3, alpha=0.8, linestyle="none", **looks[label],
        )  # fmt: skip
    front = pareto(comparison.settings, lambda s: _mean(s, "final/nonzeros"), lambda s: sign * _mean(s, comparison.key))
    axes.plot(
        [_mean(s, "final/nonzeros") for s in front], [_mean(s, comparison.key) for s in front],
        color="0.3", linewidth=1, linestyle="--", label="Pareto front", zorder=0,
    )  # fmt: skip
    axes.set(xscale="log", xlabel="weights that are not zero", ylabel=_words(comparison), title="Score over weights")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _save(figure, axes, path)


def _curves(comparison: Comparison, path: Path) -> Path:
    """The validation's metric over steps: the mean over seeds, and a band from the least to the most."""
    figure, axes = plt.subplots(figsize=(8, 4.5))
    name = f"valid_{comparison.metric}"
    looks = _looks(comparison)
    drawn: Counter[str] = Counter()  # of each line
    for setting in comparison.settings[:CURVES]:
        curves = [run.curves[name] for run in setting.runs if run.curves.get(name)]
        if not curves:
            continue
        steps, values = aligned(curves)
        line = _line(setting)
        style: dict[str, Any] = {"color": looks[line]["color"], "linestyle": DASHES[drawn[line] % len(DASHES)]}
        drawn[line] += 1
        axes.plot(steps, values.mean(axis=0), label=setting.label(), linewidth=1.2, **style)
        if len(curves) > 1:
            axes.fill_between(
                steps, values.min(axis=0), values.max(axis=0), alpha=0.15, linewidth=0, color=style["color"]
            )
    left_out = len(comparison.settings) - CURVES
    title = "Validation over steps" + (f" ({left_out} worse settings are left out)" if left_out > 0 else "")
    axes.set(xlabel="step", ylabel=f"{comparison.words}, validation", title=title)
    return _save(figure, axes, path)


def aligned(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """Curves on the first one's steps, as far as all of them go: steps_N and values_CN."""
    last = min(steps[-1] for steps, _ in curves)
    grid = np.array([step for step in curves[0][0] if step <= last])
    return grid, np.array([np.interp(grid, steps, values) for steps, values in curves])


def _lines(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Settings that differ in the sparsity asked for only, by what they have in common."""
    lines: dict[str, list[Setting]] = {}
    for setting in settings:
        lines.setdefault(_line(setting), []).append(setting)
    return lines


def _line(setting: Setting) -> str:
    return setting.label(without=["pruning.sparsity"])


def _looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """The same line has the same colour and marker in each picture, whatever its score."""
    labels = sorted(_lines(comparison.settings))
    return {
        label: {"color": f"C{index % 10}", "marker": MARKERS[index % len(MARKERS)]}
        for index, label in enumerate(labels)
    }


def _mean(setting: Setting, key: str) -> float:
    value = setting.mean(key)
    return float("nan") if value is None else value


def _words(comparison: Comparison) -> str:
    better = "more" if comparison.higher_is_better else "less"
    return f"{comparison.words}, test ({better} is better)"


def _save(figure: Any, axes: Any, path: Path) -> Path:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), fontsize=8, frameon=False)
    return save_figure(figure, path)
