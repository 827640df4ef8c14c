"""How many streams a slice has, and how a recurrent matrix of blocks falls into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srnn.kernels.triton.arrange import two_powers
from srnn.kernels.triton.chip import Chip
from srnn.sparse import SparseMatrix

RESERVED = 1 << 10  # bytes of shared memory that the driver takes for a program


@dataclass(frozen=True)
class Workload:
    """What is to run.

    Attributes:
        directions: D, which share the device.
        gates: of the cell.
        groups: of units, of height rows each.
        height: N of the blocks, 16 or 32.
        most: blocks of the fullest row group.
        size: bytes of a value, 2 or 4.
        streams: at a time.
        ieee: whether products, if of fp32, are not on tensor cores.
    """

    directions: int
    gates: int
    groups: int
    height: int
    most: int
    size: int
    streams: int
    ieee: bool = False

    @classmethod
    def of(cls, matrices: Sequence[SparseMatrix], size: int, streams: int, ieee: bool = False) -> Workload:
        """Of matrices on the CPU, one a direction, whose values take ``size`` bytes."""
        gates, groups, height = matrices[0].gates, matrices[0].groups, matrices[0].height
        most = max(1, *(int(matrix.row_pointers.diff().max()) for matrix in matrices))
        return cls(len(matrices), gates, groups // gates, height, most, size, streams, ieee)

    def at_once(self, chip: Chip) -> int:
        """Slices that run at the same time, of a program a processor."""
        return chip.processors // (self.directions * self.groups)


@dataclass(frozen=True)
class SlicePlan:
    """Sizes of ``recur_slices``, which has a program for each group of units.

    Attributes:
        programs: of a slice of streams and a direction.
        wide: streams of a slice.
        chunks: that a program's blocks fall into, each of one gate.
        k: blocks of a chunk, in a tile.
        k_2: blocks that a chunk has beyond, in a smaller tile of its own; 0 for none.
        tiles: that a chunk's blocks fall into; 1 keeps them on the chip.
        warps: of a program.
        each: groups of a program.
    """

    programs: int
    wide: int
    chunks: int
    k: int
    k_2: int
    tiles: int
    warps: int
    each: int = 1

    @property
    def resident(self) -> int:
        """Programs that run on a multiprocessor at once, whatever registers they take."""
        return 2 if self.warps == 4 else 1

    def vectors(self, k: int, size: int) -> int:
        """Of 16 bytes, that a thread loads at a time of the rows of h for so many blocks a chunk."""
        return max(1, self.chunks * k * self.wide * size // (16 * 32 * self.warps))

    def fits(self, work: Workload, chip: Chip) -> bool:
        """Whether all programs of a direction run at once on its processors, each with its shared memory."""
        enough = self.resident * (self.shared_bytes(work.height, work.size) + RESERVED) <= chip.shared_memory
        return enough and self.programs <= self.resident * (chip.processors // work.directions)

    def shared_bytes(self, height: int, size: int) -> int:
        """Of shared memory that a program takes at most, with values of so many bytes."""
        rows_of_h, sums = self.chunks * self.k * self.wide * size, self.chunks * height * self.wide * 4
        return self.bytes_of_values(height, size) + max(rows_of_h, sums)

    def bytes_of_values(self, height: int, size: int) -> int:
        """Of shared memory that values take; three tiles of them where they are loaded anew at each step."""
        return self.chunks * height * (self.k + self.k_2) * size * (1 if self.tiles == 1 else 3)


def plan_slices(work: Workload, chip: Chip) -> SlicePlan | None:
    """Slices whose programs keep their weights in registers; None where they are too many."""
    tuning, at_once = chip.tuning, work.at_once(chip)
    k, k_2 = two_powers(_needed(work, chip), 16)
    narrow = _narrow(work)
    # Slices and warps, the best first. Of 4 warps, two programs run on a multiprocessor.
    forms = [(narrow, 8 if at_once else 4)]
    if at_once and work.size == 2:
        forms = [*([(32, 16)] if work.streams > 16 * at_once else []), *forms, (16, 16)]
    for wide, warps in forms:
        registers = min(tuning.operand_registers[warps], tuning.ieee_registers if work.ieee and work.size == 4 else 255)
        plan = SlicePlan(work.groups, wide, tuning.slice_chunks, k, k_2, 1, warps)
        taken = plan.chunks * (k + k_2) * (work.height + wide) * work.size
        if taken <= registers * 128 * warps and plan.fits(work, chip):
            return plan
    return None


def plan_from_cache(work: Workload, chip: Chip) -> SlicePlan:
    """Slices whose programs load their weights at each step, in tiles."""
    k = 32 if work.size == 4 else 64
    tiles, warps = -(-_needed(work, chip) // k), 8 if work.at_once(chip) else 4
    return SlicePlan(work.groups, _narrow(work), chip.tuning.slice_chunks, k, 0, tiles, warps)


def _needed(work: Workload, chip: Chip) -> int:
    """Blocks of a chunk; cells of several gates have a quarter of the chunks for each."""
    chunks = chip.tuning.slice_chunks
    return -(-work.most // (chunks if work.gates == 1 else chunks // 4))


def _narrow(work: Workload) -> int:
    return 8 if work.streams <= 8 or work.size == 4 else 16
