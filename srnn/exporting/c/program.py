"""A network as a C header and a C source file, with what it costs known before anything is compiled.

C99 and nothing else: no allocation, no mathematical library, no files. Weights are constants, which linkers put into
flash; the state is a struct that the caller owns.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from srnn.cells import Cell
from srnn.errors import UserError
from srnn.exporting.c.arithmetic import ARGMAX_AND_SOFTMAX, used_functions
from srnn.exporting.c.arrays import declaration
from srnn.exporting.c.calls import Calls, Stage, calls_code
from srnn.exporting.c.header import header_text
from srnn.exporting.c.layer_code import Code, activation_code, embedding_code, linear_code, recurrent_code
from srnn.exporting.chain import (
    ActivationPart,
    Chain,
    ChainPart,
    ChainWeight,
    Direction,
    EmbeddingPart,
    LinearPart,
    RecurrentPart,
)
from srnn.kernels.contract import LayerWeights
from srnn.sparse import SparseMatrix

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(_[A-Za-z0-9]+)*")
_LONGEST_NAME = 40
SIZES = {"float": 4, "int16_t": 2, "int8_t": 1}  # of a state's members


@dataclass(frozen=True)
class Program:
    """A network in C.

    Attributes:
        calls: what a caller has to know.
        stem: its files' name, without ``.h`` and ``.c``.
        header: text of the header file.
        source: text of the source file.
        flash: bytes of the constant arrays; a few kilobytes of code come on top.
        state: members of the state's struct -> numbers.
        types: of those that are no floats.
        stack: bytes of the largest local arrays.
        multiply_adds: of a step.
    """

    calls: Calls
    stem: str
    header: str
    source: str
    flash: int
    state: dict[str, int]
    stack: int
    multiply_adds: int
    types: dict[str, str] = field(default_factory=dict)

    @property
    def ram(self) -> int:
        """Bytes of the state's struct."""
        taken = sum(SIZES[self.types.get(name, "float")] * count for name, count in self.state.items())
        widest = max((SIZES[self.types.get(name, "float")] for name in self.state), default=1)
        return -(-taken // widest) * widest

    @property
    def costs(self) -> tuple[str, ...]:
        """What it takes, in sentences."""
        lent = (
            f", and {SIZES[self.calls.in_type] * self.calls.scratch:,} bytes a step of a sequence"
            if self.calls.scratch
            else ""
        )
        return (
            f"flash: {self.flash:,} bytes of constants, and a few thousand of code.",
            f"RAM: {self.ram:,} bytes of state, and about {self.stack:,} of stack{lent}.",
            f"work: {self.multiply_adds:,} multiply-adds a step.",
        )


def checked_name(name: str) -> str:
    """A network's name in C. Raises UserError if names that begin with it would not be C's and C++'s."""
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        raise UserError(
            f"name={name!r}: C needs a name of letters, digits and single underscores that begins with a letter, of "
            f"at most {_LONGEST_NAME} of them; name the file so, or set name, as in name=net."
        )
    return name


def c_program(chain: Chain, name: str, stem: str, characters: Sequence[str] = ()) -> Program:
    """Write a network as C.

    Args:
        chain: the network; its weights packed.
        name: what all names of the program begin with, a C identifier.
        stem: the files' name, without ``.h`` and ``.c``.
        characters: of a language model of characters, those of tokens 1 and on; they go into a table.

    Raises:
        UserError: a name that is none in C.
    """
    code = Code(checked_name(name))
    calls = Calls(name, tuple(_stages(code, chain)))
    shared = "\n".join(code.shared_functions())
    text = "\n".join([shared, *code.functions, ARGMAX_AND_SOFTMAX.replace("NAME", name)])
    return finished(code, calls, stem, used_functions(text, name) + "\n" + shared, ARGMAX_AND_SOFTMAX, characters)


def finished(code: Code, calls: Calls, stem: str, shared: str, ends: str, characters: Sequence[str]) -> Program:
    """The program of some layers.

    Args:
        code: the layers.
        calls: what a caller has to know.
        stem: the files' name.
        shared: functions that layers call.
        ends: functions that a user calls on outputs.
        characters: as ``c_program``.
    """
    name, table = code.name, ""
    if characters:
        calls = replace(calls, has_table=True)
        points = np.array([0, *map(ord, characters)], dtype=np.uint32)
        table = declaration(f"{name}_characters", points).removeprefix("static ")
        code.flash += points.nbytes
    ends = ends.replace("OUTPUTS", f"{name.upper()}_OUTPUTS").replace("NAME", name)
    body = "\n".join([*code.functions, ends, calls_code(calls, code)])
    comment = f"/* {name}: see {stem}.h. Written by srnn. */"
    parts = [comment, f'#include "{stem}.h"\n', *code.arrays, table, shared, body]
    stack = code.layer_stack + code.product_stack
    state = dict(sorted(code.state.items(), key=lambda member: -SIZES[code.types.get(member[0], "float")]))
    source = "\n".join(parts)
    program = Program(calls, stem, "", source, code.flash, state, stack, code.multiply_adds, code.types)
    return with_comment(program)


def with_comment(program: Program, about: Sequence[str] = ()) -> Program:
    """The program with a header that says what it costs, below these lines: what it is, its score."""
    return replace(
        program, header=header_text(program.calls, program.state, program.types, [*about, "", *program.costs])
    )


def _stages(code: Code, chain: Chain) -> list[Stage]:
    """Add all layers to the code."""
    stages: list[Stage] = []
    for part in chain.parts:
        is_final = part is chain.parts[-1]
        if isinstance(part, RecurrentPart):
            for layer in part.layers:
                directions = [layer_weights(part.cell, direction) for direction in layer]
                stages.append(_recurrent(code, len(stages), directions))
            if chain.last_only and part is chain.recurrent[-1]:
                stages.append(_last(code, stages[-1]))
        else:
            width = stages[-1].width if stages else chain.input_size
            stages.append(_without_state(code, len(stages), part, width, is_final))
    return stages


def _recurrent(code: Code, number: int, directions: Sequence[LayerWeights]) -> Stage:
    labels = [f"{number}{end}" for end in ("", "r")[: len(directions)]]
    functions = [recurrent_code(code, label, weights) for label, weights in zip(labels, directions, strict=True)]
    first = directions[0]
    members = tuple(f"h{label}" for label in labels)
    return Stage("recurrent", first.w_ih.shape[1], first.output_size * len(labels), tuple(functions), members)


def _last(code: Code, before: Stage) -> Stage:
    if len(before.members) > 1:  # side by side, for what comes next
        code.state["last"] = before.width
    return Stage("last", before.width, before.width)


def _without_state(code: Code, number: int, part: ChainPart, inputs: int, is_final: bool) -> Stage:
    if isinstance(part, EmbeddingPart):
        inputs, outputs = part.weight.shape
        function = embedding_code(code, number, packed_weight(part.weight))
    elif isinstance(part, LinearPart):
        outputs = part.weight.shape[0]
        function = linear_code(code, number, packed_weight(part.weight), part.bias)
    else:
        assert isinstance(part, ActivationPart)
        outputs, function = inputs, activation_code(code, number, part.kind, inputs)
    if not is_final:
        code.state[f"x{number}"] = outputs
    kind: Any = "embedding" if isinstance(part, EmbeddingPart) else "plain"
    return Stage(kind, inputs, outputs, (function,), () if is_final else (f"x{number}",))


def layer_weights(cell: Cell, direction: Direction) -> LayerWeights:
    """One direction of a layer as kernels take it."""
    projection = None if direction.w_hr is None else packed_weight(direction.w_hr)
    biases = direction.b_ih, direction.b_hh
    return LayerWeights(cell, packed_weight(direction.w_ih), packed_weight(direction.w_hh), *biases, projection)


def packed_weight(weight: ChainWeight) -> SparseMatrix:
    """A weight of a chain whose matrices are packed."""
    assert isinstance(weight, SparseMatrix)
    return weight
