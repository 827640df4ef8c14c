"""Other machines than this one, emulated by qemu: a program is compiled for one, run, and says what it found.

A program is a ``report.h``, which declares ``void say(const char *text)`` and ``unsigned instructions(void)``, and a
``main`` that calls them. Programs of user mode have no count of instructions.
"""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_REPORT = "void say(const char *text);\nunsigned instructions(void);\n"
_HOSTED = """\
#include <stdio.h>
#include "report.h"
void say(const char *text) { puts(text); }
unsigned instructions(void) { return 0; }
"""
# Vectors, and calls to the debugger, which qemu is here: write text, end. Under -icount shift=3 an instruction takes
# 8 ns, and the timer counts at 25 MHz: one every 5 instructions.
_BOARD = """\
#include <stdint.h>
#include "report.h"
extern uint32_t top_of_stack;
int main(void);
static int debugger(int what, const void *with)
{
    register int r0 __asm__("r0") = what;
    register const void *r1 __asm__("r1") = with;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}
void say(const char *text) { debugger(4, text); debugger(4, "\\n"); }
#define TIMER ((volatile uint32_t *)0xE000E010)
unsigned instructions(void) { return 5u * (0xFFFFFFu - TIMER[2]); }
void start(void)
{
    *(volatile uint32_t *)0xE000ED88 |= 0xFu << 20; /* the floating-point unit */
    __asm__ volatile("dsb\\n isb");
    TIMER[1] = 0xFFFFFF;
    TIMER[2] = 0;
    TIMER[0] = 5;
    main();
    debugger(0x18, (const void *)0x20026);
}
static void fault(void) { debugger(0x18, (const void *)0x20024); }
__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    &top_of_stack, (const void *)start, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault};
"""
# The code memory and the RAM of an MPS2 board with the image AN386; qemu loads both.
_LAYOUT = """\
MEMORY { code (rx) : ORIGIN = 0, LENGTH = 4M  ram (rwx) : ORIGIN = 0x20000000, LENGTH = 4M }
ENTRY(start)
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) *(.ARM*) } > code
  .data : { *(.data*) *(.got*) } > ram
  .bss (NOLOAD) : { *(.bss*) *(COMMON) } > ram
  top_of_stack = ORIGIN(ram) + LENGTH(ram);
}
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
        (folder / "report.h").write_text(_REPORT)
        (folder / "machine.c").write_text(_BOARD if self.board else _HOSTED)
        (folder / "board.ld").write_text(_LAYOUT)
        program = "program"
        board = ["-nostartfiles", "--specs=nosys.specs", "-T", "board.ld"] if self.board else ["-static"]
        command = [*self.compiler, "-std=gnu99", *flags, *board, "-o", program, "machine.c", *sources, "-lm"]
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
