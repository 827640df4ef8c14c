"""A network's example input, cut and repeated to other lengths: what ``kernel=auto`` times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.base import SparseModule, Use
from srnn.inference.sparse_cell import SparseCell
from srnn.inference.sparse_recurrent import SparseRecurrent
from srnn.kernels.choosing import length_class
from srnn.kernels.timing import Call
from srnn.models import LanguageModel, SequenceModel


def example_input(supplied: Mapping[str, Any], steps: int = 100) -> Tensor | None:
    """Random tokens [1, T] or vectors [1, T, I] for a registered network; None where neither is what it reads."""
    random = torch.Generator().manual_seed(0)
    if "vocabulary_size" in supplied:
        return torch.randint(supplied["vocabulary_size"], (1, steps), generator=random)
    if "input_size" in supplied:
        return torch.randn(1, steps, supplied["input_size"], generator=random)
    return None


class ExampleCalls:
    """Calls of a network at several lengths, made of one example.

    Time is the axis of the example along which a recurrent layer sees as many steps. Where no axis is, because the
    network takes every other step, say, there is a call of the example as it is, and no other.

    Args:
        network: what is called.
        parts: its sparse modules by name.
        example: its input, or a tuple of inputs of which the first has the time axis.

    Attributes:
        streams: of the example.

    Raises:
        UserError: the network cannot be called with the example, or the example holds nothing.
    """

    def __init__(self, network: nn.Module, parts: Mapping[str, SparseModule], example: Any) -> None:
        self.network, self.parts = network, parts
        # Tuples with names of their own, such as a PackedSequence, are one input.
        self.inputs: tuple[Any, ...] = example if type(example) is tuple else (example,)
        for given in self.inputs:
            if isinstance(given, Tensor) and not given.numel():
                raise UserError(f"the example has shape {tuple(given.shape)} and holds nothing: give one that does.")
        try:
            seen = self._seen(partial(network, *self.inputs))
        except Exception as error:  # whatever a network does with what it cannot read
            raise UserError(
                f"the network cannot be called with the example, {_kinds(self.inputs)}: {error}. An example is an "
                f"input of the network, or a tuple of all its inputs."
            ) from error
        recurrent = [name for name in seen if isinstance(parts[name], SparseRecurrent | SparseCell)]
        first = next(iter(recurrent or seen), None)
        self.streams = seen[first][0][0][1] if first is not None else 1
        self.steps = _steps(seen, first)
        self.axis = self._time(recurrent[0]) if recurrent else None

    def classes(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """The lengths that there can be calls of, one tuple a class."""
        lengths = lengths if self.axis is not None else (self.steps,) * bool(self.steps)
        several = [tuple(t for t in lengths if length_class(t) == kind) for kind in range(3)]
        return [some for some in several if some]

    def call(self, steps: int) -> Call:
        """Of so many steps; a single one by the network's ``step`` where it is one of ours."""
        if self.axis is None:
            return partial(self.network, *self.inputs)
        if steps == 1 and isinstance(self.network, LanguageModel | SequenceModel | SparseRecurrent):
            directions = getattr(self.network, "directions", 1) + getattr(self.network, "bidirectional", False)
            if directions == 1:
                with _watched(self.parts, {}):
                    state = self.network(self._cut(2))[1]
                return partial(self.network.step, self._cut(1).select(self.axis, 0), state)
        return partial(self.network, self._cut(steps), *self.inputs[1:])

    def uses(self, calls: Sequence[Call]) -> dict[str, set[Use]]:
        """Part -> the uses that these calls make of it, without those that are decided."""
        found: dict[str, set[Use]] = {name: set() for name in self.parts}
        for call in calls:
            for name, several in self._seen(call).items():
                found[name] |= {use for use, _ in several} - self.parts[name].decided.keys()
        return found

    def _cut(self, steps: int) -> Tensor:
        x: Tensor = self.inputs[0]
        axis = self.axis or 0
        return x.index_select(axis, torch.arange(steps, device=x.device) % x.shape[axis])

    def _time(self, recurrent: str) -> int | None:
        """The axis along which two steps are two steps of the first recurrent layer."""
        x = self.inputs[0]
        for self.axis in range(x.dim() if isinstance(x, Tensor) else 0):
            if x.shape[self.axis] != self.steps:
                continue
            try:
                seen = self._seen(partial(self.network, self._cut(2), *self.inputs[1:]))
            except Exception:  # whatever a network does with an input of another width
                continue
            if _steps(seen, recurrent) == 2:
                return self.axis
        return None

    def _seen(self, call: Call) -> dict[str, list[tuple[Use, int]]]:
        """The uses that a call makes of each part, with their number of steps, in the order of first use."""
        found: dict[str, list[tuple[Use, int]]] = {}
        with _watched(self.parts, found):
            call()
        return found


def _kinds(inputs: tuple[Any, ...]) -> str:
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in inputs)


def _steps(seen: Mapping[str, Sequence[tuple[Use, int]]], part: str | None) -> int:
    """Steps that a part took: a layer in one call, a cell in as many."""
    return sum(steps for _, steps in seen.get(part or "", ())) if part is not None else 0


@contextmanager
def _watched(parts: Mapping[str, SparseModule], found: dict[str, list[tuple[Use, int]]]) -> Iterator[None]:
    def watcher(name: str, use: Use, steps: int) -> None:
        found.setdefault(name, []).append((use, steps))

    for name, part in parts.items():
        part.watcher = partial(watcher, name)
    try:
        yield
    finally:
        for part in parts.values():
            part.watcher = None
