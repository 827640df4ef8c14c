"""``format=c``: a header and a source file, compiled, run and compared with the network before they are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from srnn.cells import GATES
from srnn.errors import UserError
from srnn.exporting.base import ExportReport, ExportRequest
from srnn.exporting.c.compiling import find_compiler
from srnn.exporting.c.integer_code import integer_program
from srnn.exporting.c.integers import IntegerModule, integer_network
from srnn.exporting.c.program import Program, c_program, checked_name, with_comment
from srnn.exporting.c.verification import VERIFIED_STEPS, away_from_floats, integers_that_differ, largest_error
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

CValues = Values | Literal["w8a8"]
_NOT_COMPILED = "not compiled (verify=false)"
_NO_COMPILER = "no C compiler is here (cc, gcc, clang, or pip install ziglang)"


def check_c(
    values: CValues | None = None,
    structure: WantedStructure = "auto",
    name: str | None = None,
    verify: bool = True,
) -> None:
    """Raises UserError for values, blocks or a name that there are not."""
    Packer(structure, "int8" if values == "w8a8" else values or "fp32")
    if name is not None:
        checked_name(name)


def write_c(
    model: nn.Module,
    path: Path,
    request: ExportRequest,
    *,
    values: CValues | None = None,
    structure: WantedStructure = "auto",
    name: str | None = None,
    verify: bool = True,
) -> ExportReport:
    """Write a network as C; as ``srnn.export``.

    Args:
        model: the network. Weights that are packed stay as they are; dense ones are packed.
        path: of the source file; the header lies beside it.
        request: what the comment says about the network. The example is used where numbers come in and are int8: the
            largest of them sets their scale.
        values: what weights are stored as; None takes fp32 for those that are not packed yet. ``w8a8`` computes in
            integers throughout, weights and activations of int8, for chips without a floating-point unit.
        structure: the blocks of weights that are not packed yet.
        name: what all names of the program begin with; None takes the file's.
        verify: compile the program, where there is a compiler, and compare it with the network.
    """
    if values == "w8a8":
        return _write_integers(model, path, request, structure, name, verify)
    chain, program = told_program(model, path, request, values, structure, name)
    program = with_comment(program, about_lines(request, Rounded(chain)))
    verified, error = _verified(program, chain, path) if verify else (_NOT_COMPILED, None)
    return _written(program, path, request, verified, error)


def _written(program: Program, path: Path, request: ExportRequest, verified: str, error: float | None) -> ExportReport:
    """Write both files."""
    header = path.with_suffix(".h")
    # The large file first: where a disk is full, no new header lies beside an old source.
    write_atomically(path, program.source.encode())
    write_atomically(header, program.header.encode())
    nbytes = path.stat().st_size + header.stat().st_size
    notes = (f"{header} declares it.", *(() if request.tell else program.costs))
    return ExportReport(path, nbytes, verified, error, notes)


def _write_integers(
    model: nn.Module, path: Path, request: ExportRequest, structure: WantedStructure, name: str | None, verify: bool
) -> ExportReport:
    """``write_c`` in integers: compared bit for bit with a numpy model of the same arithmetic."""
    chain = packed_chain(read_chain(model), "int8", structure)
    network = integer_network(chain, request.example)
    program = integer_program(network, checked_stem(path, name), path.stem, characters_of(model))
    if request.tell is not None:
        request.tell("\n".join(program.costs))
    program = with_comment(program, about_lines(request, IntegerModule(network, chain.batch_first)))
    compiler, verified = find_compiler(), _NOT_COMPILED if not verify else f"not verified: {_NO_COMPILER}"
    if verify and compiler is not None:
        differ = integers_that_differ(program, network, compiler)
        if differ:
            raise UserError(
                f"{path} is not written: {differ:,} of the compiled program's numbers are not those of its model in "
                "numpy. Please report it; verify=false writes the program as it is."
            )
        verified = f"compiled by {_shown(compiler)}: every bit as in its numpy model for {VERIFIED_STEPS:,} steps"
    beside = f"{verified}; integers beside the same weights in fp32"
    return _written(program, path, request, beside, away_from_floats(network, chain))


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
    name = checked_stem(path, name)
    chain = packed_chain(read_chain(model), values, structure, usual)
    program = c_program(chain, name, path.stem, characters_of(model))
    if request.tell is not None:
        request.tell("\n".join(program.costs))
    return chain, program


def checked_stem(path: Path, name: str | None) -> str:
    """What all names of a program begin with. Raises UserError if C could not read that, or the file's name."""
    checked = checked_name(path.stem if name is None else name)
    if not re.fullmatch(r"[\w.+-]+", path.stem, re.ASCII):
        raise UserError(f"{path}: C includes the header by its name, which may have letters, digits and . _ + - only.")
    return checked


def characters_of(model: nn.Module) -> Sequence[str]:
    """The characters that a language model's tokens from 1 on stand for; none of other networks."""
    vocabulary = getattr(model, "vocabulary", None)
    return vocabulary.tokens[1:] if isinstance(vocabulary, Characters) else ()


def about_lines(request: ExportRequest, written: nn.Module) -> list[str]:
    """What a file says about its network, ``written`` as the file computes it."""
    text = request.about if isinstance(request.about, str) else request.about(written)
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
    return f"compiled by {_shown(compiler)} and run against the network for {VERIFIED_STEPS:,} steps", error


def _shown(compiler: Sequence[str]) -> str:
    return Path(compiler[0]).name if len(compiler) == 1 else "zig"


class Rounded(nn.Module):
    """The network with the weights that the file holds, called as torch's modules: the state is a tensor or several."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.network, self.names = ChainNetwork(chain), tuple(chain.states)

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Outputs, and the state after them."""
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
