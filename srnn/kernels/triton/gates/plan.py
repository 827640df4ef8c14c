"""How the groups of units are dealt out where all blocks of a gate are one product."""

from __future__ import annotations

from dataclasses import dataclass

from srnn.kernels.triton.arrange import two_powers
from srnn.kernels.triton.chip import Chip
from srnn.kernels.triton.slices.plan import SlicePlan, Workload


@dataclass(frozen=True)
class GatePlan(SlicePlan):
    """Sizes of ``recur_gates``: a chunk is all blocks of a gate of a group, one product.

    Attributes:
        each: groups of a program, 1 or 2.
        ahead: whether the rows of the next gate are asked for before the product of one, which takes registers.
    """

    ahead: bool = False

    def shared_bytes(self, height: int, size: int) -> int:
        """Of shared memory that a program takes at most, with values of so many bytes."""
        rows_of_h = (self.k + self.k_2) * self.wide * size * (2 if self.ahead else 1)
        return self.bytes_of_values(height, size) + rows_of_h + self.each * height * self.wide * 4


def plan_gates(work: Workload, chip: Chip) -> GatePlan | None:
    """One product a gate; None where a gate's blocks are too many, or not of 16 bits, or the device is no Hopper GPU.

    On others ``recur_gates`` runs out of registers: compiled for an A100, GRU 2560 32x1 spills 7,800 bytes a thread.

    Where groups outnumber the processors, programs of one gate fit two a processor, and others take two groups each.
    """
    tuning, processors = chip.tuning, chip.processors // work.directions
    if work.size != 2 or not chip.warpgroups:
        return None
    k, k_2 = two_powers(work.most, 32)  # that each thread of 8 warps loads a whole vector
    each = 2 if work.groups > processors and work.gates > 1 else 1
    warps = 4 if work.groups > processors and work.gates == 1 else 8
    ahead = warps == 8 and work.gates * each < 4 and k + k_2 <= tuning.most_ahead
    programs = -(-work.groups // each)
    plan = GatePlan(programs, tuning.gate_streams, work.gates * each, k, k_2, 1, warps, each, ahead)
    return plan if k + k_2 <= tuning.most_gate_blocks and plan.fits(work, chip) else None


def gates_are_faster(work: Workload, slices: SlicePlan, chip: Chip) -> bool:
    """Whether these slices of streams, resident in registers, take longer than 64 at a time, one product a gate."""
    at_once, most = work.at_once(chip), chip.tuning.most_beside
    if not at_once:  # two programs a multiprocessor
        return work.gates < 4 and work.streams > most
    side_by_side = slices.wide * at_once
    return work.streams > (min(most, side_by_side) if work.gates == 1 else side_by_side)
