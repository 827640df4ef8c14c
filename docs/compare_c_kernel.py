"""Exported C against the compiled step of ``kernel=cpu``: one step of one stream, on one thread.

    python docs/compare_c_kernel.py docs/results/c_as_kernel.csv

It needs cc. The twelve networks of ``bench=small`` at 90 %, fp32. C is measured in two ways: called by itself, with the
state in the caller's struct; and as a kernel in the compiled step's place, which takes a state as tensors and gives a
new one. All take turns in shuffled order; a time is the median of 4 ms of calls, the least of 25 turns.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.bench.small_networks import NETWORKS, SmallNetwork
from srnn.cells import GATES, cell_of
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.program import Program, c_program
from srnn.exporting.reading import read_chain
from srnn.files import csv_bytes
from srnn.inference.one_call import OneCall
from srnn.inference.sparsify import sparsify
from srnn.kernels.contract import State
from srnn.kernels.timing import hardware
from srnn.models import SequenceModel

TURNS, TURN = 25, 4e-3
NATIVE = "-O3 -march=native"
ADDRESS = ctypes.c_void_p


@dataclass(frozen=True)
class Row:
    """Microseconds of a step.

    Attributes:
        step_us: ``network.step`` with ``kernel=cpu``.
        forward_us: the layers and the decoder called one after the other.
        kernel_us: ``network.step`` with C in the compiled step's place.
        c_us: C by itself.
        c_plain_us: the same without ``-march=native``.
    """

    device: str
    network: str
    structure: str
    step_us: float
    forward_us: float
    kernel_us: float
    c_us: float
    c_plain_us: float
    step_over_kernel: float
    step_over_c: float


def masked(shape: SmallNetwork, format: Format) -> Any:
    """The network with random weights."""
    torch.manual_seed(1)
    network = SequenceModel(shape.cell, shape.inputs, shape.outputs, shape.hidden, shape.layers).eval()
    generator = torch.Generator().manual_seed(2)
    for name, weight in network.named_parameters():
        if weight.ndim == 2:
            gates = GATES[cell_of(network.rnn)] if name.startswith("rnn") else 1
            weight.data = pruned(*weight.shape, gates, format, generator).float()
    return network.requires_grad_(False)


def as_kernel(shape: SmallNetwork) -> str:
    """C that copies a state into the struct, steps, and copies the new one out."""
    ins, outs = [], []
    for layer in range(shape.layers):
        for part in "hc" if shape.cell is nn.LSTM else "h":
            member, at = f"s.{part}{layer}", layer * shape.hidden
            ins.append(f"memcpy({member}, {part}0 + {at}, sizeof {member});")
            outs.append(f"memcpy({part} + {at}, {member}, sizeof {member});")
    parameters = "const float *x, const float *h0, const float *c0, float *y, float *h, float *c"
    lines = "\n".join(["net_state s;", *ins, "net_step(&s, x, y);", *outs])
    return f"#include <string.h>\nvoid net_kernel({parameters})\n{{\n{lines}\n}}\n"


def compiled(program: Program, shape: SmallNetwork, flags: str, folder: Path) -> ctypes.CDLL:
    """The program and ``as_kernel`` as a library."""
    folder.mkdir()
    (folder / "net.h").write_text(program.header)
    (folder / "net.c").write_text(program.source + as_kernel(shape))
    command = ["cc", "-std=c99", "-shared", "-fPIC", *flags.split(), "-o", "net.so", "net.c"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "net.so"))
    for function, count in ((library.net_reset, 1), (library.net_step, 3), (library.net_kernel, 6)):
        function.argtypes, function.restype = [ADDRESS] * count, None
    return library


def stream(library: ctypes.CDLL, program: Program, outputs: int) -> Callable[[Tensor], Tensor]:
    """C by itself."""
    step, memory = library.net_step, torch.zeros(program.ram // 4)
    at = memory.data_ptr()
    library.net_reset(at)

    def call(x: Tensor, _memory: Tensor = memory) -> Tensor:
        y = torch.empty(1, outputs)
        step(at, x.data_ptr(), y.data_ptr())
        return y

    return call


class Kernel:
    """C in the compiled step's place: checks and allocates what that does."""

    def __init__(self, library: ctypes.CDLL, replaced: Any) -> None:
        self.call, self.replaced = library.net_kernel, replaced

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """As ``NetworkStep``."""
        one, h0, c0 = self.replaced, state[0], state[-1]
        if x.dtype != one.kind or x.shape != one.input or not x.is_contiguous():
            return None
        for part in state:
            if part.dtype != torch.float32 or part.shape != one.state or not part.is_contiguous():
                return None
        y, h = torch.empty(1, one.outputs), torch.empty_like(h0)
        c = torch.empty_like(c0) if one.lstm else h
        self.call(x.data_ptr(), h0.data_ptr(), c0.data_ptr(), y.data_ptr(), h.data_ptr(), c.data_ptr())
        return y, (h, c) if one.lstm else (h,)


def measured(shape: SmallNetwork, structure: str, folder: Path) -> Row:
    """Outputs compared over a few steps, then all timed in turns."""
    dense = masked(shape, Format(0.9, structure, "fp32"))
    network, other = (sparsify(dense, "auto", "fp32", "cpu") for _ in range(2))
    program = c_program(packed_chain(read_chain(dense), "fp32", "auto"), "net", "net")
    libraries = [compiled(program, shape, f, folder / str(i)) for i, f in enumerate((NATIVE, "-O3"))]
    by_itself = [stream(library, program, shape.outputs) for library in libraries]
    xs, state, state_of_c = torch.randn(20, 1, shape.inputs), None, None
    for x in xs:
        y, state = network.step(x, state)
        one = OneCall.of(None, other.rnn, other.decoder)
        if one.run is not None and not isinstance(one.run, Kernel):
            one.run = Kernel(libraries[0], one.run)
        y_of_c, state_of_c = other.step(x, state_of_c)
        for given in (y_of_c, *(call(x) for call in by_itself)):
            assert (given - y).abs().max() <= 1e-5 * max(1.0, float(y.abs().max())), shape
    assert isinstance(OneCall.of(None, other.rnn, other.decoder).run, Kernel)
    calls = {
        "step": lambda: network.step(x, state),
        "forward": lambda: network.decoder(network.rnn(x[:, None], state)[0]),
        "kernel": lambda: other.step(x, state),
        "c": lambda: by_itself[0](x),
        "c_plain": lambda: by_itself[1](x),
    }
    us = least(calls)
    ratios = us["step"] / us["kernel"], us["step"] / us["c"]
    times = {f"{name}_us": round(time, 2) for name, time in us.items()}
    names = ("step_over_kernel", "step_over_c")
    rounded = {name: round(ratio, 2) for name, ratio in zip(names, ratios, strict=True)}
    return Row(f"{hardware(torch.device('cpu'))}; cc", str(shape), structure, **times, **rounded)


def least(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Microseconds of each."""
    best, order = dict.fromkeys(calls, float("inf")), list(calls)
    for _ in range(TURNS):
        random.shuffle(order)
        for name in order:
            times: list[float] = []
            began = time.perf_counter()
            while not times or time.perf_counter() - began < TURN:
                before = time.perf_counter()
                calls[name]()
                times.append(time.perf_counter() - before)
            best[name] = min(best[name], 1e6 * float(np.median(times)))
    return best


def rows() -> Iterator[Row]:
    """All networks in both structures."""
    for shape in NETWORKS:
        for structure in ("16x1", "element"):
            with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
                yield measured(shape, structure, Path(folder))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # a decoder of a few outputs that is stored in single elements
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_bytes(csv_bytes(list(rows())))
