"""What is read back of a run: its curves, and the few numbers by which runs are sorted and compared."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Points = tuple[list[int], list[float]]  # steps, values


def summary_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The few numbers of a run's report by which runs are sorted and compared. Latencies in seconds, one stream."""
    scores, size, latency, seconds = (report[key] for key in ("scores", "size", "latency", "seconds"))
    summary: dict[str, Any] = {"objective": report["objective"]}
    summary |= {f"best/{name}": value for name, value in scores["best"].items() if name != "step"}
    summary |= {f"test/{name}": value for name, value in scores["test_packed"].items()}
    summary |= {"final/sparsity": report["sparsity"]["reached"]}
    summary |= {f"final/{name}": size[name] for name in ("parameters", "nonzeros", "dense_bytes", "packed_bytes")}
    for kind in ("sequence", "step"):
        if kind in latency:
            summary |= {f"latency/{kind}": latency[kind]["sparse"], f"latency/{kind}_dense": latency[kind]["dense"]}
    summary["latency/sequence_speedup"] = latency["sequence"]["dense"] / latency["sequence"]["sparse"]
    if seconds["training_loop"]:  # a run without training has none
        summary["time/pruning_share"] = seconds["pruning"] / seconds["training_loop"]
    about = report.get("machine", {})  # where the latencies were taken; earlier versions did not look at the load
    summary |= {f"machine/{name}": about[name] for name in ("cpus", "threads", "load") if about.get(name) is not None}
    # Earlier versions knew torch and oneDNN; runs that knew others too compare with something else.
    summary["machine/dense runtimes"] = len(latency.get("dense_runtimes", ("torch", "oneDNN")))
    return summary


def read_metrics(path: Path) -> dict[str, Points]:
    """Column -> (steps, values) of a ``metrics.csv``; empty cells are left out."""
    columns: dict[str, Points] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, cell in row.items():
                if cell and name != "step":
                    steps, values = columns.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(cell))
    return columns
