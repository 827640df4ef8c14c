"""``python -m srnn compare FOLDER ...``: what runs have in common, how they differ, and which is best."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from srnn.commands.options import Help, command, output_folder
from srnn.errors import UserError

if TYPE_CHECKING:
    from srnn.comparing.comparison import Comparison
    from srnn.comparing.runs import FinishedRun
    from srnn.config.settings import TrackingConfig

NAME = "comparison"  # of the files
_WANDB = "ENTITY/PROJECT[/GROUP]"
_METRIC = "a score of the test part, such as perplexity (the one that tells most)"


@command
def main(
    runs: Annotated[list[str], Help("runs, or sweeps and other folders of runs", metavar="RUN")],
    /,
    wandb: Annotated[str | None, Help("read them from W&B instead", metavar=_WANDB)] = None,
    metric: Annotated[str | None, Help(_METRIC)] = None,
    output: Annotated[str | None, Help("for tables and plots (outputs/compare_DATE)", metavar="FOLDER")] = None,
    mode: Annotated[
        Literal["online", "offline", "disabled"], Help("of the W&B run that keeps the comparison")
    ] = "offline",
    project: Annotated[str, Help("W&B project of that run")] = "srnn",
) -> int:
    """Compare finished runs: one row for all seeds of a config; tables and plots.

    Prints the table, writes Markdown, CSV and plots, and keeps them as a W&B run.
    """
    if bool(runs) == bool(wandb):
        raise UserError(
            "compare: which runs? Give folders, as `srnn compare outputs/SWEEP`; or --wandb ENTITY/PROJECT."
        )

    from srnn.comparing.comparison import compare, markdown, rich_table, run_rows, setting_rows
    from srnn.comparing.comparison_plots import plot_comparison
    from srnn.config.settings import TrackingConfig
    from srnn.files import csv_bytes, write_atomically
    from srnn.terminal import console

    comparison = compare(_runs(runs, wandb), metric)
    for run in comparison.repeated:
        console.print(f"left out, another has its config and seed: {run.name}", soft_wrap=True)
    console.print(rich_table(comparison))
    folder = output_folder(Path(output or f"outputs/compare_{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    write_atomically(folder / "runs.csv", csv_bytes(run_rows(comparison)))
    write_atomically(folder / f"{NAME}.csv", csv_bytes(setting_rows(comparison)))
    plots = plot_comparison(comparison, folder)
    pictures = "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in plots)
    write_atomically(folder / f"{NAME}.md", (markdown(comparison) + pictures).encode(errors="surrogateescape"))
    group = Path(runs[0]).resolve().name if len(runs) == 1 else None  # a sweep's own
    tracking = TrackingConfig(mode=mode, project=project, group=group)
    _track(comparison, runs or [str(wandb)], tracking, folder, plots)
    console.print(f"Tables and plots are in {folder}", soft_wrap=True)
    return 0


def _runs(folders: Sequence[str], project: str | None) -> list[FinishedRun]:
    from srnn.terminal import console

    if project:
        from srnn.comparing.wandb_projects import read_project

        return read_project(project)
    from srnn.comparing.runs import read_runs
    from srnn.files import expanded

    runs, unfinished = read_runs([expanded(folder) for folder in folders])
    for path in unfinished:
        console.print(f"left out, not finished: {path}", soft_wrap=True)
    if not runs:
        raise UserError("compare: none of these runs is finished.")
    return runs


def _track(
    comparison: Comparison, compared: Sequence[str], tracking: TrackingConfig, folder: Path, plots: Sequence[Path]
) -> None:
    from srnn.comparing.comparison import run_rows, setting_rows
    from srnn.recording.wandb import carefully, log_tables, sync_command, wandb_run
    from srnn.terminal import console

    what = {"compared": list(compared), "metric": comparison.metric}
    with wandb_run(tracking, folder, what, "compare") as run:
        if run is not None:
            with carefully("the comparison"):
                log_tables(run, {"settings": setting_rows(comparison), "runs": run_rows(comparison)}, plots)
                best = comparison.settings[0]
                run.summary.update({f"best/{comparison.metric}": best.mean(comparison.key), "best": best.label()})
    if command := sync_command(folder):
        console.print(f"Upload to W&B: {command}", soft_wrap=True)
