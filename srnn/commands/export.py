"""``python -m srnn export run=FOLDER format=onnx``: write a run's network as another file and say what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from srnn import __version__
from srnn.commands.options import Help, StructureChoice, ValuesChoice, command, output_folder, packed_file
from srnn.errors import UserError
from srnn.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from srnn.inference.packing import PackedModel

FormatChoice = Literal["packed", "onnx"]  # the second on as in srnn.exporting
_FORMAT = "another packed file, or ONNX"
_VALUES = "what weights are stored as (packed: fp16, and int8 is calibrated on validation data; onnx: fp32, or int8)"
_STRUCTURE = "blocks of a packed file; refused if the weights are not pruned in them"
_OUTPUT = "(model-VALUES-STRUCTURE.safetensors or model-VALUES.onnx beside the run's)"


@command
def main(
    run: Annotated[str, Help("a finished run's folder, or a packed file", metavar="FOLDER")],
    format: Annotated[FormatChoice, Help(_FORMAT)] = "packed",
    values: Annotated[ValuesChoice | None, Help(_VALUES)] = None,
    structure: Annotated[StructureChoice, Help(_STRUCTURE)] = "auto",
    output: Annotated[str | None, Help(_OUTPUT, metavar="FILE")] = None,
) -> int:
    """Write a run's network as another packed file, or as ONNX, and say what that costs."""
    if format == "packed":
        return _pack_again(run, values or "fp16", structure, output)
    if structure != "auto":
        raise UserError(f"export: --structure={structure} is for format=packed: format={format} stores no blocks.")
    return _to_another_runtime(run, format, values or "fp32", output)


def _to_another_runtime(run: str, format: str, values: ValuesChoice, output: str | None) -> int:
    """The packed network in a format of ``srnn.exporting``, with its score on the run's test data."""
    source = packed_file(run)
    from srnn.exporting.exporter import EXPORT_FORMATS, export

    EXPORT_FORMATS[format].check(values=values)
    target = _target(output, source.with_name(f"model-{values}{EXPORT_FORMATS[format].suffix}"))

    import torch

    from srnn.inference.unpacking import unpack
    from srnn.kernels import Csr
    from srnn.terminal import console
    from srnn.training.preparing import read_back

    of_run = read_back(source)
    packed, scores = of_run.packed, list[dict[str, float]]()
    network: Any = unpack(packed, Csr())
    network.vocabulary = packed.vocabulary

    def about(written: nn.Module) -> str:
        scores.extend(of_run.objective.score(n, of_run.data, "test") for n in (unpack(packed), written))
        name, data = packed.model["name"], packed.about["dataset"]["name"]
        return f"{name} on {data}, test: {of_run.objective.words.format(**scores[1])}. Written by srnn {__version__}."

    inputs = next(iter(of_run.data.val_dataloader()))[0][:2, :8]
    with torch.inference_mode():
        example = (inputs, network(inputs)[1])  # for networks that are no chain of layers
    report = export(network, target, format, example, about, values=values)
    console.print(str(report), soft_wrap=True, highlight=False)
    told = of_run.objective.telling
    cost = f"{scores[1][told] - scores[0][told]:+z.4f}"
    words = of_run.objective.words.format(**scores[1])
    console.print(f"test: {words}; costs {cost} {told.replace('_', ' ')} over {source.name}", soft_wrap=True)
    return 0


def _target(output: str | None, default: Path) -> Path:
    """The file to write; its folder is made and tried before anything is scored."""
    target = Path(output or default).expanduser()
    if target.is_dir() or target.suffix != default.suffix:
        raise UserError(f"export: --output={target} must be a file named *{default.suffix}.")
    output_folder(target.parent)
    return target


def _pack_again(run: str, values: ValuesChoice, structure: StructureChoice, output: str | None) -> int:
    """Another packed file, scored beside the run's."""
    source = packed_file(run)
    target = _target(output, source.with_name(f"model-{values}-{structure}.safetensors"))

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
    trained = Path(run).expanduser().is_dir() and checkpoint.exists()
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
