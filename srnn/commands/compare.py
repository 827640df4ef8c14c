"""``python -m srnn compare FOLDER ...``: what runs have in common, how they differ, and which is best."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from srnn.commands.options import Parser, output_folder
from srnn.errors import UserError

if TYPE_CHECKING:
    from srnn.comparing.comparison import Comparison
    from srnn.comparing.runs import FinishedRun

NAME = "comparison"  # of the files


def main(argv: Sequence[str]) -> int:
    """Read the runs, print the table, write Markdown, CSV and plots, and keep them as a W&B run."""
    options = _parse(argv)

    from srnn.comparing.comparison import compare, csv_text, markdown, rich_table, run_rows, setting_rows
    from srnn.comparing.comparison_plots import plot_comparison
    from srnn.files import write_atomically
    from srnn.terminal import console

    comparison = compare(_runs(options), options.metric)
    for run in comparison.repeated:
        console.print(f"left out, another has its config and seed: {run.name}", markup=False, soft_wrap=True)
    console.print(rich_table(comparison))
    folder = output_folder(Path(options.output or f"outputs/compare_{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    write_atomically(folder / "runs.csv", csv_text(run_rows(comparison)).encode())
    write_atomically(folder / f"{NAME}.csv", csv_text(setting_rows(comparison)).encode())
    plots = plot_comparison(comparison, folder)
    pictures = "".join(f"\n![{path.stem.replace('_', ' ')}]({path.name})\n" for path in plots)
    write_atomically(folder / f"{NAME}.md", (markdown(comparison) + pictures).encode())
    _track(options, comparison, folder, plots)
    console.print(f"Tables and plots are in {folder}", soft_wrap=True)
    return 0


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(
        prog="srnn compare", description="Compare finished runs: one row for all seeds of a config; tables and plots."
    )
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="runs, or sweeps and other folders of runs")
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT[/GROUP]", help="read them from W&B instead")
    parser.add_argument("--metric", help="a score of the test part, such as perplexity (the one that tells most)")
    parser.add_argument("--output", metavar="FOLDER", help="for tables and plots (outputs/compare_DATE)")
    parser.add_argument("--mode", default="offline", choices=["online", "offline", "disabled"],
                        help="of the W&B run that keeps the comparison (%(default)s)")  # fmt: skip
    parser.add_argument("--project", default="srnn", help="W&B project of that run (%(default)s)")
    options = parser.parse(argv)
    if bool(options.folders) == bool(options.wandb):
        raise UserError("compare: give folders of runs, such as outputs/SWEEP, or --wandb ENTITY/PROJECT.")
    return options


def _runs(options: Namespace) -> list[FinishedRun]:
    from srnn.terminal import console

    if options.wandb:
        from srnn.comparing.wandb_projects import read_project

        return read_project(options.wandb)
    from srnn.comparing.runs import read_runs

    runs, unfinished = read_runs([Path(folder).expanduser() for folder in options.folders])
    for path in unfinished:
        console.print(f"left out, not finished: {path}", markup=False, soft_wrap=True)
    if not runs:
        raise UserError("compare: none of these runs is finished.")
    return runs


def _track(options: Namespace, comparison: Comparison, folder: Path, plots: Sequence[Path]) -> None:
    from srnn.comparing.comparison import run_rows, setting_rows
    from srnn.config.settings import TrackingConfig
    from srnn.recording.wandb import carefully, log_tables, sync_command, wandb_run
    from srnn.terminal import console

    group = Path(options.folders[0]).resolve().name if len(options.folders) == 1 else None  # a sweep's own
    tracking = TrackingConfig(mode=options.mode, project=options.project, group=group)
    what = {"compared": list(map(str, options.folders)) or [options.wandb], "metric": comparison.metric}
    with wandb_run(tracking, folder, what, "compare") as run:
        if run is not None:
            with carefully("the comparison"):
                log_tables(run, {"settings": setting_rows(comparison), "runs": run_rows(comparison)}, plots)
                best = comparison.settings[0]
                run.summary.update({f"best/{comparison.metric}": best.mean(comparison.key), "best": best.label()})
    if command := sync_command(folder):
        console.print(f"Upload to W&B: {command}", soft_wrap=True)
