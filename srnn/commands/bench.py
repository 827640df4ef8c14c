"""``python -m srnn bench``: time dense layers against every backend that can run."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from srnn.commands.options import Parser, output_folder, packed_file
from srnn.errors import UserError

T = TypeVar("T")

# Options that a bench takes; those of layers take all but ``config`` and ``run``.
TAKES = {
    "run": {"run", "limit"},
    "network": {"bench", "device", "limit", "output"},
    "pruning": {"bench", "device", "shapes", "output"},
    "stream": {"bench", "steps", "threads", "output"},
    "training": {"bench", "config", "output"},
}


def main(argv: Sequence[str]) -> int:
    """Measure, print tables, write a CSV and a plot."""
    options = _parse(argv)
    if options.run is not None:
        return _bench_run(options)
    if options.bench == "stream":
        return _bench_stream(options)
    if options.bench == "training":
        return _bench_training(options)
    if options.bench == "network":
        return _bench_network(options)
    if options.bench == "pruning":
        return _bench_pruning(options)
    return _bench_layers(options)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = Parser(prog="srnn bench", description="Time dense layers against every backend that can run here.")
    benches = ["paper", "deepbench", "gpu", "network", "stream", "training", "pruning"]
    parser.add_argument("--bench", default="paper", choices=benches,
                        help="named shapes: those of the paper, DeepBench's products, the paper's on a GPU; a whole "
                             "network there; a stream of single steps; training, against a bare loop; pruning "
                             "(%(default)s)")  # fmt: skip
    parser.add_argument("--run", metavar="FOLDER", help="a run's packed network instead, or a packed file")
    parser.add_argument("--shapes", help="such as gru:1024,lstm:512,product:7680x2560 instead of the named ones")
    parser.add_argument("--sparsity", help="such as 0.8,0.9,0.95")
    parser.add_argument("--structure", help="such as element,16x1")
    parser.add_argument("--values", help="such as fp32,fp16,bf16,int8")
    parser.add_argument("--batch", help="streams, or columns of a product, such as 1,4,16")
    parser.add_argument("--device", default=None, choices=["cpu", "cuda"], help="where (cpu; cuda with bench=gpu)")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"],
                        help="of inputs and outputs, and of dense weights (fp32; fp16 with bench=gpu)")  # fmt: skip
    parser.add_argument("--threads", help="of the CPU, such as 1,2 (what torch uses)")
    parser.add_argument("--steps", type=int, help="of a sequence, 1 for streaming (100)")
    parser.add_argument("--kernels", help="sparse backends, such as cpu,csr (all)")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS",
                        help="no case is begun after so long; what was left out is said (%(default)g)")  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", help="for bench.csv and bench.png (outputs/bench_DATE)")
    parser.add_argument("--config", default="", metavar="OPTIONS",
                        help="with bench=training: options of the run, such as 'model=lstm trainer=gpu'")  # fmt: skip
    options = parser.parse(argv)
    _check_taken(options, {key for key, value in vars(options).items() if value != parser.get_default(key)})
    if not options.limit > 0:
        raise UserError(f"bench: --limit={options.limit:g} must be above 0 seconds.")
    return options


def _check_taken(options: Namespace, given: set[str]) -> None:
    """Refuse what would do nothing."""
    kind, name = ("run", options.run) if options.run is not None else ("bench", options.bench)
    takes = TAKES.get("run" if kind == "run" else name, set(vars(options)) - {"run", "config"})
    if useless := sorted(given - takes):
        allowed = ", ".join(sorted(takes - {kind}))
        raise UserError(f"bench: --{useless[0]} does nothing with {kind}={name}, which takes {allowed}.")


def _bench_layers(options: Namespace) -> int:
    import torch

    from srnn.bench.cases import Case
    from srnn.bench.measure import Row, measure
    from srnn.bench.show import plot, table, write_csv
    from srnn.registry import register
    from srnn.terminal import console

    plan = _plan(options, torch.get_num_threads())
    known = [name for name in register.names("kernel") if name not in ("auto", "dense")]
    chosen = _split(options.kernels, str) or tuple(known)
    for name in chosen:
        if name not in known:
            raise UserError(f"bench: --kernels={name}: there are {', '.join(known)}.")
    folder = _folder(options)
    kernels = {name: register.build("kernel", {"name": name}) for name in chosen}
    device = torch.device(options.device or ("cuda" if options.bench == "gpu" else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: device=cuda: torch finds no CUDA GPU here.")
    if options.kernels is None:
        kernels = {name: k for name, k in kernels.items() if k.unasked and k.supports(None, device) is None}
    done: list[Row] = []

    def report(case: Case, found: list[Row]) -> None:
        done.extend(found)
        write_csv(folder / "bench.csv", done)  # each time, so that Ctrl-C loses nothing
        console.print(table(str(case), found))

    if device.type == "cuda" and "triton" in kernels:
        from srnn.bench.gpu import barrier_us

        console.print(f"A barrier over all multiprocessors takes {barrier_us(device):.2f} us.")
    rows, left_out = measure(plan, kernels, device, options.limit, report)
    write_csv(folder / "bench.csv", rows)
    drawn = plot(folder / "bench.png", rows)
    for line in dict.fromkeys(left_out):
        console.print(f"left out: {line}", markup=False, soft_wrap=True)
    console.print(f"Rows in {folder / 'bench.csv'}" + (f", plot in {folder / 'bench.png'}" * drawn), soft_wrap=True)
    return 1 if any(row.median_us is None for row in rows) else 0


def _plan(options: Namespace, threads: int) -> Any:
    from srnn.bench.cases import FLOATS, NAMED, Plan, Shape, check_structures
    from srnn.sparse import DTYPES

    shapes = _split(options.shapes, Shape.parse)
    plan = NAMED[options.bench] if shapes is None else Plan(shapes, threads=(threads,))
    if options.bench == "gpu" and shapes is not None:
        plan = replace(NAMED["gpu"], shapes=shapes)
    structures = _split(options.structure, str)
    values = _split(options.values, str)
    check_structures(structures or ())
    for name in values or ():
        if name not in DTYPES:
            raise UserError(f"bench: --values={name}: there are {', '.join(DTYPES)}.")
    given: dict[str, Any] = {
        "sparsities": _split(options.sparsity, _number("--sparsity", float, 0, 0.9999)),
        "structures": structures,
        "values": values,
        "dtype": None if options.dtype is None else FLOATS[options.dtype],
        "batches": _split(options.batch, _number("--batch", int, 1, 1 << 16)),
        "threads": _split(options.threads, _number("--threads", int, 1, os.cpu_count() or 1)),
        "steps": None if options.steps is None else _number("--steps", int, 1, 1 << 20)(str(options.steps)),
    }
    return replace(plan, **{name: value for name, value in given.items() if value is not None})


def _split(text: str | None, parse: Callable[[str], T]) -> tuple[T, ...] | None:
    return None if text is None else tuple(parse(part.strip()) for part in text.split(","))


def _number(option: str, kind: Callable[[str], T], least: float, most: float) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:  # type: ignore[operator]
            raise UserError(f"bench: {option}={text} must be a number from {least:g} to {most:g}.")
        return value

    return parse


def _folder(options: Namespace) -> Path:
    return output_folder(Path(options.output or f"outputs/bench_{datetime.now():%Y-%m-%d_%H-%M-%S}"))


def _bench_run(options: Namespace) -> int:
    """A run's network, on its best dense modules and on each backend."""
    import torch

    from srnn.inference.latency import STEPS, latencies
    from srnn.inference.packed_file import read
    from srnn.inference.unpacking import unpack
    from srnn.registry import register

    path = packed_file(options.run)
    packed = read(path)
    models: dict[str, Any] = {}
    for name in ["dense", *(n for n in register.names("kernel") if n != "dense")]:
        kernel = register.build("kernel", {"name": name})
        if kernel.unasked and kernel.supports(None, torch.device("cpu")) is None:
            models[name] = unpack(packed, kernel)
    random = torch.Generator().manual_seed(0)
    if "vocabulary_size" in packed.supplied:
        inputs_T = torch.randint(packed.supplied["vocabulary_size"], (STEPS,), generator=random)
    else:
        inputs_T = torch.randn(STEPS, packed.supplied["input_size"], generator=random)
    with torch.inference_mode():
        truth = unpack(packed).double()(inputs_T[None].double() if inputs_T.is_floating_point() else inputs_T[None])[0]
        for name, model in models.items():
            error = float((model(inputs_T[None])[0] - truth).norm() / truth.norm())
            if not error <= 1e-4:
                raise UserError(f"bench: {name} computes {path} wrong, its error is {error:.1e}; please report it.")
    found = latencies(models, inputs_T, min(30.0, options.limit / 2))
    _print_latencies(f"{path}, one stream, {torch.get_num_threads()} threads", found)
    return 0


def _print_latencies(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    from rich.table import Table

    from srnn.terminal import console

    made = Table(title=title, title_justify="left")
    for column in ("what", "backend", "median", "over dense"):
        made.add_column(column, justify="right" if column in ("median", "over dense") else "left")
    for kind, times in found.items():
        for name, seconds in times.items():
            made.add_row(kind, name, f"{1e6 * seconds:,.0f} us", f"{times['dense'] / seconds:.2f}x")
        made.add_section()
    console.print(made)


def _bench_stream(options: Namespace) -> int:
    """Two layers, one step after the other, 90 % in 16x1 blocks."""
    import torch

    from srnn.bench.stream import networks
    from srnn.inference.latency import stream
    from srnn.terminal import console

    steps = 10_000 if options.steps is None else options.steps
    folder = _folder(options)
    lines = ["network,threads,steps,p50_us,p99_us,mean_us"]
    threads_before = torch.get_num_threads()
    for threads in _split(options.threads, _number("--threads", int, 1, os.cpu_count() or 1)) or (1,):
        torch.set_num_threads(threads)
        models, x_TBI = networks()
        found = stream(models, x_TBI, steps)
        for name, row in found.items():
            lines.append(f"{name},{threads},{steps},{row['p50_us']:.1f},{row['p99_us']:.1f},{row['mean_us']:.1f}")
            console.print(lines[-1], markup=False)
    torch.set_num_threads(threads_before)
    from srnn.files import write_atomically

    write_atomically(folder / "stream.csv", "\n".join([*lines, ""]).encode())
    console.print(f"Rows in {folder / 'stream.csv'}", soft_wrap=True)
    return 0


def _bench_network(options: Namespace) -> int:
    """Tokens a second of a whole network on a GPU, dense and sparse, in turns."""
    import torch

    from srnn.bench.gpu import LAYERS, SIZE, STEPS, VOCABULARY, network_calls
    from srnn.files import write_atomically
    from srnn.kernels.choosing import hardware
    from srnn.kernels.timing import interleaved
    from srnn.terminal import console

    device = torch.device("cuda")
    if options.device == "cpu":
        raise UserError("bench: bench=network runs on a CUDA GPU, not with device=cpu.")
    if not torch.cuda.is_available():
        raise UserError("bench: bench=network: torch finds no CUDA GPU here.")
    folder = _folder(options)
    calls = network_calls(device, torch.float16)
    times = interleaved({"; ".join(key): call for key, call in calls.items()}, device, 50, options.limit)
    console.print(f"Embedding, {LAYERS} x GRU {SIZE}, {VOCABULARY} logits; fp16, batch 1, sequences of {STEPS}")
    lines = ["device,network,what,rounds,median_us,p20_us,p80_us,tokens_per_second"]
    for (network, what), seconds in zip(calls, times.values(), strict=True):
        low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        tokens = (STEPS if what.startswith("sequence") else 1) / middle
        figures = ",".join(f"{1e6 * x:.1f}" for x in (middle, low, high))
        lines.append(f'"{hardware(device)}",{network},"{what}",{len(seconds)},{figures},{tokens:.0f}')
        console.print(f"{network}, {what}: {1e6 * middle:,.1f} us, {tokens:,.0f} tokens a second", markup=False)
    write_atomically(folder / "network.csv", "\n".join([*lines, ""]).encode())
    console.print(f"Rows in {folder / 'network.csv'}", soft_wrap=True)
    return 0


def _bench_training(options: Namespace) -> int:
    """A pass of the run's own loop over a pass of a bare one."""
    import torch

    from srnn.bench.training import compare
    from srnn.config.composing import compose_settings
    from srnn.files import write_atomically
    from srnn.terminal import console

    settings = compose_settings(options.config.split())
    if settings.trainer.epochs < 5:
        raise UserError("bench: training needs five epochs, for the schedule of pruning: trainer.limit_epochs=5.")
    folder = _folder(options)
    passes = compare(settings)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    lines = ["loop,ms_per_step,ratio,steps,pruning_share,device,torch,options"]
    for row in passes:
        ratio, step = row.seconds / passes[0].seconds, 1e3 * row.seconds / row.steps
        lines.append(
            f'"{row.loop}",{step:.3f},{ratio:.3f},{row.steps},{row.pruning_share:.4f},{device},{torch.__version__},'
            f'"{options.config}"'
        )
        console.print(f"{row.loop}: {step:.3f} ms a step, {ratio:.2f}x of the bare loop")
    write_atomically(folder / "training.csv", "\n".join([*lines, ""]).encode())
    console.print(f"Rows in {folder / 'training.csv'}", soft_wrap=True)
    return 0


def _bench_pruning(options: Namespace) -> int:
    """What updates and masking cost, and the memory they take."""
    import torch

    from srnn.bench.cases import Shape
    from srnn.bench.pruning import rows
    from srnn.bench.show import write_csv
    from srnn.terminal import console

    device = torch.device(options.device or "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("bench: device=cuda: torch finds no CUDA GPU here.")
    # On a GPU also 100 million weights, of which an update must not make a copy.
    usual = "gru:2560,product:20000x5000" if device.type == "cuda" else "gru:256,gru:1024"
    shapes = _split(options.shapes or usual, Shape.parse)
    assert shapes is not None
    folder, done = _folder(options), []
    for row in rows(shapes, device):
        done.append(row)
        memory = "" if row.extra_bytes is None else f", {row.extra_bytes / (4 * row.weights):.2f}x the weights' memory"
        training = (
            "" if row.share is None else f", {100 * row.share:.1f} % of a training step of {row.training_ms:.1f} ms"
        )
        console.print(
            f"{row.shape} {row.method}: {row.weights:,} weights, update {row.update_ms:.2f} ms{memory}, "
            f"other steps {row.step_ms:.3f} ms{training}", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        write_csv(folder / "pruning.csv", done)
    console.print(f"Rows in {folder / 'pruning.csv'}", soft_wrap=True)
    return 0
