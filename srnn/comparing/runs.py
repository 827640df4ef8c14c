"""Finished runs as data to compare, read from their folders; ``wandb_projects`` reads the same from W&B."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srnn.errors import UserError
from srnn.recording.environment import read_environment
from srnn.recording.summary import Points, read_metrics, summary_of
from srnn.run_folder import RunFolder


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        name: its folder's, or its W&B name.
        config: the resolved config.
        summary: what ``summary_of`` makes of a report; the same numbers are a W&B run's summary.
        curves: logged name -> steps and values.
        test_data: the checksum of its test part; None where it is not known.
    """

    name: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    curves: Mapping[str, Points]
    test_data: str | None = None


def read_runs(folders: Sequence[Path]) -> tuple[list[FinishedRun], list[Path]]:
    """The finished runs in folders, at any depth, each once; and the folders of those that are not finished.

    Raises:
        UserError: a folder is not there or holds no run; or a run's report is damaged.
    """
    finished: dict[Path, FinishedRun] = {}
    unfinished: dict[Path, None] = {}
    for folder in folders:
        # Any depth passes over links to folders.
        below = [*RunFolder.below(folder), *RunFolder.below(folder, "*")]
        runs = [run for run in below if "wandb" not in run.path.parts]
        if not runs:
            raise UserError(f"{folder}: no run is there; give the folders of runs or sweeps, such as outputs/RUN.")
        for run in (RunFolder(run.path.resolve()) for run in runs):
            if run.finished:
                finished[run.path] = _read_run(run)
            else:
                unfinished[run.path] = None
    return list(finished.values()), list(unfinished)


def _read_run(folder: RunFolder) -> FinishedRun:
    try:
        report = folder.read_report()
        curves = read_metrics(folder.metrics)
        config, summary = report["config"], summary_of(report)
        if not isinstance(config, Mapping) or "seed" not in config:
            raise ValueError("its config has no seed")
        if wrong := [name for name, value in summary.items() if name != "objective" and not _is_number(value)]:
            raise ValueError(f"{wrong[0]} is no number")
        data = read_environment(folder).get("data")
        test_data = str(data["test"]) if isinstance(data, Mapping) and "test" in data else None
        return FinishedRun(folder.path.name, config, summary, curves, test_data)
    except UserError:  # which names the file
        raise
    except Exception as error:  # whatever files made by hand bring about
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: its report or metrics are damaged: {why}.") from None


def _is_number(value: Any) -> bool:
    """Whether a plot can show it; a score may be NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isinf(value)
