"""A table and a plot of what layers took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from srnn.bench.layers import LayerRow
from srnn.terminal import plural


def layer_table(title: str, rows: Sequence[LayerRow]) -> Table:
    """Rows of one case; a sparse backend that is slower than dense is marked."""
    made = Table(title=title, title_justify="left")
    for column in ("backend", "weights", "median", "20 to 80 %", "over dense", "over int8 dense", "error"):
        made.add_column(column, justify="left" if column in ("backend", "weights") else "right")
    for row in rows:
        weights = "dense" if row.structure == "dense" else f"{100 * row.sparsity:g} % {row.structure}"
        spread = f"{row.p20_us:,.0f} to {row.p80_us:,.0f}" if row.p20_us and row.p80_us else ""
        made.add_row(
            row.backend,
            f"{weights} {row.values}",
            f"{row.median_us:,.0f} us" if row.median_us else "wrong",
            spread,
            _speed(row.over_dense, row.structure == "dense"),
            _speed(row.over_int8, row.structure == "dense"),
            f"{row.error:.0e}",
        )
    return made


def _speed(ratio: float | None, dense: bool) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}x" + ("  SLOWER" if ratio < 1 and not dense else "")


def plot_layers(path: Path, rows: Sequence[LayerRow]) -> bool:
    """Speed-up over the best dense against sparsity: a panel a shape and batch, a line a backend and format.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    from srnn.recording.plots import save_figure

    drawn = [row for row in rows if row.structure != "dense" and row.over_dense is not None]
    if not drawn:
        return False
    shapes = list(dict.fromkeys(row.shape for row in drawn))
    columns = list(dict.fromkeys((row.batch, row.threads) for row in drawn))
    size = (3.2 * len(columns) + 2, 2.8 * len(shapes) + 0.6)
    figure, panels = plt.subplots(len(shapes), len(columns), figsize=size, squeeze=False, sharex=True, sharey=True)
    lines = list(dict.fromkeys(_line(row) for row in drawn))
    for i, shape in enumerate(shapes):
        for j, (batch, threads) in enumerate(columns):
            here = [row for row in drawn if (row.shape, row.batch, row.threads) == (shape, batch, threads)]
            _panel(panels[i][j], here, lines)
            panels[i][j].set_title(f"{shape}, batch {batch}, {plural(threads, 'thread')}", fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("sparsity, %")
    for row_of_panels in panels:
        row_of_panels[0].set_ylabel("times the best dense")
    handles = [plt.Line2D([], [], color=f"C{k}", marker="o", label=line) for k, line in enumerate(lines)]
    handles.append(plt.Line2D([], [], color="0.3", linestyle="--", label="break-even"))
    figure.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    save_figure(figure, path, dpi=110)
    return True


def _line(row: LayerRow) -> str:
    return f"{row.backend} {row.structure} {row.values}"


def _panel(axes: Any, rows: Sequence[LayerRow], lines: Sequence[str]) -> None:
    for k, line in enumerate(lines):
        points = sorted((100 * row.sparsity, row.over_dense) for row in rows if _line(row) == line)
        axes.plot([x for x, _ in points], [y for _, y in points], color=f"C{k}", marker="o", markersize=4)
    axes.axhline(1.0, color="0.3", linestyle="--", linewidth=1)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}x")
    axes.grid(alpha=0.3)
