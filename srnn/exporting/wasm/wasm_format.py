"""``format=wasm``: one static page with a network in WebAssembly, run and compared before it is there."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch import nn

from srnn.errors import UserError
from srnn.exporting.base import ExportReport, ExportRequest
from srnn.exporting.c.c_format import Rounded, about_lines, check_c, told_program
from srnn.exporting.c.program import Program, with_comment
from srnn.exporting.c.verification import VERIFIED_STEPS, error_of
from srnn.exporting.chain import Chain
from srnn.exporting.reading import AGREEMENT
from srnn.exporting.wasm.building import WasmStream, can_compile, can_run, webassembly
from srnn.exporting.wasm.page import page_html
from srnn.files import write_atomically
from srnn.formats import Values
from srnn.inference.packing import Packer, WantedStructure


def check_wasm(
    values: Values | None = None, structure: WantedStructure = "auto", name: str | None = None, verify: bool = True
) -> None:
    """Raises UserError for values, blocks or a name that there are not, or a compiler that is missing."""
    Packer(structure, values or "fp16")
    check_c(None, structure, name)
    if not can_compile():
        raise UserError("format=wasm needs ziglang, which compiles the network: pip install 'srnn[wasm]'.")


def write_wasm(
    model: nn.Module,
    path: Path,
    request: ExportRequest,
    *,
    values: Values | None = None,
    structure: WantedStructure = "auto",
    name: str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a network as a page; as ``srnn.export``.

    Args:
        model: the network. Weights that are packed stay as they are; dense ones are packed.
        path: of the page.
        request: what the page says about the network. The first sequence of an example is what a page of a network
            that reads numbers shows first.
        values: what weights are stored as; None takes fp16 for those that are not packed yet.
        structure: the blocks of weights that are not packed yet.
        name: what the module's functions begin with; None takes the file's.
        verify: run the module, where wasmtime is installed, and compare it with the network.
    """
    chain, program = told_program(model, path, request, values, structure, name, usual="fp16")
    about = about_lines(request, Rounded(chain))
    with tempfile.TemporaryDirectory() as folder:
        module = webassembly(with_comment(program, about), Path(folder))
    verified, error = _verified(program, module, chain, path) if verify else ("not run (verify=false)", None)
    vocabulary = getattr(model, "vocabulary", None)
    page = page_html(program, module, chain, about, vocabulary, request.example).encode()
    write_atomically(path, page)
    notes = (f"of it {len(module):,} bytes of WebAssembly. Open it in a browser; it needs no server and no network.",)
    return ExportReport(path, len(page), verified, error, notes if request.tell else (*notes, *program.costs))


def _verified(program: Program, module: bytes, chain: Chain, path: Path) -> tuple[str, float | None]:
    """What was done to verify a module, and how far it is from the network. Raises UserError if it is too far."""
    if not can_run():
        return "not verified: wasmtime is not installed (pip install 'srnn[wasm]')", None
    error = error_of(WasmStream(program, module), chain)
    if not error <= AGREEMENT:
        raise UserError(
            f"{path} is not written: the module's outputs differ by {error:.1e} from the network's, over "
            f"{AGREEMENT:g}. Please report it; verify=false writes the page as it is."
        )
    return f"run by wasmtime against the network for {VERIFIED_STEPS:,} steps", error
