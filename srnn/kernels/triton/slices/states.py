"""The states of slices of streams in memory, as ``recur_slices`` and ``recur_gates`` take them and leave them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from srnn.kernels.contract import State
from srnn.kernels.triton.call import RecurrentCall
from srnn.kernels.triton.chip import interpreted
from srnn.kernels.triton.prologue import rows_at
from srnn.kernels.triton.slices.layout import SliceLayout


@triton.jit
def write_outputs(
    h,  # [D, slices, T + 1, H, BP], as ``recur_slices`` or ``recur_gates`` leaves it
    y,  # [rows, D, H]
    sizes,  # [T], streams of a step
    offsets,  # [T], first row of a step
    slices,
    steps,
    B,
    H,
    BP: tl.constexpr,
    UNITS: tl.constexpr,
    EQUAL: tl.constexpr,
    REVERSE: tl.constexpr,
    BOTH: tl.constexpr,
):
    """The states after each step, transposed. They would write them in pieces of two bytes, H apart, which takes a
    quarter of their time with 64 streams."""
    t = tl.program_id(0)
    part = tl.program_id(1) % slices
    direction = tl.program_id(1) // slices
    directions = tl.num_programs(1) // slices
    unit = tl.program_id(2) * UNITS + tl.arange(0, UNITS)[:, None]
    batch = tl.arange(0, BP)[None, :]
    at = t + 1
    if REVERSE or (BOTH and direction == 1):
        at = t
    SIZE = tl.cast(H, tl.int64) * BP
    source = h + (tl.program_id(1).to(tl.int64) * (steps + 1) + at) * SIZE
    bits = tl.load(source + unit * BP + batch, mask=unit < H, other=0)
    row, there = rows_at(sizes, offsets, t, part * BP + batch, False, steps, B, EQUAL)
    tl.store(y + (row * directions + direction) * H + unit, bits, mask=there & (unit < H))


@dataclass(frozen=True)
class SlicedStates:
    """Memory for a call.

    Attributes:
        call: whose.
        layout: of its weights.
        h: [D, slices, T + 1, H, wide], bits of the states in the order of time; the first is the given one.
        c: [D, slices, H, wide], an LSTM's cells in fp32; for other cells, something to point to.
    """

    call: RecurrentCall
    layout: SliceLayout
    h: Tensor
    c: Tensor

    @classmethod
    def of(cls, call: RecurrentCall, layout: SliceLayout, unwritten: bool) -> SlicedStates:
        """Allocate, and copy the call's state; with ``unwritten``, all later states are marked as not written yet."""
        wide, steps, state = layout.plan.wide, call.rows.steps, call.state
        slices = -(-call.streams // wide)
        size = call.directions, slices, steps + 1, call.hidden, wide
        h = torch.empty(*size, dtype=call.bits, device=call.u_NG.device)
        if steps > 1 and unwritten:
            h.fill_(-1)
        for d, h0 in enumerate(_sliced(state[0].contiguous().view(call.bits), wide)):
            h[d, :, steps if call.reverse(d) else 0] = h0
        c = layout.values
        if len(state) > 1:  # a copy, which the kernel writes to
            given = _sliced(state[1], wide)
            c = torch.empty(given.shape, dtype=torch.float32, device=given.device).copy_(given)
        return cls(call, layout, h, c)

    @property
    def slices(self) -> int:
        """Of all streams."""
        return self.h.shape[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Programs, and slices that run at the same time; the others take turns with them."""
        plan, call = self.layout.plan, self.call
        programs = call.directions * plan.programs
        return programs, min(self.slices, max(1, plan.resident * call.chip.processors // programs))

    def arguments(self) -> dict[str, Any]:
        """Those that both kernels have, by the kernels' names, and options of the launch."""
        layout, call = self.layout, self.call
        return call.arguments() | {
            "h": self.h,
            "c": self.c,
            "values": layout.values,
            "columns": layout.columns,
            "values_2": layout.values_2,
            "columns_2": layout.columns_2,
            "units": layout.units,
            "new_bias": self.c if call.new_bias is None else call.new_bias,
            "sizes": call.rows.sizes,
            "slices": self.slices,
            "K": layout.plan.k,
            "K_2": layout.plan.k_2,
            "BP": layout.plan.wide,
            "ONE_SLICE": self.slices == self.grid[1],
            "WIDEN": interpreted(),  # which has no products of 16 bits
            "num_warps": layout.plan.warps,
        }

    def read(self) -> tuple[Tensor, State]:
        """The call's outputs, [N, D * H], and each stream's state after its last step."""
        call, rows, (directions, slices, _, hidden, wide) = self.call, self.call.rows, self.h.shape
        y_NH = call.u_NG.new_empty(call.u_NG.shape[0], directions * hidden)
        units = call.chip.tuning.output_units
        write_outputs[(rows.steps, directions * slices, -(-hidden // units))](
            h=self.h, y=y_NH.view(call.bits), sizes=rows.sizes, offsets=rows.offsets,
            slices=slices, steps=rows.steps, B=call.streams, H=hidden,
            BP=wide, UNITS=units, EQUAL=rows.equal, REVERSE=call.weights.reverse, BOTH=directions == 2, num_warps=4,
        )  # fmt: skip
        last = [self.h[d, :, 0 if call.reverse(d) else rows.steps] for d in range(directions)]
        end = _unsliced(last[0][None] if directions == 1 else torch.stack(last), call.streams).view(call.u_NG.dtype)
        if len(call.state) == 1:
            return y_NH, (end,)
        return y_NH, (end, _unsliced(self.c, call.streams).to(call.state[1].dtype))


def _sliced(part_DBH: Tensor, wide: int) -> Tensor:
    """[D, slices, H, wide] of [D, B, H]; streams that there are not are zero."""
    directions, streams, hidden = part_DBH.shape
    slices = -(-streams // wide)
    more = slices * wide - streams
    padded_DBH = F.pad(part_DBH, (0, 0, 0, more)) if more else part_DBH  # which else copies all the same
    return padded_DBH.view(directions, slices, wide, hidden).transpose(2, 3)


def _unsliced(part: Tensor, streams: int) -> Tensor:
    """[D, B, H] of [D, slices, H, wide]."""
    directions, _, hidden, _ = part.shape
    return part.transpose(2, 3).reshape(directions, -1, hidden)[:, :streams].contiguous()
