"""One call of a recurrence, as the kernels of all forms take it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from srnn.kernels.contract import LayerWeights, State
from srnn.kernels.triton.chip import Chip, interpreted


@dataclass(frozen=True)
class StepRows:
    """``batch_sizes`` as the kernels take them. Tensors hold something only where lengths differ.

    Attributes:
        steps: T.
        streams: B.
        equal: whether all streams are of the same length.
        sizes: streams of each step, [T].
        offsets: first row of each step, [T].
        lengths: steps of each stream, [B].
        lengths_on_host: the last two on the CPU, in this order.
    """

    steps: int
    streams: int
    equal: bool
    sizes: Tensor
    offsets: Tensor
    lengths: Tensor
    lengths_on_host: Any

    @classmethod
    def of(cls, batch_sizes: Tensor, streams: int, device: torch.device) -> StepRows:
        """Of ``batch_sizes`` [T] on the CPU."""
        steps = len(batch_sizes)
        if int(batch_sizes[-1]) == streams:
            nothing = _nothing(device)
            return cls(steps, streams, True, nothing, nothing, nothing, None)
        offsets = batch_sizes.cumsum(0) - batch_sizes
        lengths = (batch_sizes[:, None] > torch.arange(streams)).sum(0)
        sizes, rows, long = (part.to(device, torch.int32) for part in (batch_sizes, offsets, lengths))
        return cls(steps, streams, False, sizes, rows, long, (lengths, offsets))

    def ends(self, y_NH: Tensor, reverse: bool) -> Tensor:
        """Each stream's output after the last step it takes: of its last row, or its first where reversed.

        It may be a view of the outputs.
        """
        if reverse or self.equal:
            first = 0 if reverse else y_NH.shape[0] - self.streams
            return y_NH[first : first + self.streams]
        lengths, offsets = self.lengths_on_host
        rows = offsets[lengths - 1] + torch.arange(self.streams)
        return y_NH[rows.to(y_NH.device)]


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class RecurrentCall:
    """What is to be computed.

    Attributes:
        weights: of the first direction.
        directions: D, 1 or 2.
        u_NG: products with the input, [N, D * G], of which one stride is 1.
        rows: where the rows of each step are.
        state: parts [D, B, H].
        new_bias: [D, H] in fp32, of a GRU with biases; else None.
        precision: of products of fp32 on tensor cores.
        failed: [1], the flag that a kernel sets where it gave up waiting.
        chip: what runs it.
    """

    weights: LayerWeights
    directions: int
    u_NG: Tensor
    rows: StepRows
    state: State
    new_bias: Tensor | None
    precision: str
    failed: Tensor
    chip: Chip

    @property
    def streams(self) -> int:
        """B."""
        return self.rows.streams

    @property
    def hidden(self) -> int:
        """H."""
        return self.weights.hidden_size

    @property
    def bits(self) -> torch.dtype:
        """Integers of the size of an output, for states whose bits say whether they are written yet."""
        return torch.int32 if self.u_NG.dtype == torch.float32 else torch.int16

    def reverse(self, direction: int) -> bool:
        """Whether a direction runs from the last step to the first."""
        return direction == 1 or self.weights.reverse

    def launches(self) -> list[tuple[int, int]]:
        """First and last step of each: one launch, but where programs cannot wait for each other."""
        if interpreted():
            return [(k, k + 1) for k in range(self.rows.steps)]
        return [(0, self.rows.steps)]

    def arguments(self) -> dict[str, Any]:
        """Those that all recurrent kernels have, by the kernels' names, and options of the launch."""
        u_row, u_unit = self.u_NG.stride()
        return {
            "u": self.u_NG,
            "offsets": self.rows.offsets,
            "failed": self.failed,
            "steps": self.rows.steps,
            "B": self.streams,
            "H": self.hidden,
            "u_row": u_row,
            "u_unit": u_unit,
            "CELL": self.weights.cell,
            "GATES": self.weights.w_hh.gates,
            "N": self.weights.w_hh.height,
            "EQUAL": self.rows.equal,
            "REVERSE": self.weights.reverse,
            "BOTH": self.directions == 2,
            "BIASED": self.new_bias is not None,
            "WAITS": not interpreted(),
            # Programs wait for each other, so all of a grid have to run at once, or the launch has to fail.
            "launch_cooperative_grid": not interpreted(),
        }
