"""``python -m srnn bench``: time dense layers against every backend that can run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from srnn.commands.options import FloatsChoice, Help, call, output_folder, packed_file
from srnn.errors import UserError
from srnn.files import csv_bytes, write_atomically
from srnn.registry import Range

if TYPE_CHECKING:
    import torch

    from srnn.bench.cases import Case, LayerPlan
    from srnn.bench.layers import LayerRow
    from srnn.bench.pruning_cost import PruningRow

_T = TypeVar("_T")
_Bench = Literal["paper", "deepbench", "gpu", "network", "small", "stream", "training", "pruning"]

_BENCH = (
    "named shapes: those of the paper, DeepBench's products, the paper's on a GPU; a whole network there; small "
    "networks on a CPU; a stream of single steps; training, against a bare loop; pruning"
)
_SHAPES = "such as gru:1024,lstm:512,product:7680x2560 instead of the named ones"
_DTYPE = "of inputs and outputs, and of dense weights (fp32; fp16 with bench=gpu)"
_LIMIT = "no case is begun after so long; what was left out is said"
_OUTPUT = "for bench.csv and bench.png (outputs/bench_DATE)"
_SHARD = "with bench=small: 2/30 measures the third of 30 shares, for processes beside each other"
_CONFIG = "with bench=training: options of the run, such as 'model=lstm trainer=gpu'"

# Options that a bench takes; those of layers take all but ``config`` and ``run``.
_TAKES = {
    "run": {"run", "limit"},
    "network": {"bench", "device", "limit", "output"},
    "pruning": {"bench", "device", "shapes", "output"},
    "small": {"bench", "sparsity", "structure", "values", "limit", "output", "shard"},
    "stream": {"bench", "steps", "threads", "output"},
    "training": {"bench", "config", "output"},
}


@dataclass(frozen=True)
class BenchOptions:
    """Time dense layers against every backend that can run here."""

    bench: Annotated[_Bench, Help(_BENCH)] = "paper"
    run: Annotated[str | None, Help("a run's packed network instead, or a packed file", metavar="RUN")] = None
    shapes: Annotated[str | None, Help(_SHAPES)] = None
    sparsity: Annotated[str | None, Help("such as 0.8,0.9,0.95")] = None
    structure: Annotated[str | None, Help("such as element,16x1")] = None
    values: Annotated[str | None, Help("such as fp32,fp16,bf16,int8")] = None
    batch: Annotated[str | None, Help("streams, or columns of a product, such as 1,4,16")] = None
    device: Annotated[Literal["cpu", "cuda"] | None, Help("where (cpu; cuda with bench=gpu)")] = None
    dtype: Annotated[FloatsChoice | None, Help(_DTYPE)] = None
    threads: Annotated[str | None, Help("of the CPU, such as 1,2 (what torch uses)")] = None
    steps: Annotated[int | None, Help("of a sequence, 1 for streaming (100)")] = None
    kernels: Annotated[str | None, Help("sparse backends, such as cpu,csr (all)")] = None
    limit: Annotated[float, Help(_LIMIT, metavar="SECONDS")] = 600.0
    output: Annotated[str | None, Help(_OUTPUT, metavar="FOLDER")] = None
    config: Annotated[str, Help(_CONFIG, metavar="OPTIONS")] = ""
    shard: Annotated[str, Help(_SHARD, metavar="K/N")] = "0/1"


def main(argv: Sequence[str]) -> int:
    """Measure, print tables, write a CSV and a plot."""
    options = call(BenchOptions, argv)
    _check_taken(options)
    if not options.limit > 0:
        raise UserError(f"bench: --limit={options.limit:g} must be above 0 seconds.")
    if options.run is not None:
        return _packed(options.run, options.limit)
    others = {"stream": _stream, "training": _training, "network": _network, "small": _small, "pruning": _pruning}
    return others.get(options.bench, _layers)(options)


def _check_taken(options: BenchOptions) -> None:
    """Refuse what would do nothing."""
    given = {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    kind, name = ("run", options.run) if options.run is not None else ("bench", options.bench)
    of_layers = {field.name for field in fields(options)} - {"run", "config", "shard"}
    takes = _TAKES.get("run" if kind == "run" else options.bench, of_layers)
    if useless := sorted(given - takes):
        allowed = ", ".join(sorted(takes - {kind}))
        raise UserError(f"bench: --{useless[0]} does nothing with {kind}={name}, which takes {allowed}.")


def _layers(options: BenchOptions) -> int:
    import torch

    from srnn.bench.layer_report import layer_table, plot_layers
    from srnn.bench.layers import LayerRow, barrier_us, measure_layers
    from srnn.bench.verdict import layers_verdict
    from srnn.terminal import console

    plan = _plan(options, torch.get_num_threads())
    known = _known_kernels()
    chosen = _split(options.kernels, str) or known
    for name in chosen:
        if name not in known:
            raise UserError(f"bench: --kernels={name}: there are {', '.join(known)}.")
    folder = _folder(options)
    device = _device(options, "cuda" if options.bench == "gpu" else "cpu")
    kernels = _kernels(chosen, device, asked=options.kernels is not None)
    columns = [field.name for field in fields(LayerRow)]
    done: list[LayerRow] = []

    def report(case: Case, found: list[LayerRow]) -> None:
        done.extend(found)
        _write(folder / "bench.csv", done, columns=columns)  # each time, so that Ctrl-C loses nothing
        console.print(layer_table(str(case), found))

    if device.type == "cuda" and "triton" in kernels:
        console.print(f"A barrier over all multiprocessors takes {barrier_us(device):.2f} us.")
    rows, left_out = measure_layers(plan, kernels, device, options.limit, report)
    _write(folder / "bench.csv", rows, columns=columns)
    drawn = plot_layers(folder / "bench.png", rows)
    for line in dict.fromkeys(left_out):
        console.print(f"left out: {line}", soft_wrap=True)
    console.print(f"Rows in {folder / 'bench.csv'}" + (f", plot in {folder / 'bench.png'}" * drawn), soft_wrap=True)
    if verdict := layers_verdict(rows):
        console.print(verdict, soft_wrap=True)
    return 1 if any(row.median_us is None for row in rows) else 0


def _plan(options: BenchOptions, threads: int) -> LayerPlan:
    from srnn.bench.cases import FLOAT_DTYPES, LAYER_PLANS, LayerPlan, LayerShape

    shapes = _split(options.shapes, LayerShape.parse)
    plan = LAYER_PLANS[options.bench] if shapes is None else LayerPlan(shapes, threads=(threads,))
    if options.bench == "gpu" and shapes is not None:
        plan = replace(LAYER_PLANS["gpu"], shapes=shapes)
    structures = _split(options.structure, str)
    values = _split(options.values, str)
    _check_formats(structures, values)
    given: dict[str, Any] = {
        "sparsities": _split(options.sparsity, _number("--sparsity", float, 0, 0.9999)),
        "structures": structures,
        "values": values,
        "dtype": None if options.dtype is None else FLOAT_DTYPES[options.dtype],
        "batches": _split(options.batch, _number("--batch", int, 1, 1 << 16)),
        "threads": _threads(options),
        "steps": _steps(options),
    }
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def _check_formats(structures: Sequence[str] | None, values: Sequence[str] | None) -> None:
    from srnn.bench.cases import check_structures
    from srnn.formats import DTYPES

    check_structures(tuple(structures or ()))
    for name in values or ():
        if name not in DTYPES:
            raise UserError(f"bench: --values={name}: there are {', '.join(DTYPES)}.")


def _known_kernels() -> tuple[str, ...]:
    from srnn.registry import register

    return tuple(name for name in register.names("kernel") if name not in ("auto", "dense"))


def _kernels(names: Sequence[str], device: torch.device, asked: bool) -> dict[str, Any]:
    """The backends; of those nobody asked for, only what can run here."""
    from srnn.registry import register

    kernels = {name: register.build("kernel", {"name": name}) for name in names}
    return {n: k for n, k in kernels.items() if asked or (k.unasked and k.supports(None, device) is None)}


def _packed(run: str, limit: float) -> int:
    import torch
    from rich.table import Table

    from srnn.bench.packed_network import measure_packed
    from srnn.bench.verdict import packed_verdict
    from srnn.terminal import console, plural

    path = packed_file(run)
    rows = measure_packed(path, limit)
    console.print(f"{path}", soft_wrap=True)
    made = Table(title=f"one stream, {plural(torch.get_num_threads(), 'thread')}", title_justify="left")
    for column in ("what", "backend", "median", "over dense"):
        made.add_column(column, justify="right" if column in ("median", "over dense") else "left")
    for what, several in groupby(rows, key=lambda row: row.what):
        for row in several:
            made.add_row(what, row.backend, f"{1e6 * row.seconds:,.0f} us", f"{row.over_dense:.2f}x")
        made.add_section()
    console.print(made)
    console.print(packed_verdict(rows), soft_wrap=True)
    return 0


def _stream(options: BenchOptions) -> int:
    from srnn.bench.stream import measure_stream
    from srnn.bench.verdict import stream_verdict
    from srnn.terminal import console

    steps, threads = _steps(options) or 10_000, _threads(options) or (1,)
    folder, rows = _folder(options), []
    for row in measure_stream(steps, threads):
        rows.append(row)
        console.print(csv_bytes([row]).decode().splitlines()[1])
    return _finish(folder / "stream.csv", rows, stream_verdict(rows))


def _small(options: BenchOptions) -> int:
    import time

    from srnn.bench.small_networks import measure_small, small_cases
    from srnn.bench.verdict import small_verdict
    from srnn.terminal import console

    structures, values = _split(options.structure, str), _split(options.values, str)
    sparsities = _split(options.sparsity, _number("--sparsity", float, 0, 0.9999))
    _check_formats(structures, values)
    share, shares = _shard(options.shard)
    sparsities, structures = sparsities or (0.5, 0.7, 0.8, 0.9, 0.95), structures or ("element", "16x1")
    cases = small_cases(sparsities, structures, values or ("fp32",))
    began, rows = time.monotonic(), []
    folder = _folder(options)
    for shape, format in cases[share::shares]:
        if time.monotonic() - began > options.limit:
            console.print(f"left out: {shape}, {format}: the time was over (--limit={options.limit:g})", soft_wrap=True)
            continue
        for row in measure_small(shape, format):
            rows.append(row)
            figures = f"auto {row.auto_us:,.0f} us, {row.dense} {row.auto_us * row.auto_over_dense:,.0f} us"
            console.print(f"{shape}, {format}, T={row.steps}: {figures} ({row.auto_over_dense:.2f}x)", soft_wrap=True)
        _write(folder / "small.csv", rows, quoted=("device", "network", "chosen"))
    return _finish(folder / "small.csv", rows, small_verdict(rows), quoted=("device", "network", "chosen"))


def _shard(text: str) -> tuple[int, int]:
    share, _, shares = text.partition("/")
    if not (share.isdecimal() and shares.isdecimal() and int(share) < int(shares)):
        raise UserError(f"bench: --shard={text}: write K/N, the share K, from 0, of N.")
    return int(share), int(shares)


def _network(options: BenchOptions) -> int:
    import torch

    from srnn.bench.gpu_network import MEASURED_NETWORK, measure_network
    from srnn.bench.verdict import network_verdict
    from srnn.terminal import console

    if options.device == "cpu":
        raise UserError("bench: bench=network runs on a CUDA GPU, not with device=cpu.")
    if not torch.cuda.is_available():
        raise UserError("bench: bench=network: torch finds no CUDA GPU here.")
    folder = _folder(options)
    rows = measure_network(torch.device("cuda"), options.limit)
    console.print(MEASURED_NETWORK)
    for row in rows:
        figures = f"{row.median_us:,.1f} us, {row.tokens_per_second:,} tokens a second"
        console.print(f"{row.network}, {row.what}: {figures}")
    return _finish(folder / "network.csv", rows, network_verdict(rows), quoted=("device", "what"))


def _training(options: BenchOptions) -> int:
    from srnn.bench.training_loop import compare_loops
    from srnn.config.command_line import told_of_sweep
    from srnn.config.composing import compose_settings, split_overrides
    from srnn.terminal import console

    settings = compose_settings(overrides := split_overrides(options.config))
    if told := told_of_sweep(overrides):
        console.print(f"Note: {told}", soft_wrap=True)
    if settings.trainer.epochs < 5:
        raise UserError("bench: training needs five epochs, for the schedule of pruning: trainer.limit_epochs=5.")
    folder = _folder(options)
    rows = compare_loops(settings, options.config)
    for row in rows:
        console.print(f"{row.loop}: {row.ms_per_step:.3f} ms a step, {row.ratio:.2f}x of the bare loop")
    return _finish(folder / "training.csv", [row.rounded() for row in rows], quoted=("loop", "options"))


def _pruning(options: BenchOptions) -> int:
    from srnn.bench.cases import LayerShape
    from srnn.bench.pruning_cost import measure_pruning
    from srnn.terminal import console

    device = _device(options, "cpu")
    # On a GPU also 100 million weights, of which an update must not make a copy.
    usual = "gru:2560,product:20000x5000" if device.type == "cuda" else "gru:256,gru:1024"
    shapes = _split(options.shapes or usual, LayerShape.parse) or ()
    folder, rows = _folder(options), []
    for row in measure_pruning(shapes, device):
        rows.append(row)
        console.print(_pruning_line(row), highlight=False, soft_wrap=True)
        _write(folder / "pruning.csv", rows)
    return _finish(folder / "pruning.csv", rows)


def _pruning_line(row: PruningRow) -> str:
    memory = training = ""
    if row.extra_bytes is not None:
        memory = f", {row.extra_bytes / (4 * row.weights):.2f}x the weights' memory"
    if row.share is not None:
        training = f", {100 * row.share:.1f} % of a training step of {row.training_ms:.1f} ms"
    return (
        f"{row.shape} {row.method}: {row.weights:,} weights, update {row.update_ms:.2f} ms{memory}, "
        f"other steps {row.step_ms:.3f} ms{training}"
    )


def _device(options: BenchOptions, default: str) -> torch.device:
    import torch

    device = torch.device(options.device or default)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: device=cuda: torch finds no CUDA GPU here.")
    return device


def _steps(options: BenchOptions) -> int | None:
    return None if options.steps is None else _number("--steps", int, 1, 1 << 20)(str(options.steps))


def _threads(options: BenchOptions) -> tuple[int, ...] | None:
    return _split(options.threads, _number("--threads", int, 1, os.cpu_count() or 1))


def _split(text: str | None, parse: Callable[[str], _T]) -> tuple[_T, ...] | None:
    return None if text is None else tuple(parse(part.strip()) for part in text.split(","))


def _number(option: str, kind: Callable[[str], _T], least: float, most: float) -> Callable[[str], _T]:
    allowed = Range(ge=least, le=most)

    def parse(text: str) -> _T:
        try:
            value = kind(text)
        except ValueError:
            raise UserError(f"bench: {option}={text} must be a number {allowed}.") from None
        try:
            allowed.check(value)
        except ValueError as error:
            raise UserError(f"bench: {option}={text} {str(error).replace('be', 'be a number', 1)}.") from None
        return value

    return parse


def _folder(options: BenchOptions) -> Path:
    return output_folder(Path(options.output or f"outputs/bench_{datetime.now():%Y-%m-%d_%H-%M-%S}"))


def _write(path: Path, rows: Sequence[Any], columns: Sequence[str] | None = None, quoted: Sequence[str] = ()) -> None:
    write_atomically(path, csv_bytes(rows, columns, quoted))


def _finish(path: Path, rows: Sequence[Any], verdict: str | None = None, quoted: Sequence[str] = ()) -> int:
    from srnn.terminal import console

    _write(path, rows, quoted=quoted)
    console.print(f"Rows in {path}", soft_wrap=True)
    if verdict is not None:
        console.print(verdict, soft_wrap=True)
    return 0
