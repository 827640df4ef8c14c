"""``python -m srnn export run=FOLDER values=fp16 structure=16x1``: write a packed file and say what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from srnn.commands.options import Parser, packed_file
from srnn.errors import UserError

CALIBRATION_BATCHES = 20


def main(argv: Sequence[str]) -> int:
    """Pack a run's best weights again, score both, write the file."""
    parser = Parser(prog="srnn export", description="Write a run's network as another packed file; score both.")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="a finished run's folder, or a packed file")
    about = "what non-zeros are stored as; int8 is calibrated on validation data (%(default)s)"
    parser.add_argument("--values", default="fp16", choices=["fp32", "fp16", "bf16", "int8"], help=about)
    about = "blocks to store; refused if the weights are not pruned in them (%(default)s)"
    structures = ["auto", "element", "4x1", "8x1", "16x1", "32x1"]
    parser.add_argument("--structure", default="auto", choices=structures, help=about)
    parser.add_argument("--output", metavar="FILE", help="(model-VALUES-STRUCTURE.safetensors beside the run's)")
    options = parser.parse(argv)
    source = packed_file(options.run)
    target = Path(options.output or source.with_name(f"model-{options.values}-{options.structure}.safetensors"))
    target = target.expanduser()
    if target.is_dir() or target.suffix != ".safetensors":
        raise UserError(f"export: --output={target} must be a file named *.safetensors.")

    import torch
    from rich.table import Table

    from srnn.deploy.packed import PackedModel, read, read_weights, write
    from srnn.registry import register
    from srnn.terminal import console
    from srnn.training.objectives import OBJECTIVES

    packed = read(source)
    if "dataset" not in packed.about:
        raise UserError(f"{source} does not say which data it was trained on.")
    model = packed.build()
    checkpoint = source.parent / "checkpoints" / "best.ckpt"
    if Path(options.run).expanduser().is_dir() and checkpoint.exists():  # fp32, where the packed file is rounded
        model.load_state_dict(read_weights(checkpoint))
    data = register.build("dataset", packed.about["dataset"])
    data.setup(vocabulary=packed.vocabulary)

    def calibrate(network: torch.nn.Module) -> None:
        for inputs, _ in islice(data.val_dataloader(), CALIBRATION_BATCHES):
            network(inputs)

    exported = PackedModel.from_model(
        model, packed.model, packed.supplied, options.values, options.structure, packed.vocabulary, packed.about,
        calibrate,
    )  # fmt: skip
    if not exported.matrices:
        raise UserError(f"export: no matrix of {options.run} holds enough zeros to be packed.")
    write(target, exported)
    objective = OBJECTIVES[data.objective]
    before, after = (objective.score(network, data, "test") for network in (model, read(target).build()))
    table = Table(title=f"{packed.model['name']} on {packed.about['dataset']['name']}, test", title_justify="left")
    for column in ("", "bytes", *(name.replace("_", " ") for name in before)):
        table.add_column(column, justify="right" if column else "left")
    dense_bytes = 4 * sum(weight.numel() for weight in model.parameters())
    formats = sorted({f"{m.structure} {m.values_name}" for m in exported.matrices.values()})
    for name, size, score in (
        ("fp32, dense", dense_bytes, before),
        (f"exported, {', '.join(formats)}", target.stat().st_size, after),
    ):
        table.add_row(name, f"{size:,}", *(f"{value:.4f}" for value in score.values()))
    console.print(table)
    told = "bits_per_character" if "bits_per_character" in before else "loss"
    cost = after[told] - before[told]
    ratio = dense_bytes / target.stat().st_size
    console.print(f"{target}: {ratio:.1f}x smaller, costs {cost:+.4f} {told.replace('_', ' ')}", soft_wrap=True)
    return 0
