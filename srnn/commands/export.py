"""``python -m srnn export run=FOLDER values=fp16 structure=16x1``: write a packed file and say what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from srnn.commands.options import Help, StructureChoice, ValuesChoice, command, output_folder, packed_file
from srnn.errors import UserError
from srnn.files import expanded
from srnn.run_folder import RunFolder

if TYPE_CHECKING:
    from srnn.inference.packing import PackedModel

_VALUES = "what non-zeros are stored as; int8 is calibrated on validation data"
_STRUCTURE = "blocks to store; refused if the weights are not pruned in them"
_OUTPUT = "(model-VALUES-STRUCTURE.safetensors beside the run's)"


@command
def main(
    run: Annotated[str, Help("a finished run's folder, or a packed file", metavar="FOLDER")],
    values: Annotated[ValuesChoice, Help(_VALUES)] = "fp16",
    structure: Annotated[StructureChoice, Help(_STRUCTURE)] = "auto",
    output: Annotated[str | None, Help(_OUTPUT, metavar="FILE")] = None,
) -> int:
    """Write a run's network as another packed file; score it beside the run's."""
    source = packed_file(run)
    target = Path(output or source.with_name(f"model-{values}-{structure}.safetensors"))
    target = expanded(target)
    if target.is_dir() or target.suffix != ".safetensors":
        raise UserError(f"export: --output={target} must be a file named *.safetensors.")
    output_folder(target.parent)  # before anything is scored

    from srnn.inference.packed_file import read, write
    from srnn.inference.packing import pack
    from srnn.inference.unpacking import unpack
    from srnn.inference.weights import read_weights
    from srnn.recording.environment import changed_data
    from srnn.terminal import console
    from srnn.training.preparing import read_back
    from srnn.training.verifying import calibration

    of_run = read_back(source)
    packed, data = of_run.packed, of_run.data
    model = unpack(packed)
    checkpoint = RunFolder(source.parent).best
    trained = expanded(run).is_dir() and checkpoint.exists()
    if trained:  # fp32, where the packed file is rounded
        model.load_state_dict(read_weights(checkpoint))
    energies = calibration(model, data) if values == "int8" else None
    exported = pack(model, packed.model, packed.supplied, values, structure, energies)
    exported = replace(exported, vocabulary=packed.vocabulary, about=packed.about)
    if not exported.matrices:
        raise UserError(f"export: no matrix of {run} holds enough zeros to be packed.")
    dense_bytes, source_bytes = 4 * sum(weight.numel() for weight in model.parameters()), source.stat().st_size
    write(target, exported)
    target_bytes = target.stat().st_size
    rows = {
        f"{source.name}, {_formats(packed)}": (source_bytes, unpack(packed)),
        f"exported, {_formats(exported)}": (target_bytes, unpack(read(target))),
    }
    if trained:
        rows = {"pruned, not packed, fp32": (dense_bytes, model)} | rows
    scores = {name: (size, of_run.objective.score(network, data, "test")) for name, (size, network) in rows.items()}
    _print_scores(f"{packed.model['name']} on {packed.about['dataset']['name']}, test", scores)
    if words := changed_data(RunFolder(source.parent), data):
        console.print(words, soft_wrap=True)
    (before, (_, first)), *_, (_, (_, last)) = scores.items()
    told = "bits_per_character" if "bits_per_character" in first else "loss"
    cost = f"{last[told] - first[told]:+z.4f} {told.replace('_', ' ')}"
    smaller = f"{dense_bytes / target_bytes:.1f}x smaller than dense in fp32"
    console.print(f"{target}: {smaller}, costs {cost} over {before!r}", soft_wrap=True)
    return 0


def _print_scores(title: str, scores: Mapping[str, tuple[int, Mapping[str, float]]]) -> None:
    """A row a network: its bytes and all its scores."""
    from rich.table import Table

    from srnn.terminal import console

    table = Table(title=title, title_justify="left")
    names = next(iter(scores.values()))[1]
    for column in ("", "bytes", *(name.replace("_", " ") for name in names)):
        table.add_column(column, justify="right" if column else "left")
    for name, (size, score) in scores.items():
        table.add_row(name, f"{size:,}", *(f"{value:.4f}" for value in score.values()))
    console.print(table)


def _formats(packed: PackedModel) -> str:
    return ", ".join(sorted({f"{m.structure} {m.values_name}" for m in packed.matrices.values()}))
