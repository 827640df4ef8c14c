"""Compiling a generated program to WebAssembly, and running that from Python."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from srnn.exporting.c.calls import Calls
from srnn.exporting.c.compiling import Stream, run_compiler
from srnn.exporting.c.program import Program

_WASM_ZIG = (sys.executable, "-m", "ziglang", "cc")
_WASM_FLAGS = ("-target", "wasm32-freestanding", "-O3", "-msimd128", "-nostdlib", "-Wl,--no-entry")


def can_compile() -> bool:
    """Whether ``ziglang`` is installed."""
    return importlib.util.find_spec("ziglang") is not None


def can_run() -> bool:
    """Whether ``wasmtime`` is installed."""
    return importlib.util.find_spec("wasmtime") is not None


def exported_functions(calls: Calls) -> tuple[str, ...]:
    """The functions of a program that a page calls."""
    kinds = ["reset", *(["step"] if calls.can_step else []), "run", "softmax", "argmax"]
    return tuple(f"{calls.name}_{kind}" for kind in kinds)


def webassembly(program: Program, folder: Path) -> bytes:
    """A program as a WebAssembly module without imports. It exports its functions, memory and where memory is free.

    Args:
        program: from ``c_program``.
        folder: where the files go that this takes.

    Raises:
        UserError: it does not compile.
    """
    exports = [f"-Wl,--export={name}" for name in ("__heap_base", *exported_functions(program.calls))]
    module = run_compiler(program, _WASM_ZIG, folder, [*_WASM_FLAGS, *exports], f"{program.stem}.wasm")
    return module.read_bytes()


class WasmStream(Stream):
    """A network in WebAssembly, run by wasmtime, and a state of its own; otherwise as ``Stream``.

    Args:
        program: what was compiled.
        module: from ``webassembly``.
    """

    def __init__(self, program: Program, module: bytes) -> None:
        import wasmtime

        self._store: Any = wasmtime.Store()
        instance = wasmtime.Instance(self._store, wasmtime.Module(self._store.engine, module), [])
        self._exports: Any = instance.exports(self._store)
        self.own_memory(program)

    def call(self, function: str, arguments: Sequence[object]) -> None:
        """Call a function, with arrays copied to memory that is free there, and back."""
        memory, free = self._exports["memory"], self._exports["__heap_base"].value(self._store)
        given, places = [], []
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                free = -(-free // 16) * 16
                places.append((argument, free))
                given.append(free)
                free += argument.nbytes
            else:
                given.append(getattr(argument, "value", argument))
        pages = -(-(free - memory.data_len(self._store)) >> 16)
        if pages > 0:
            memory.grow(self._store, pages)
        for array, place in places:
            memory.write(self._store, array.tobytes(), place)
        self._exports[f"{self.calls.name}_{function}"](self._store, *given)
        for array, place in places:
            data = memory.read(self._store, place, place + array.nbytes)
            array[...] = np.frombuffer(data, dtype=array.dtype).reshape(array.shape)
