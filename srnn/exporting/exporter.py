"""Exporting a network: the formats by name, and the function that a user calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from srnn.errors import UserError, did_you_mean
from srnn.exporting.base import About, ExportFormat, ExportReport, ExportRequest
from srnn.exporting.c.c_format import check_c, write_c
from srnn.exporting.onnx_format import check_onnx, write_onnx
from srnn.exporting.wasm.wasm_format import check_wasm, write_wasm
from srnn.files import expanded

# A new format is a line here.
EXPORT_FORMATS: dict[str, ExportFormat] = {
    "onnx": ExportFormat(".onnx", write_onnx, check_onnx),
    "c": ExportFormat(".c", write_c, check_c),
    "wasm": ExportFormat(".html", write_wasm, check_wasm),
}


def export(
    model: nn.Module,
    path: str | Path,
    format: str = "onnx",
    example: Any = None,
    about: About = "",
    tell: Callable[[str], None] | None = None,
    **options: Any,
) -> ExportReport:
    """Write a network to a file that runs without srnn; it is run and compared with the network first.

    Args:
        model: a network, dense or sparsified. Any whose layers run one after the other is written with its states as
            named inputs and outputs: embedding, ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, linear layers, activations.
        path: where to, as for ``srnn.save``. An older file is replaced once the new one agrees with the network.
        format: ``onnx``; ``c`` for a C file and its header; or ``wasm`` for a page with the network in WebAssembly.
        example: the arguments of a call, a tensor or a tuple of them; for networks that are no such chain.
        about: what the file says about itself; or a function that makes it of the network with the file's numbers.
        tell: called with what the file costs as soon as that is known, before anything is run; the report then leaves
            it out. ``tell=print`` prints it.
        options: of the format. ``onnx`` takes ``values``: ``fp32``, or ``int8`` for onnxruntime's dynamic
            quantisation. ``c`` takes ``values`` and ``structure`` as ``srnn.save`` does, ``name`` for what its names
            begin with (the file's), and ``verify``, which compiles the file and compares it where there is a compiler.
            ``values="w8a8"`` computes in integers, with weights and activations of int8. ``wasm`` takes all but that;
            its ``verify`` runs the page's module where wasmtime is installed.

    Returns:
        What was written, what it was compared with, and what to know about it.

    Raises:
        UserError: there is no such format or option, the network cannot be written in it, what was written computes
            something else, or a package is missing.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile, torch, srnn
        >>> report = srnn.export(torch.nn.GRU(8, 16), tempfile.mkdtemp() + "/gru.onnx")
        >>> report.difference < 1e-5
        True
    """
    if format not in EXPORT_FORMATS:
        known = ", ".join(EXPORT_FORMATS)
        raise UserError(f"format={format!r}: there are {known}.{did_you_mean(format, EXPORT_FORMATS)}")
    chosen = EXPORT_FORMATS[format]
    takes = [p.name for p in inspect.signature(chosen.write).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for name in options:
        if name not in takes:
            raise UserError(f"format={format} takes no {name}: its options are {', '.join(takes) or 'none'}.")
    chosen.check(**options)
    target = expanded(path)
    if target.suffix != chosen.suffix or (target.exists() and not target.is_file()):
        suffixes = {f'format="{name}"': known.suffix for name, known in EXPORT_FORMATS.items()}
        instead = of_other_suffixes(suffixes, f'format="{format}"', target.suffix)
        raise UserError(f'{target} must be a file named *{chosen.suffix}, with format="{format}".{instead}')
    with _in_eval_mode(model):
        return chosen.write(model, target, ExportRequest(example, about, tell), **options)


def of_other_suffixes(suffixes: Mapping[str, str], chosen: str, given: str) -> str:
    """Sentences on what to choose for a file named otherwise: what it is named as, or all there is if it is as none.

    Args:
        suffixes: by what a user gives to choose one.
        chosen: what was given.
        given: the file's suffix; no sentences if it is that of ``chosen``.
    """
    others = {choice: suffix for choice, suffix in suffixes.items() if choice != chosen}
    meant = {choice: suffix for choice, suffix in others.items() if suffix == given} or others
    return "".join(f" For a *{suffix} file give {c}." for c, suffix in meant.items() if suffixes[chosen] != given)


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
