"""``python -m srnn evaluate RUN``: score the packed file on its validation and test data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srnn.commands.options import KernelOption, RunOption, command, packed_file
from srnn.errors import UserError
from srnn.run_folder import RunFolder

if TYPE_CHECKING:
    from srnn.datasets.base import Split


@command
def main(run: RunOption, kernel: KernelOption = "auto") -> int:
    """Score a run's packed file on its validation and test data."""
    path = packed_file(run)

    from rich.table import Table

    from srnn.inference.unpacking import unpack
    from srnn.recording.environment import changed_data
    from srnn.registry import register
    from srnn.terminal import console
    from srnn.training.preparing import read_back

    trained = read_back(path)
    packed, data = trained.packed, trained.data
    model = unpack(packed, register.build("kernel", {"name": kernel}))
    scores = {part: trained.objective.score(model, data, part) for part in ("valid", "test")}
    table = Table(title=f"{packed.model['name']} on {packed.about['dataset']['name']}, from {path.name}")
    table.caption = "the packed file, on all of each part"
    of_tokens = {"perplexity": f"perplexity a {data.vocabulary.level[:-1]}"} if data.vocabulary else {}
    for column in ("part", data.unit, *(of_tokens.get(name, name.replace("_", " ")) for name in scores["test"])):
        table.add_column(column, justify="right" if column != "part" else "left")
    titles: dict[Split, str] = {"valid": "validation", "test": "test"}
    for part, words in titles.items():
        table.add_row(words, f"{data.counts[part]:,}", *(f"{value:.4f}" for value in scores[part].values()))
    console.print(table)
    if changed := changed_data(RunFolder(path.parent), data):
        console.print(changed, soft_wrap=True)
    for part, limit in _limits(path.parent).items():
        if part in scores and limit < len(data.batches(part)):
            console.print(
                f"The run's own report is of the first {limit} of {len(data.batches(part))} batches of the {part} part "
                f"(trainer.limit_eval_batches).",
                soft_wrap=True,
            )
    return 0


def _limits(folder: Path) -> dict[Split, int]:
    """Part -> how many batches of it the run scored, where it did not take all; empty where there is no report."""
    try:
        limits = dict(RunFolder(folder).read_report()["limits"])
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return {}
    return {part: limit for part, limit in limits.items() if isinstance(limit, int)}
