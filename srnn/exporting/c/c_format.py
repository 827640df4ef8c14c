"""``format=c``: a header and a source file, compiled, run and compared with the network before they are there."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from srnn.cells import GATES
from srnn.errors import UserError
from srnn.exporting.base import ExportReport, ExportRequest
from srnn.exporting.c.compiling import find_compiler
from srnn.exporting.c.program import Program, c_program, checked_name, with_comment
from srnn.exporting.c.verification import VERIFIED_STEPS, largest_error
from srnn.exporting.chain import (
    Chain,
    ChainPart,
    ChainWeight,
    Direction,
    EmbeddingPart,
    LinearPart,
    RecurrentPart,
    dense_weight,
)
from srnn.exporting.reading import AGREEMENT, ChainNetwork, read_chain
from srnn.files import write_atomically
from srnn.formats import Values
from srnn.inference.packing import Packer, WantedStructure
from srnn.sparse import SparseMatrix
from srnn.vocabulary import Characters

_NO_COMPILER = "no C compiler is here (cc, gcc, clang, or pip install ziglang)"


def check_c(
    values: Values | None = None, structure: WantedStructure = "auto", name: str | None = None, verify: bool = True
) -> None:
    """Raises UserError for values, blocks or a name that there are not."""
    Packer(structure, values or "fp32")
    if name is not None:
        checked_name(name)


def write_c(
    model: nn.Module,
    path: Path,
    request: ExportRequest,
    *,
    values: Values | None = None,
    structure: WantedStructure = "auto",
    name: str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a network as C; as ``srnn.export``.

    Args:
        model: the network. Weights that are packed stay as they are; dense ones are packed.
        path: of the source file; the header lies beside it.
        request: what the comment says about the network; its example is not used.
        values: what weights are stored as; None takes fp32 for those that are not packed yet.
        structure: the blocks of weights that are not packed yet.
        name: what all names of the program begin with; None takes the file's.
        verify: compile the program, where there is a compiler, and compare it with the network.
    """
    chain, program = told_program(model, path, request, values, structure, name)
    program = with_comment(program, about_lines(request, chain))
    verified, error = _verified(program, chain, path) if verify else ("not compiled (verify=false)", None)
    header = path.with_suffix(".h")
    write_atomically(header, program.header.encode())
    write_atomically(path, program.source.encode())
    nbytes = path.stat().st_size + header.stat().st_size
    notes = (f"{header} declares it.", *(() if request.tell else program.costs))
    return ExportReport(path, nbytes, verified, error, notes)


def told_program(
    model: nn.Module,
    path: Path,
    request: ExportRequest,
    values: Values | None,
    structure: WantedStructure,
    name: str | None,
    usual: Values = "fp32",
) -> tuple[Chain, Program]:
    """A network as a chain of packed weights, and as C; what that costs is told.

    Args:
        model: as ``write_c``; so are the next five.
        path: of the file.
        request: what is told goes there.
        values: what weights are stored as.
        structure: the blocks of weights that are not packed yet.
        name: what all names of the program begin with.
        usual: what weights that are not packed yet are stored as where ``values`` is None.
    """
    name = checked_name(path.stem if name is None else name)
    if not re.fullmatch(r"[\w.+-]+", path.stem, re.ASCII):
        raise UserError(f"{path}: C includes the header by its name, which may have letters, digits and . _ + - only.")
    chain = packed_chain(read_chain(model), values, structure, usual)
    vocabulary = getattr(model, "vocabulary", None)
    program = c_program(chain, name, path.stem, vocabulary.tokens[1:] if isinstance(vocabulary, Characters) else ())
    if request.tell is not None:
        request.tell("\n".join(program.costs))
    return chain, program


def about_lines(request: ExportRequest, chain: Chain) -> list[str]:
    """What a file says about its network, which holds these weights."""
    text = request.about if isinstance(request.about, str) else request.about(_Rounded(chain))
    return [line for line in text.splitlines() if line.strip()]


def _verified(program: Program, chain: Chain, path: Path) -> tuple[str, float | None]:
    """What was done to verify a program, and how far it is from the network. Raises UserError if it is too far."""
    compiler = find_compiler()
    if compiler is None:
        return f"not verified: {_NO_COMPILER}", None
    error = largest_error(program, chain, compiler)
    if not error <= AGREEMENT:
        raise UserError(
            f"{path} is not written: the compiled program's outputs differ by {error:.1e} from the network's, over "
            f"{AGREEMENT:g}. Please report it; verify=false writes the program as it is."
        )
    shown = Path(compiler[0]).name if len(compiler) == 1 else "zig"
    return f"compiled by {shown} and run against the network for {VERIFIED_STEPS:,} steps", error


class _Rounded(nn.Module):
    """The network with the weights that the file holds, called as torch's modules: the state is a tensor or several."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.network, self.names = ChainNetwork(chain), tuple(chain.states)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        several = state if state is None or isinstance(state, tuple) else (state,)
        before = None if several is None else dict(zip(self.names, several, strict=True))
        outputs, after = self.network(inputs, before)
        ends = tuple(after[name] for name in self.names)
        return outputs, ends[0] if len(ends) == 1 else ends


def packed_chain(
    chain: Chain, values: Values | None = None, structure: WantedStructure = "auto", usual: Values = "fp32"
) -> Chain:
    """The same chain with all its matrices packed; one that two layers share is packed once.

    Args:
        chain: from ``read_chain``.
        values: what weights are stored as; None leaves packed ones as they are, and takes ``usual`` for others.
        structure: the blocks of weights that are not packed yet.
        usual: see ``values``.

    Raises:
        UserError: a weight is not pruned in these blocks, or not finite in these values.
    """
    packer, done = Packer(structure, values or usual), {}

    def packed(name: str, weight: ChainWeight, gates: int = 1) -> SparseMatrix:
        if isinstance(weight, SparseMatrix) and values in (None, weight.values_name):
            return weight
        dense = dense_weight(weight)
        address = weight.data_ptr() if isinstance(weight, Tensor) else weight.values.data_ptr()
        key = (address, tuple(dense.shape), gates)
        if key not in done:
            done[key] = packer.matrix(name, dense, gates)
        return done[key]

    def direction(name: str, gates: int, one: Direction) -> Direction:
        hr = None if one.w_hr is None else packed(f"{name}.weight_hr", one.w_hr)
        ih, hh = packed(f"{name}.weight_ih", one.w_ih, gates), packed(f"{name}.weight_hh", one.w_hh, gates)
        return replace(one, w_ih=ih, w_hh=hh, w_hr=hr)

    parts: list[ChainPart] = []
    for part in chain.parts:
        if isinstance(part, RecurrentPart):
            named = [(f"{part.name}.l{number}", layer) for number, layer in enumerate(part.layers)]
            gates = GATES[part.cell]
            layers = tuple(
                tuple(direction(f"{name}{end}", gates, one) for end, one in zip(("", "_reverse"), layer, strict=False))
                for name, layer in named
            )
            parts.append(replace(part, layers=layers))
        elif isinstance(part, EmbeddingPart | LinearPart):
            parts.append(replace(part, weight=packed(f"{part.name}.weight", part.weight)))
        else:
            parts.append(part)
    return replace(chain, parts=tuple(parts))
