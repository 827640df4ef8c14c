"""Instructions of a step of a pruned GRU on a Cortex-M4, as srnn's C and as the dense C of emx-onnx-cgen.

    apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm
    pip install 'srnn[onnx]' emx-onnx-cgen
    python docs/bench_cortex_m4.py docs/results/c_cortex_m4.csv

All programs are of the same network, GRU 64 -> 256 at 90 % zeros, in single elements or in 16 x 1 blocks. qemu runs
them on an MPS2 board with the image AN386 and counts: what else this machine does changes nothing. The third step of
a stream is counted, to the nearest 5 instructions.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

import srnn
from srnn.files import csv_bytes

BOARD = Path(__file__).parent / "board"
GCC = ("arm-none-eabi-gcc", "-mcpu=cortex-m4", "-mthumb", "-std=gnu99", "-nostartfiles", "--specs=nosys.specs")
QEMU = (
    "qemu-system-arm",
    "-M",
    "mps2-an386",
    "-nographic",
    "-monitor",
    "none",
    "-serial",
    "none",
    "-icount",
    "shift=3",
)
MACHINES = {
    "Cortex-M4": ("-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"),
    "Cortex-M4 without FPU": ("-mfloat-abi=soft",),
}
FLAGS = "-O3"
EMX = "emx-onnx-cgen"
MAIN = """\
#include <stdint.h>
#include "board.h"
INCLUDE
int main(void)
{
    DECLARE
    unsigned before = 0, taken = 0;
    for (int t = 0; t < 3; t++) {
        before = instructions();
        CALL
        taken = instructions() - before;
    }
    char text[12];
    int at = 11;
    for (text[at] = 0; taken || at == 11; taken /= 10)
        text[--at] = (char)('0' + taken % 10);
    say(text + at);
    return 0;
}
"""


@dataclass(frozen=True)
class Row:
    """A line of the table. ``fewer_than_dense``: how many times fewer than the dense C on the same machine."""

    machine: str
    compiler: str
    flags: str
    program: str
    values: str
    instructions_a_step: int
    fewer_than_dense: float


def masked(height: int) -> nn.Module:
    """The network, with zeros in blocks of so many rows."""
    torch.manual_seed(0)
    model = nn.GRU(64, 256)
    for weight in (model.weight_ih_l0, model.weight_hh_l0):
        blocks = torch.rand(weight.shape[0] // height, weight.shape[1]) < 0.1
        weight.data.mul_(blocks.repeat_interleave(height, 0))
    return model.eval()


def write_main(folder: Path, include: str, declare: str, call: str) -> None:
    """A program that counts a step, beside the network's C file, ``net.c``."""
    (folder / "main.c").write_text(MAIN.replace("INCLUDE", include).replace("DECLARE", declare).replace("CALL", call))


def write_dense(folder: Path) -> None:
    """The dense C of emx-onnx-cgen, fed by our ONNX."""
    srnn.export(masked(1), folder / "gru.onnx")
    sizes = ["--input-dim", "time=1", "--input-dim", "batch=1", "--restrict-arrays"]
    inline = ["--large-weight-threshold", "0", "--large-temp-threshold", "0"]
    tool = [sys.executable, "-m", "emx_onnx_cgen", "compile", *sizes, *inline, "gru.onnx", "net.c"]
    subprocess.run(tool, cwd=folder, check=True, capture_output=True)
    include = "void model(const float *x, const float *h, float *y, float *next);"
    write_main(folder, include, "static float x[64], h[256], y[256], next[256];", "model(x, h, y, next);")


def write_sparse(folder: Path, structure: str, values: str) -> None:
    """Our C."""
    options = {"values": values, "structure": structure, "verify": False, "example": torch.ones(1, 1, 64)}
    srnn.export(masked(16 if structure == "16x1" else 1), folder / "net.c", "c", **options)
    given, result = ("int8_t", "int32_t") if values == "w8a8" else ("float", "float")
    declare = f"static net_state state; static {given} x[64]; static {result} y[256];"
    write_main(folder, '#include "net.h"', declare, "net_step(&state, x, y);")


def counted(folder: Path, machine: str) -> int:
    """Compile ``main.c`` and ``net.c`` of a folder, run them on the board, return what they say."""
    for name in ("board.c", "board.h", "board.ld"):
        shutil.copy(BOARD / name, folder)
    compiler = [*GCC, *MACHINES[machine], FLAGS, "-T", "board.ld", "-o", "program"]
    subprocess.run([*compiler, "board.c", "main.c", "net.c", "-lm"], cwd=folder, check=True, capture_output=True)
    emulator = [*QEMU, "-semihosting-config", "enable=on,target=native", "-kernel", "program"]
    told = subprocess.run(emulator, cwd=folder, check=True, timeout=300, capture_output=True, text=True)
    return int(told.stdout + told.stderr)  # qemu writes what a board says to either


def version(tool: str) -> str:
    """A tool and the version it tells, such as ``qemu-system-arm 7.2``."""
    told = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
    return " ".join([tool, *re.findall(r"(?<= )\d+\.\d+(?=\.\d)", told)[:1]])


def measure() -> list[Row]:
    """All rows; the dense program is the first of each machine."""
    compiler, rows = f"{version(GCC[0])}, {version(QEMU[0])}", list[Row]()
    dense_program = " ".join([EMX, *re.findall(r"^\d+\.\d+", metadata.version(EMX))])
    with tempfile.TemporaryDirectory() as name:
        programs = {(dense_program, "fp32"): Path(name) / "dense"}
        programs[dense_program, "fp32"].mkdir()
        write_dense(programs[dense_program, "fp32"])
        for structure in ("element", "16x1"):
            for values in ("fp32", "int8", "w8a8"):
                folder = programs[f"srnn {structure}", values] = Path(name) / f"{structure}-{values}"
                folder.mkdir()
                write_sparse(folder, structure, values)
        for machine in MACHINES:
            dense = 0
            for (program, values), folder in programs.items():
                taken = counted(folder, machine)
                dense = dense or taken
                rows.append(Row(machine, compiler, FLAGS, program, values, taken, round(dense / taken, 2)))
    return rows


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(csv_bytes(measure()))
