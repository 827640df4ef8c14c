"""Finished runs as data to compare, read from their folders; ``wandb_projects`` reads the same from W&B."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srnn.errors import UserError
from srnn.recording.summary import Points, read_metrics, summary_of


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: its folder's, or its W&B name.
        config: the resolved config.
        summary: what ``summary_of`` makes of a report; the same numbers are a W&B run's summary.
        curves: logged name -> steps and values.
    """

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: Mapping[str, Points]


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs in folders, at any depth, each once; and the folders of those that are not finished.

    Raises:
        UserError: a folder is not there or holds no run; or a run's report is damaged.
    """
    finished: dict[Path, Run] = {}
    unfinished: dict[Path, None] = {}
    for folder in folders:
        configs = sorted(path for path in folder.rglob("config.yaml") if "wandb" not in path.parts)
        if not configs:
            raise UserError(f"{folder}: no run is there; give the folders of runs or sweeps, such as outputs/RUN.")
        for run in (path.parent.resolve() for path in configs):
            if (run / "report.json").is_file():
                finished[run] = _read_run(run)
            else:
                unfinished[run] = None
    return list(finished.values()), list(unfinished)


def _read_run(folder: Path) -> Run:
    try:
        report = json.loads((folder / "report.json").read_text())
        curves = read_metrics(folder / "metrics.csv")
        return Run(folder.name, report["config"], summary_of(report), curves)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: its report or metrics are damaged: {type(error).__name__}: {error}.") from None
