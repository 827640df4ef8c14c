"""Compiled code without the compiler: object code that was kept once, loaded by llvmlite, called through ctypes.

numba translates the kernels; importing it, and having it read what it has compiled, takes longer than all else between
``import torch`` and the first step of a packed network. So what runs one stream on one thread uses nothing of numba's
runtime, and is kept as object code of our own: one file for each function, processor and version. Where there is none,
or none that is whole, it is compiled (``object_code``).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import logging
import os
import stat
import struct
import threading
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from srnn.files import cache_folder, write_atomically

_log = logging.getLogger("srnn.kernels")
_CALL = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_char_p)
_DIGEST = hashlib.sha256().digest_size
_loading = threading.RLock()
TOGETHER = dict.fromkeys(("run_product", "run_stack", "run_step"), ("run_product", "run_stack", "run_step"))
_addresses: dict[tuple[Any, ...], int] = {}
_packing: dict[int, Callable[..., bytes]] = {}

Compiled = Callable[[bytes], int]


def numbers(*values: int) -> bytes:
    """Arguments as compiled code takes them: int64, one after the other."""
    pack = _packing.get(len(values))
    if pack is None:
        pack = _packing[len(values)] = struct.Struct(f"{len(values)}q").pack
    return pack(*values)


@cache
def code_of(name: str) -> Compiled:
    """A compiled function of the address of its arguments, which gives an int64: ``run_stack`` and the like."""
    return _CALL(address_of(name))


def address_of(name: str, *key: Any) -> int:
    """The address of a compiled function: one of ``code_of``, or ``dot`` with what ``dot_functions`` asks for."""
    what = (name, *key)
    with _loading:
        if what not in _addresses:
            # What is called together is one file: it shares most of its code.
            symbols = {(one,): f"srnn_{one}" for one in TOGETHER.get(name, ())}
            symbols = symbols or {what: "srnn_" + "_".join(map(str, what))}
            path = _folder() / f"{next(iter(symbols.values()))}.o"
            _load(_kept(path) or _compile(symbols, path), symbols)
        return _addresses[what]


def processor_features() -> dict[str, bool]:
    """What the processor has, then what numba's settings take away or add, which counts: LLVM goes by the last word."""
    from llvmlite import binding

    features = dict(sorted(binding.get_host_cpu_features().items()))
    if os.environ.get("NUMBA_CPU_NAME") not in (None, "", binding.get_host_cpu_name()):
        features = {}  # those of another processor are the ones that are listed
    for feature in os.environ.get("NUMBA_CPU_FEATURES", "").split(","):
        if feature:
            features.pop(feature[1:], None)
            features[feature[1:]] = feature.startswith("+")
    return features


def processor_name() -> str:
    """As LLVM calls it."""
    from llvmlite import binding

    return os.environ.get("NUMBA_CPU_NAME") or str(binding.get_host_cpu_name())


@cache
def _folder() -> Path:
    """Of the code for this processor and these versions, made from these sources."""
    found = hashlib.sha256(f"{processor_name()} {processor_features()}".encode())
    for package in ("numba", "llvmlite"):
        found.update(f"{package} {metadata.version(package)}".encode())
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), here.parent.parent / "cells.py"]):
        found.update(path.read_bytes())
    return cache_folder() / "code" / found.hexdigest()[:16]


def _kept(path: Path) -> bytes | None:
    """Object code, if the file is whole, and nobody else can have written it."""
    try:
        with path.open("rb") as file:
            about, data = os.fstat(file.fileno()), file.read()
    except OSError:
        return None
    if hasattr(os, "getuid") and (
        about.st_uid not in (0, os.getuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        return None
    digest, code = data[:_DIGEST], data[_DIGEST:]
    return code if hashlib.sha256(code).digest() == digest else None


def _compile(symbols: dict[tuple[Any, ...], str], path: Path) -> bytes:
    code: bytes = importlib.import_module("srnn.kernels.cpu.object_code").made_object_code(symbols)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, hashlib.sha256(code).digest() + code, mode=0o600)
    except OSError as error:
        _log.info("compiled code cannot be kept: %s", error)
    return code


@cache
def _engine() -> Any:
    """What holds loaded code, for as long as the process runs."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = binding.Target.from_triple(binding.get_process_triple()).create_target_machine()
    return binding.create_mcjit_compiler(binding.parse_assembly(""), machine)


def _load(code: bytes, symbols: dict[tuple[Any, ...], str]) -> None:
    from llvmlite import binding

    engine = _engine()
    engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _addresses.update({what: int(engine.get_function_address(symbol)) for what, symbol in symbols.items()})
