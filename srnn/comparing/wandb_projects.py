"""Runs to compare, from a W&B project. The only place that asks W&B's server for anything."""

from __future__ import annotations

from typing import Any

from srnn.comparing.runs import FinishedRun
from srnn.errors import UserError
from srnn.recording.summary import Points
from srnn.recording.wandb import STEP, has_key

TIMEOUT = 30  # seconds to wait for an answer


def read_project(path: str) -> list[FinishedRun]:
    """The finished training runs of ``entity/project``, or of a group in it: ``entity/project/group``.

    Raises:
        UserError: no API key, no such project, no answer, or no finished run of srnn in it.
    """
    import wandb

    entity, _, rest = path.partition("/")
    project, _, group = rest.partition("/")
    if not project:
        raise UserError(f"--wandb={path}: give entity/project, or entity/project/group.")
    if not has_key():
        raise UserError("--wandb needs a W&B API key: set WANDB_API_KEY or run `wandb login`.")
    filters = {"jobType": "train", "state": "finished"} | ({"group": group} if group else {})
    try:
        runs = [_run(run) for run in wandb.Api(timeout=TIMEOUT).runs(f"{entity}/{project}", filters=filters)]
    except (wandb.Error, ValueError, OSError) as error:
        raise UserError(f"--wandb={path}: {str(error).strip().splitlines()[0]}") from None
    finished = [run for run in runs if "final/nonzeros" in run.summary]
    if not finished:
        raise UserError(f"--wandb={path}: no finished run of srnn is there.")
    return finished


def _run(run: Any) -> FinishedRun:
    curves: dict[str, Points] = {}
    for row in run.scan_history():
        step = row.get(STEP)
        for name, value in row.items():
            if step is not None and name.startswith("valid_") and isinstance(value, int | float):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(step))
                values.append(float(value))
    return FinishedRun(run.name, run.config, dict(run.summary), curves)
