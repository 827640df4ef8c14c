"""A pruned GRU as C, by srnn and as the dense C of emx-onnx-cgen: bytes of flash and the time of a step.

    pip install 'srnn[onnx]' emx-onnx-cgen
    python docs/compare_c_export.py docs/results/c_export.csv

It needs gcc. All programs are of the same network, GRU 64 -> 256 at 90 % zeros, in single elements or in 16 x 1 blocks,
and are compiled with the same flags. A step's time is the least of 200 rounds of 100 steps in which the programs take
turns, in another order each round, so that what other processes take counts as little as it can.
"""

from __future__ import annotations

import ctypes
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import srnn
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.compiling import Stream, compiled
from srnn.exporting.c.program import c_program
from srnn.exporting.reading import read_chain
from srnn.files import csv_bytes
from srnn.kernels.choosing import hardware

FLAGS = ("-O3", "-O3 -march=native -ffast-math")
EMX = "emx-onnx-cgen 1.4"
STEPS, ROUNDS = 100, 200
LOOP = """
#include <string.h>
void model(const float *x, const float *h, float *y, float *next);
void many(const float *x, int steps, float *h, float *y);
void many(const float *x, int steps, float *h, float *y)
{
    float next[256];
    for (int t = 0; t < steps; t++) {
        model(x + 64 * t, h, y + 256 * t, next);
        memcpy(h, next, sizeof next);
    }
}
"""


@dataclass(frozen=True)
class Row:
    """A line of the table. ``over_dense``: how many times faster than the dense C of the same flags."""

    device: str
    program: str
    values: str
    zeros: str
    flags: str
    flash_bytes: int
    step_us: float
    over_dense: float = 1.0


def masked(height: int) -> nn.Module:
    """The network, with zeros in blocks of so many rows."""
    torch.manual_seed(0)
    model = nn.GRU(64, 256)
    for weight in (model.weight_ih_l0, model.weight_hh_l0):
        blocks = torch.rand(weight.shape[0] // height, weight.shape[1]) < 0.1
        weight.data.mul_(blocks.repeat_interleave(height, 0))
    return model.eval()


def dense_source(folder: Path) -> Path:
    """The dense C of emx-onnx-cgen, fed by our ONNX."""
    srnn.export(masked(1), folder / "gru.onnx")
    sizes = ["--input-dim", "time=1", "--input-dim", "batch=1", "--restrict-arrays"]
    inline = ["--large-weight-threshold", "0", "--large-temp-threshold", "0"]
    tool = [sys.executable, "-m", "emx_onnx_cgen", "compile", *sizes, *inline]
    subprocess.run([*tool, "gru.onnx", "dense.c"], cwd=folder, check=True, capture_output=True)
    (folder / "loop.c").write_text(LOOP)
    return folder / "dense.c"


def dense_call(source: Path, flags: str, x_TI: np.ndarray) -> tuple[Callable[[], np.ndarray], int]:
    """A function that runs all steps from a zero state, and the bytes of the constants."""
    library = source.with_name(f"dense{abs(hash(flags))}.so")
    command = ["gcc", "-std=c99", "-shared", "-fPIC", *flags.split(), "-o", library.name, "dense.c", "loop.c", "-lm"]
    subprocess.run(command, cwd=source.parent, check=True)
    many = ctypes.CDLL(str(library)).many
    pointer = ctypes.c_void_p
    y_TH = np.zeros((len(x_TI), 256), dtype=np.float32)

    def call() -> np.ndarray:
        h = np.zeros(256, dtype=np.float32)
        many(pointer(x_TI.ctypes.data), len(x_TI), pointer(h.ctypes.data), pointer(y_TH.ctypes.data))
        return y_TH

    return call, 4 * (768 * 64 + 768 * 256 + 1536)


def sparse_call(model: nn.Module, packing: tuple[str, str], folder: Path, flags: str, x_TI: np.ndarray) -> tuple:
    """The same of our C."""
    structure, values = packing
    chain = packed_chain(read_chain(model), values, structure)
    program = c_program(chain, "net", "net")
    folder.mkdir()
    stream = Stream(program, compiled(program, ["gcc"], folder, flags.split()))

    def call() -> np.ndarray:
        stream.reset()
        return stream.run(x_TI)

    return call, program.flash


def wanted(model: nn.Module, x_TI: np.ndarray) -> Tensor:
    """What torch computes."""
    with torch.inference_mode():
        return model(torch.from_numpy(x_TI))[0]


def measure() -> list[Row]:
    """All rows."""
    x_TI = np.random.default_rng(0).standard_normal((STEPS, 64)).astype(np.float32)
    calls, rows = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, device = dense_source(folder), f"{hardware(torch.device('cpu'))}; gcc"
        for flags in FLAGS:
            key = (EMX, "fp32", "stored", flags)
            calls[key], flash = dense_call(source, flags, x_TI)
            rows[key] = Row(device, *key, flash, 0.0)
            for structure, height in (("element", 1), ("16x1", 16)):
                for values in ("fp32", "fp16", "int8"):
                    key = (f"srnn {structure}", values, "left out", flags)
                    where = folder / str(len(calls))
                    calls[key], flash = sparse_call(masked(height), (structure, values), where, flags, x_TI)
                    rows[key] = Row(device, *key, flash, 0.0)
                    away = np.abs(calls[key]() - wanted(masked(height), x_TI).numpy()).max()
                    assert away < (1e-5 if values == "fp32" else 0.02), (key, away)
            assert np.abs(calls[EMX, "fp32", "stored", flags]() - wanted(masked(1), x_TI).numpy()).max() < 1e-5
        best, order = dict.fromkeys(calls, float("inf")), random.Random(0)
        for _ in range(ROUNDS):
            for key, call in order.sample(list(calls.items()), len(calls)):
                began = time.perf_counter()
                call()
                best[key] = min(best[key], time.perf_counter() - began)
    dense = {key[-1]: seconds for key, seconds in best.items() if key[0] == EMX}
    times = {key: round(seconds / STEPS * 1e6, 2) for key, seconds in best.items()}
    return [replace(row, step_us=times[k], over_dense=round(dense[k[-1]] / best[k], 2)) for k, row in rows.items()]


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(csv_bytes(measure()))
