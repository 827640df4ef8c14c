"""Other machines than this one, emulated by qemu: a program is compiled for one, run, and says what it found.

A program is a ``main`` that calls what ``docs/board/board.h`` declares. Programs of user mode count no instructions.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

_BOARD = ROOT / "docs/board"
_HOSTED = """\
#include <stdio.h>
#include "board.h"
void say(const char *text) { puts(text); }
unsigned instructions(void) { return 0; }
"""


@dataclass(frozen=True)
class Machine:
    """A machine.

    Attributes:
        name: what it is.
        compiler: a command.
        emulator: a command that runs a program; empty for this machine.
        board: whether the program runs without an operating system.
    """

    name: str
    compiler: tuple[str, ...]
    emulator: tuple[str, ...] = ()
    board: bool = False

    @property
    def missing(self) -> str | None:
        """The first tool that is not here."""
        return next((t[0] for t in (self.compiler, self.emulator) if t and shutil.which(t[0]) is None), None)

    def run(self, folder: Path, sources: list[str], flags: tuple[str, ...] = ("-O2",)) -> list[str]:
        """Compile these files of a folder, run the program, return the lines that it says."""
        for name in ("board.c", "board.h", "board.ld"):
            shutil.copy(_BOARD / name, folder)
        if not self.board:
            (folder / "board.c").write_text(_HOSTED)
        program = "program"
        board = ["-nostartfiles", "--specs=nosys.specs", "-T", "board.ld"] if self.board else ["-static"]
        command = [*self.compiler, "-std=gnu99", *flags, *board, "-o", program, "board.c", *sources, "-lm"]
        subprocess.run(command, cwd=folder, check=True, timeout=300, capture_output=True)
        kernel = ["-kernel"] if self.board else []
        done = subprocess.run(
            [*self.emulator, *kernel, f"./{program}"],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # where qemu writes what a board says
            text=True,
            check=True,
            timeout=300,
        )
        return done.stdout.split("\n")[:-1]


_M4 = ("arm-none-eabi-gcc", "-mcpu=cortex-m4", "-mthumb")
_MPS2 = (
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
_MPS2 = (*_MPS2, "-semihosting-config", "enable=on,target=native")
HERE = Machine("this machine", ("gcc",))
ARM = Machine("AArch64", ("aarch64-linux-gnu-gcc",), ("qemu-aarch64",))
RISC_V = Machine("RISC-V", ("riscv64-linux-gnu-gcc",), ("qemu-riscv64",))
CORTEX_M4 = Machine("Cortex-M4", (*_M4, "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), _MPS2, board=True)
CORTEX_M4_SOFT = Machine("Cortex-M4 without FPU", (*_M4, "-mfloat-abi=soft"), _MPS2, board=True)
