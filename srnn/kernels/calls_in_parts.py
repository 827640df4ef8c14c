"""Calls that take too much memory as a whole: their graph runs them as several of fewer steps, in memory of one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

LEAST_STEPS = 64  # of any part: where fewer fit, a call runs long beside what its launches take
MOST_PARTS = 3  # each takes time to copy and to start, a call as it is the same time whatever its length


@dataclass(frozen=True)
class Steps:
    """Where the steps are of a call that may be cut between any two of them.

    Its other inputs are then the state before the first, if it is given, and its other outputs that after the last.

    Attributes:
        dim: of the first input, and of the first output.
        rows: of a step, along it.
    """

    dim: int
    rows: int


@dataclass(frozen=True)
class Parts:
    """How a call is cut.

    Attributes:
        dim: of the first input, and of the first output.
        size: of a part, but for the last.
        memory: bytes that a part takes.
    """

    dim: int
    size: int
    memory: int

    @classmethod
    def of(cls, x: Tensor, steps: Steps, memory: int, most: int) -> Parts | None:
        """As few parts as may be, of about equal numbers of steps; None where one is enough, or they are short or many.

        Args:
            x: the first input.
            steps: of the call.
            memory: bytes that it takes.
            most: those that a part may take.
        """
        count = x.shape[steps.dim] // steps.rows
        fitting = most * count // max(1, memory)
        if not LEAST_STEPS <= fitting < count:
            return None
        parts = -(-count // fitting)
        part = -(-count // parts)
        even = -(-part // 16) * 16  # for which kernels are compiled as for most calls
        # All but the last have so many steps. One of few would count as a short call, for which another kernel may run.
        sizes = [size for size in (even, part) if size <= fitting and count - (parts - 1) * size >= LEAST_STEPS]
        if parts > MOST_PARTS or not sizes:
            return None
        return cls(steps.dim, sizes[0] * steps.rows, memory * sizes[0] // count)

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of the first input or output."""
        return x.split(self.size, self.dim)

    def laid_out(self, x: Tensor) -> Tensor:
        """It, or a copy, of which each part is a piece of memory."""
        return x.contiguous() if self.dim == 0 else x.movedim(self.dim, 0).contiguous().movedim(0, self.dim)

    def addresses(self, x: Tensor) -> list[int]:
        """Of the parts of what is laid out so. The GPU waits meanwhile, and ``cut`` would take longer."""
        step = self.size * x.stride(self.dim) * x.element_size()
        begin = x.data_ptr()
        return [begin + part * step for part in range(-(-x.shape[self.dim] // self.size))]
