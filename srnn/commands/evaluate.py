"""``python -m srnn evaluate run=FOLDER``: score the packed file on its validation and test data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srnn.commands.options import KernelOption, RunOption, command, packed_file
from srnn.errors import UserError

if TYPE_CHECKING:
    from srnn.datasets.base import Part


@command
def main(run: RunOption, kernel: KernelOption = "auto") -> int:
    """Score a run's packed file on its validation and test data."""
    path = packed_file(run)

    from rich.table import Table

    from srnn.inference.packed_file import read
    from srnn.registry import register
    from srnn.terminal import console

    packed = read(path)
    if "dataset" not in packed.about:
        raise UserError(f"{path} does not say which data it was trained on.")
    data = register.build("dataset", packed.about["dataset"])
    data.setup(vocabulary=packed.vocabulary)
    model = packed.build_sparse(register.build("kernel", {"name": kernel}))
    objective: Any = register.get("objective", data.objective).factory
    scores = {part: objective.score(model, data, part) for part in ("valid", "test")}
    table = Table(title=f"{packed.model['name']} on {packed.about['dataset']['name']}, from {path.name}")
    table.caption = "the packed file, on all of each part"
    for column in ("part", data.unit, *(name.replace("_", " ") for name in scores["test"])):
        table.add_column(column, justify="right" if column != "part" else "left")
    for part, words in (("valid", "validation"), ("test", "test")):
        table.add_row(words, f"{data.counts[part]:,}", *(f"{value:.4f}" for value in scores[part].values()))
    console.print(table)
    for part, limit in _limits(path.parent).items():
        if part in scores and limit < len(data.batches(part)):
            console.print(
                f"The run's own report is of the first {limit} of {len(data.batches(part))} batches of the {part} part "
                f"(trainer.limit_eval_batches).",
                soft_wrap=True,
            )
    return 0


def _limits(folder: Path) -> dict[Part, int]:
    """Part -> how many batches of it the run scored, where it did not take all; empty where there is no report."""
    try:
        return dict(json.loads((folder / "report.json").read_text())["limits"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
