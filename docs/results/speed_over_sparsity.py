"""Draws speed_over_sparsity.png, the picture of the README, from cpu_layers.csv beside it."""

from __future__ import annotations

import csv
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
LINES = {
    ("cpu", "16x1", "fp16"): "16 x 1 blocks, fp16 values",
    ("cpu", "16x1", "fp32"): "16 x 1 blocks, fp32",
    ("cpu", "element", "fp32"): "single elements, fp32",
    ("csr", "element", "fp32"): "torch.sparse, fp32",
}


def draw(source: Path, target: Path, shape: str = "gru:2560", threads: str = "1") -> None:
    """Times the best dense fp32 over sparsity, for one stream; the level of dense int8 beside it."""
    with source.open() as file:
        rows = [r for r in csv.DictReader(file) if (r["shape"], r["batch"], r["threads"]) == (shape, "1", threads)]
    dense: dict[str, list[float]] = {"fp32": [], "int8": []}
    for row in rows:
        if row["structure"] == "dense":
            dense[row["values"]].append(float(row["median_us"]))
    fp32, int8 = min(dense["fp32"]), min(dense["int8"])
    figure = Figure(figsize=(6.4, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for (backend, structure, values), label in LINES.items():
        chosen = [r for r in rows if (r["backend"], r["structure"], r["values"]) == (backend, structure, values)]
        points = sorted((100 * float(r["sparsity"]), fp32 / float(r["median_us"])) for r in chosen)
        line = axes.plot(*zip(*points, strict=True), marker="o", label=label)[0]
        sparsity, times = points[-1]
        axes.annotate(f"{times:.1f}x", (sparsity, times), (6, -3), textcoords="offset points", color=line.get_color())
    axes.axhline(fp32 / int8, color="0.4", linestyle=":", label="dense, int8")
    axes.axhline(1, color="0.4", linestyle="--", label="best dense, fp32")
    axes.set(xlabel="sparsity, %", ylabel="times as fast as dense fp32", yscale="log", xlim=(79, 97))
    axes.set_xticks([80, 85, 90, 95])
    axes.set_yticks([1, 2, 4, 8, 16, 32], [f"{times}x" for times in (1, 2, 4, 8, 16, 32)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    cell, units = shape.split(":")
    axes.set_title(f"{cell.upper()} of {units} units, one stream, one CPU thread")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    figure.savefig(target)


if __name__ == "__main__":
    draw(HERE / "cpu_layers.csv", HERE / "speed_over_sparsity.png")
