"""Compiling a generated program with whatever compiler is there, and running it from Python."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from srnn.errors import UserError
from srnn.exporting.c.program import Program

_SECONDS = 300  # for a compilation
NUMPY_TYPES = {"float": "float32", "int32_t": "int32", "int16_t": "int16", "int8_t": "int8"}


def find_compiler() -> list[str] | None:
    """The command of a C compiler: ``cc``, ``gcc``, ``clang``, or PyPI's ``ziglang``; None where there is none."""
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if importlib.util.find_spec("ziglang") else None


def compiled(program: Program, compiler: Sequence[str], folder: Path, flags: Sequence[str] = ("-O2",)) -> Path:
    """Compile a program to a shared library.

    Args:
        program: from ``c_program``.
        compiler: from ``find_compiler``.
        folder: where the two files of the program and the library go.
        flags: more arguments for the compiler.

    Raises:
        UserError: the compiler refuses the program, or does not end.
    """
    return run_compiler(program, compiler, folder, ["-shared", "-fPIC", *flags], f"{program.stem}.so")


def run_compiler(program: Program, compiler: Sequence[str], folder: Path, flags: Sequence[str], target: str) -> Path:
    """Compile a program, as ``compiled``, to a file of this name."""
    source = folder / f"{program.stem}.c"
    source.write_text(program.source)
    (folder / f"{program.stem}.h").write_text(program.header)
    command = [*compiler, "-std=c99", *flags, "-o", target, source.name]
    shown = " ".join(compiler)
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"format=c: {shown} did not compile the program: {error}.") from None
    if done.returncode:
        raise UserError(f"format=c: {shown} does not compile the program: {done.stderr.strip()[:500]}")
    return folder / target


class Stream:
    """A compiled network and a state of its own.

    Args:
        program: what was compiled.
        library: from ``compiled``.

    Attributes:
        memory: the state's struct as bytes.
        members: its members by name; they share the memory.
    """

    def __init__(self, program: Program, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self.own_memory(program)

    def own_memory(self, program: Program) -> None:
        """Take memory for a state, and begin a sequence."""
        self.calls = program.calls
        self.memory, self.members, at = np.zeros(program.ram, dtype=np.uint8), dict[str, np.ndarray](), 0
        for name, count in program.state.items():
            kind = np.dtype(NUMPY_TYPES[program.types.get(name, "float")])
            self.members[name] = self.memory[at : at + count * kind.itemsize].view(kind)
            at += count * kind.itemsize
        self.reset()

    def reset(self) -> None:
        """Begin a sequence."""
        self._call("reset")

    def step(self, given: np.ndarray | int) -> np.ndarray:
        """One step.

        Args:
            given: a token's number, or [inputs], fp32 or int8.

        Returns:
            [outputs], fp32 or int32.
        """
        output = np.empty(self.calls.outputs, dtype=NUMPY_TYPES[self.calls.out_type])
        self._call("step", int(given) if self.calls.tokens else self._numbers(given), output)
        return output

    def run(self, given: np.ndarray) -> np.ndarray:
        """A sequence, or a part of one.

        Args:
            given: tokens' numbers [T], or [T, inputs], fp32 or int8.

        Returns:
            [T, outputs]; of a network that reads the last state [outputs].
        """
        steps, shape = len(given), (self.calls.outputs,)
        outputs = np.empty(shape if self.calls.reads_last else (steps, *shape), dtype=NUMPY_TYPES[self.calls.out_type])
        scratch = (
            [np.empty(steps * self.calls.scratch, dtype=NUMPY_TYPES[self.calls.in_type])] if self.calls.scratch else []
        )
        self._call("run", self._numbers(given), ctypes.c_size_t(steps), outputs, *scratch)
        return outputs

    def _numbers(self, given: np.ndarray | int) -> np.ndarray:
        kind = self.calls.token_type.removesuffix("_t") if self.calls.tokens else NUMPY_TYPES[self.calls.in_type]
        return np.ascontiguousarray(given, dtype=kind)

    def _call(self, function: str, *arguments: object) -> None:
        self.call(function, [self.memory, *arguments])

    def call(self, function: str, arguments: Sequence[object]) -> None:
        """Call one of the network's functions; of arrays it gets the addresses."""
        called = getattr(self._library, f"{self.calls.name}_{function}")
        called.restype = None
        given = [ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments]
        called(*given)
