"""``python -m srnn export RUN format=onnx``: write a run's network as another file and say what it costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from srnn import __version__
from srnn.commands.options import Help, RunOption, StructureChoice, ValuesChoice, command, output_folder, packed_file
from srnn.errors import UserError
from srnn.files import expanded
from srnn.run_folder import RunFolder

if TYPE_CHECKING:
    from torch import nn

    from srnn.inference.packing import PackedModel
    from srnn.training.preparing import TrainedRun

ExportValuesChoice = Literal["fp32", "fp16", "bf16", "int8", "w8a8"]
FormatChoice = Literal["packed", "onnx", "c", "wasm"]  # the second on as in srnn.exporting
_FORMAT = "another packed file, ONNX, a C file and its header, or a page with the network in WebAssembly"
_VALUES = (
    "what weights are stored as (packed, wasm: fp16; onnx: fp32, or int8; c: fp32, or w8a8, which computes in int8 "
    "throughout); int8 is calibrated, but for onnx"
)
_STRUCTURE = "blocks of a packed or C file or a page; refused if the weights are not pruned in them"
_OUTPUT = "(model-VALUES-STRUCTURE.safetensors, model-VALUES.onnx, NAME.c or NAME.html beside the run's)"
_NAME = "of format=c and wasm: what all names in the file begin with"
_VERIFY = "of format=c and wasm: whether to run the file and compare it, where there is what that takes"


@command
def main(
    run: RunOption,
    format: Annotated[FormatChoice, Help(_FORMAT)] = "packed",
    values: Annotated[ExportValuesChoice | None, Help(_VALUES)] = None,
    structure: Annotated[StructureChoice, Help(_STRUCTURE)] = "auto",
    output: Annotated[str | None, Help(_OUTPUT, metavar="FILE")] = None,
    name: Annotated[str | None, Help(_NAME)] = None,
    verify: Annotated[bool, Help(_VERIFY)] = True,
) -> int:
    """Write a run's network as another packed file, as ONNX, as C or as a page, and say what that costs."""
    if format in ("c", "wasm"):
        usual = "fp32" if format == "c" else "fp16"
        options: dict[str, Any] = {"values": values or usual, "structure": structure, "name": name, "verify": verify}
        return _to_c(run, format, output, options)
    if values == "w8a8":
        raise UserError(f"export: --values=w8a8 is for format=c, not for format={format}.")
    if name is not None or not verify:
        raise UserError(f"export: name and verify are for format=c and format=wasm, not for format={format}.")
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
    target = _target(output, source.with_name(f"model-{values}{EXPORT_FORMATS[format].suffix}"), format)

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
        return f"{name} on {data}, test: {_in_words(of_run, scores[1])}. Written by srnn {__version__}."

    inputs = next(iter(of_run.data.val_dataloader()))[0][:2, :8]
    with torch.inference_mode():
        example = (inputs, network(inputs)[1])  # for networks that are no chain of layers
    report = export(network, target, format, example, about, values=values)
    console.print(str(report), soft_wrap=True, highlight=False)
    told = of_run.objective.telling
    cost = f"{scores[1][told] - scores[0][told]:+z.4f}"
    words = _in_words(of_run, scores[1])
    console.print(f"test: {words}; costs {cost} {told.replace('_', ' ')} over {source.name}", soft_wrap=True)
    return 0


def _to_c(run: str, format: str, output: str | None, options: dict[str, Any]) -> int:
    """The network as C or a page, packed again of the weights as they were trained, with its score on the test data."""
    source = packed_file(run)
    from srnn.exporting.exporter import EXPORT_FORMATS, export

    target = _target(output, source.with_name(f"{options['name'] or 'model'}{EXPORT_FORMATS[format].suffix}"), format)
    EXPORT_FORMATS[format].check(**dict(options) | {"name": options["name"] or target.stem})

    from srnn.inference.unpacking import unpack
    from srnn.kernels import Csr
    from srnn.terminal import console

    weights: Any = "int8" if options["values"] == "w8a8" else options["values"]
    again = _packed_again(run, source, weights, options["structure"])
    of_run = again.of_run
    network: Any = unpack(again.exported, Csr())
    network.vocabulary = again.exported.vocabulary
    before = "pruned, not packed, fp32" if again.trained else source.name
    scores: dict[str, Mapping[str, float]] = {}

    def about(written: nn.Module) -> str:
        for row, scored in ((before, again.model), ("exported", written)):
            scores[row] = of_run.objective.score(scored, of_run.data, "test")
        of, on = again.exported.model["name"], again.exported.about["dataset"]["name"]
        words = _in_words(of_run, scores["exported"])
        return f"{of} on {on}, test: {words}\nWeights: {_formats(again.exported)}. Written by srnn {__version__}."

    example = next(iter(of_run.data.val_dataloader()))[0]

    def tell(costs: str) -> None:
        console.print(costs, soft_wrap=True, highlight=False)

    report = export(network, target, format, example, about, tell, **options)
    console.print(str(report), soft_wrap=True, highlight=False)
    told = of_run.objective.telling
    cost = f"{scores['exported'][told] - scores[before][told]:+z.4f} {told.replace('_', ' ')}"
    words = _in_words(of_run, scores["exported"])
    console.print(f"test: {words}; costs {cost} over {before!r}", soft_wrap=True)
    return 0


def _in_words(of_run: TrainedRun, scores: Mapping[str, float]) -> str:
    """The scores of a network, as its objective tells them."""
    vocabulary = of_run.packed.vocabulary
    level = vocabulary.level.removesuffix("s") if vocabulary else ""
    return of_run.objective.words.format(**scores, a_token=f" a {level}" if level in ("word", "byte") else "")


def _target(output: str | None, default: Path, format: str) -> Path:
    """The file to write; its folder is made and tried before anything is scored."""
    target = expanded(output or default)
    if target.suffix != default.suffix or (target.exists() and not target.is_file()):
        raise UserError(f"export: --output={target} must be a file named *{default.suffix}.{_instead(format, target)}")
    output_folder(target.parent)
    return target


def _instead(format: str, target: Path) -> str:
    from srnn.exporting.exporter import EXPORT_FORMATS, of_other_suffixes

    suffixes = {"packed": ".safetensors"} | {name: known.suffix for name, known in EXPORT_FORMATS.items()}
    spelt = {f"format={name}": suffix for name, suffix in suffixes.items()}
    return of_other_suffixes(spelt, f"format={format}", target.suffix)


def _pack_again(run: str, values: ValuesChoice, structure: StructureChoice, output: str | None) -> int:
    """Another packed file, scored beside the run's."""
    source = packed_file(run)
    target = _target(output, source.with_name(f"model-{values}-{structure}.safetensors"), "packed")
    if target.exists() and target.samefile(source):
        raise UserError(f"export: --output={target} is the packed file that is read: name another, and it stays.")

    from srnn.inference.packed_file import read, write
    from srnn.inference.unpacking import unpack
    from srnn.recording.environment import changed_data
    from srnn.terminal import console

    again = _packed_again(run, source, values, structure)
    of_run, packed, model, exported = again.of_run, again.of_run.packed, again.model, again.exported
    data = of_run.data
    dense_bytes, source_bytes = 4 * sum(weight.numel() for weight in model.parameters()), source.stat().st_size
    write(target, exported)
    target_bytes = target.stat().st_size
    rows = {
        f"{source.name}, {_formats(packed)}": (source_bytes, unpack(packed)),
        f"exported, {_formats(exported)}": (target_bytes, unpack(read(target))),
    }
    if again.trained:
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


@dataclass(frozen=True)
class _Again:
    """A run's network packed again.

    Attributes:
        of_run: the run as it was read back.
        model: the weights it was packed of, dense.
        trained: whether these are as they were trained; else they are those of the packed file.
        exported: the network, packed.
    """

    of_run: Any
    model: nn.Module
    trained: bool
    exported: PackedModel


def _packed_again(run: str, source: Path, values: ValuesChoice, structure: StructureChoice) -> _Again:
    """Raises UserError if weights are not pruned in these blocks, or none has zeros."""
    from srnn.inference.packing import pack
    from srnn.inference.unpacking import unpack
    from srnn.inference.weights import read_weights
    from srnn.training.preparing import read_back
    from srnn.training.verifying import calibration

    of_run = read_back(source)
    packed, model = of_run.packed, unpack(of_run.packed)
    checkpoint = RunFolder(source.parent).best
    trained = expanded(run).is_dir() and checkpoint.exists()
    if trained:  # fp32, where the packed file is rounded
        model.load_state_dict(read_weights(checkpoint))
    energies = calibration(model, of_run.data) if values == "int8" else None
    exported = pack(model, packed.model, packed.supplied, values, structure, energies)
    if not exported.matrices:
        raise UserError(f"export: no matrix of {run} holds enough zeros to be packed.")
    exported = replace(exported, vocabulary=packed.vocabulary, about=packed.about)
    return _Again(of_run, model, trained, exported)


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
