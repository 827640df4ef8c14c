"""Running a compiled program against the network it was made of.

Shapes: T steps, B pieces, I inputs, L layers times directions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from srnn.exporting.c.compiling import Stream, compiled
from srnn.exporting.c.integers import IntegerModule, IntegerNetwork
from srnn.exporting.c.program import Program
from srnn.exporting.chain import Chain, RecurrentPart, dense_weight
from srnn.exporting.reading import ChainNetwork, difference
from srnn.sparse import SparseMatrix

VERIFIED_STEPS = 10_000
_PIECE = 50  # steps that the network goes on from the program's state
_NUMBERS = 4_000_000  # of outputs or inputs that are held at a time
_LARGEST_STATE = 1e4  # beyond, a network without bounds has run away


def largest_error(program: Program, chain: Chain, compiler: Sequence[str]) -> float:
    """How far a program is from its network in float64, over 10,000 steps of random input with chained states.

    The program runs them all, in turns by NAME_run and NAME_step. The network starts each piece of 50 steps from the
    program's state, so that the rounding of a network that magnifies small differences does not count as an error.
    Outputs and states of each piece are compared.

    Args:
        program: from ``c_program``.
        chain: of the same packed weights.
        compiler: from ``find_compiler``.

    Raises:
        UserError: the program does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(program, compiled(program, compiler, Path(folder)))
        return error_of(stream, chain)


def error_of(stream: Stream, chain: Chain) -> float:
    """``largest_error`` of a program that is compiled."""
    network = ChainNetwork(in_float64(replace(chain, batch_first=True)))
    random, errors = torch.Generator().manual_seed(0), [0.0]
    for numbers in _groups(stream):
        errors += _errors(stream, chain, network, numbers, _random_inputs(chain, len(numbers), random))
    return max(errors, key=lambda error: float("inf") if error != error else error)


def _groups(stream: Stream) -> Iterator[range]:
    """The numbers of all pieces, so many at a time that outputs and inputs fit into memory."""
    pieces, widest = VERIFIED_STEPS // _PIECE, max(stream.calls.outputs, stream.calls.inputs)
    step = max(1, _NUMBERS // (_PIECE * widest))
    return (range(begin, min(begin + step, pieces)) for begin in range(0, pieces, step))


def _errors(stream: Stream, chain: Chain, network: ChainNetwork, numbers: range, inputs: Tensor) -> list[float]:
    """Of these pieces, the differences of the outputs and of each state."""
    before, got, after = [], [], []
    for number, piece in zip(numbers, inputs.numpy(), strict=True):
        if not all(np.abs(member).max(initial=0) < _LARGEST_STATE for member in stream.members.values()):
            stream.reset()
        before.append(_states(stream, chain))
        if number % 2 or not stream.calls.can_step:
            got.append(stream.run(piece))
        else:
            outputs = np.stack([stream.step(one) for one in piece])
            got.append(outputs[-1] if chain.last_only else outputs)
        after.append(_states(stream, chain))
    with torch.inference_mode():
        given = inputs if inputs.dtype == torch.int64 else inputs.double()
        wanted, ends = network(given, _side_by_side(before))
    errors = [difference(torch.from_numpy(np.stack(got)).double(), wanted)]
    return errors + [difference(state, ends[name]) for name, state in _side_by_side(after).items()]


def integers_that_differ(program: Program, network: IntegerNetwork, compiler: Sequence[str]) -> int:
    """How many outputs and states of a program differ from those of its numpy model, over 10,000 chained steps.

    Args:
        program: from ``integer_program``.
        network: what it was made of.
        compiler: from ``find_compiler``.

    Raises:
        UserError: the program does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        stream = Stream(program, compiled(program, compiler, Path(folder)))
        return differing_integers(stream, network)


def differing_integers(stream: Stream, network: IntegerNetwork) -> int:
    """``integers_that_differ`` of a program that is compiled."""
    random = np.random.default_rng(0)
    return sum(
        _differing(stream, network, numbers, random_integers(network, len(numbers), _PIECE, random))
        for numbers in _groups(stream)
    )


def _differing(stream: Stream, network: IntegerNetwork, numbers: range, inputs: np.ndarray) -> int:
    """How many numbers differ in these pieces."""
    names = [name for name, _ in network.members]
    before, got, after = [], [], []
    for number, piece in zip(numbers, inputs, strict=True):
        before.append([stream.members[name].copy() for name in names])
        if number % 2 or not stream.calls.can_step:
            got.append(stream.run(piece))
        else:
            outputs = np.stack([stream.step(one) for one in piece])
            got.append(outputs[-1] if network.last_only else outputs)
        after.append([stream.members[name].copy() for name in names])
    starts = [np.stack(states).astype(np.int64) for states in zip(*before, strict=True)]
    wanted, ends = network.run(inputs, starts)
    found = [np.stack(states) for states in zip(*after, strict=True)]
    pairs = [(np.stack(got), wanted), *zip(found, ends, strict=True)]
    return sum(int((ours != theirs).sum()) for ours, theirs in pairs)


def random_integers(network: IntegerNetwork, streams: int, steps: int, random: np.random.Generator) -> np.ndarray:
    """Tokens [streams, steps], or int8 numbers [streams, steps, I]."""
    shape = (streams, steps)
    if network.embedding is not None:
        return random.integers(network.embedding.packed.shape[0], size=shape)
    return random.integers(-127, 128, size=(*shape, network.layers[0][0].w_ih.packed.shape[1]))


def away_from_floats(network: IntegerNetwork, chain: Chain) -> float:
    """The largest difference of an output, as ``difference``, from the same weights in fp32: 8 streams of 50 steps."""
    given = torch.from_numpy(random_integers(network, 8, _PIECE, np.random.default_rng(0)))
    inputs = given if network.embedding is not None else given.float() * network.input_scale
    with torch.inference_mode():
        wanted, _ = ChainNetwork(replace(chain, batch_first=True))(inputs)
        got, _ = IntegerModule(network, True)(inputs)
    return difference(got, wanted)


def _random_inputs(chain: Chain, pieces: int, random: torch.Generator) -> Tensor:
    if chain.vocabulary_size is not None:
        return torch.randint(chain.vocabulary_size, (pieces, _PIECE), generator=random)
    return torch.randn(pieces, _PIECE, chain.input_size, generator=random)


def _states(stream: Stream, chain: Chain) -> dict[str, np.ndarray]:
    """Name of each state of the chain -> [L, size]."""
    layers = iter([stage for stage in stream.calls.stages if stage.kind == "recurrent"])
    found = {}
    for part in chain.recurrent:
        members = [member for _ in part.layers for member in next(layers).members]
        for name in part.states:
            letter = name[-1]  # h, or an LSTM's c
            found[name] = np.stack([stream.members[letter + member[1:]] for member in members])
    return found


def _side_by_side(states: Sequence[dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The states of all pieces as those of streams, [L, B, size], float64."""
    return {name: torch.from_numpy(np.stack([s[name] for s in states], axis=1)).double() for name in states[0]}


def in_float64(chain: Chain) -> Chain:
    """The same chain with dense weights in float64: what rounding is measured against."""

    def wide(part: Any) -> Any:
        weights = {f.name: w for f in fields(part) if isinstance(w := getattr(part, f.name), Tensor | SparseMatrix)}
        return replace(part, **{name: dense_weight(w).double() for name, w in weights.items()})

    parts: list[Any] = []
    for part in chain.parts:
        if isinstance(part, RecurrentPart):
            parts.append(replace(part, layers=tuple(tuple(wide(d) for d in layer) for layer in part.layers)))
        else:
            parts.append(wide(part))
    return replace(chain, parts=tuple(parts))
