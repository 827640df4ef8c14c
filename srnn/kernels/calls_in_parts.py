"""Calls that take too much memory to be recorded as a whole, as several of fewer steps each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_STEPS = 64  # of a part: where fewer fit, a call runs long beside what its launches take


@dataclass(frozen=True)
class Steps:
    """Where the steps are of a call that may be cut between any two of them.

    Its other inputs are then the state before the first, and its other outputs, as many, that after the last.

    Attributes:
        dim: of the first input, and of the first output.
        rows: of a step, along it.
    """

    dim: int
    rows: int


@dataclass(eq=False)
class Parts:
    """How a call is cut.

    Attributes:
        dim: along which.
        size: of a part, but for the last.
        like: the first output of a part, without memory; None before there was any.
    """

    dim: int
    size: int
    like: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, steps: Steps, memory: int, most: int) -> Parts | None:
        """Into powers of two of steps, the same for calls of any length, so that few are recorded; None if too small.

        Args:
            x: the first input.
            steps: of the call.
            memory: bytes that it takes.
            most: those that a part may take.
        """
        count = x.shape[steps.dim] // steps.rows
        part = 1 << max(1, most * count // max(1, memory)).bit_length() - 1
        return cls(steps.dim, part * steps.rows) if LEAST_STEPS <= part < count else None

    def run(self, given: list[Tensor], run: Callable[[list[Tensor], Tensor | None], list[Tensor]]) -> list[Tensor]:
        """The call's outputs.

        Args:
            given: its inputs.
            run: a part, of its inputs, and where its first output may be written to; what it is is looked at.
        """
        x, *state = given
        inputs = x.split(self.size, self.dim)
        outputs = () if self.like is None else self._outputs(self.like, x)
        for index, some in enumerate(inputs):
            own, *state = run([some, *state], outputs[1 + index] if outputs else None)
            if not outputs:
                self.like = torch.empty_like(own, device="meta")
                outputs = self._outputs(self.like, x)
            if own is not outputs[1 + index]:
                outputs[1 + index].copy_(own)
        return [outputs[0], *state]

    def _outputs(self, like: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Memory for those of all parts, in which each is laid out as it comes; and then that of each part."""
        order = sorted(range(like.dim()), key=like.stride, reverse=True)
        sizes = [x.shape[dim] if dim == self.dim else like.shape[dim] for dim in order]
        made = torch.empty(sizes, dtype=like.dtype, device=x.device)
        y = made if order == list(range(len(order))) else made.permute([order.index(dim) for dim in range(len(order))])
        return y, *y.split(self.size, self.dim)
