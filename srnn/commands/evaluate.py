"""``python -m srnn evaluate run=FOLDER``: score the packed file on its validation and test text."""

from __future__ import annotations

from collections.abc import Sequence

from srnn.commands.options import Parser, packed_file
from srnn.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Read the packed file, rebuild the data, print the scores."""
    parser = Parser(prog="srnn evaluate", description="Score a run's packed file on its validation and test text.")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="a run's folder, or a packed file")
    parser.add_argument("--kernel", default="auto", help="the backend that runs it (%(default)s)")
    options = parser.parse(argv)
    path = packed_file(options.run)

    import torch
    from rich.table import Table

    from srnn.deploy.packed import read
    from srnn.registry import register
    from srnn.tracking.console import console
    from srnn.training.next_token import evaluate

    packed = read(path)
    if "dataset" not in packed.about:
        raise UserError(f"{path} does not say which data it was trained on.")
    data = register.build("dataset", packed.about["dataset"])
    data.setup(vocabulary=packed.vocabulary)
    model = packed.build_sparse(register.build("kernel", {"name": options.kernel}))
    table = Table(title=f"{packed.model['name']} on {packed.about['dataset']['name']}, from {path.name}")
    for column in ("part", "characters", "loss", "perplexity", "bits per character"):
        table.add_column(column, justify="right" if column != "part" else "left")
    for part, loader in (("validation", data.val_dataloader()), ("test", data.test_dataloader())):
        characters = data.characters["valid" if part == "validation" else "test"]
        score = evaluate(model, loader, characters, torch.device("cpu"))
        table.add_row(
            part,
            f"{characters:,}",
            f"{score.loss:.4f}",
            f"{score.perplexity:.3f}",
            f"{score.bits_per_character:.4f}",
        )
    console.print(table)
    return 0
