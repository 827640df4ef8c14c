"""How a recurrent matrix is dealt out to programs, each of which has units of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from srnn.kernels.triton.arrange import power
from srnn.kernels.triton.chip import Chip
from srnn.kernels.triton.tuning import Tuning
from srnn.sparse import SparseMatrix

# A program may have this many times the mean before its units are no longer neighbours; not measured against others.
_MOST_UNEVEN = 1.15


@dataclass(frozen=True)
class VectorPlan:
    """Sizes of ``recur_vectors``.

    Attributes:
        programs: of a stream and direction.
        chunk: blocks whose products are added up first, K.
        tiles: parts that a program's weights are gone through in; 1 keeps them in registers.
        chunks: of a tile.
        slots: groups of units of a program.
        most: chunks that a slot has of one gate, in a tile.
        warps: of a program.
    """

    programs: int
    chunk: int
    tiles: int
    chunks: int
    slots: int
    most: int
    warps: int


@dataclass(frozen=True)
class Shares:
    """Which program has which group of units. All directions count: their groups and programs follow each other.

    Attributes:
        directions: D.
        programs: of all directions.
        counts: blocks of each gate's row groups, [gates, groups].
        owner: program of each group, [groups].
        slot: of each group in its program, [groups].
    """

    directions: int
    programs: int
    counts: np.ndarray
    owner: np.ndarray
    slot: np.ndarray

    @property
    def gates(self) -> int:
        """Rows of ``counts``."""
        return len(self.counts)

    @property
    def groups(self) -> int:
        """Columns of ``counts``."""
        return self.counts.shape[1]

    @property
    def slots(self) -> int:
        """Groups of the program that has most."""
        return int(np.bincount(self.owner, minlength=self.programs).max()) if self.groups else 1

    def chunks_of(self, chunk: int) -> int:
        """Chunks of so many blocks in the program that has most to do."""
        each = np.bincount(self.owner, (-(-self.counts // chunk)).sum(axis=0), minlength=self.programs)
        return max(1, int(each.max(initial=1)))


def programs_of(matrices: Sequence[SparseMatrix], chip: Chip, streams: int) -> int:
    """Programs of a direction that share a stream, so that all streams that fit run at once, one a processor."""
    tuning, processors = chip.tuning, chip.processors
    entries = max(matrix.entries for matrix in matrices)
    groups = matrices[0].groups // matrices[0].gates
    most = min(processors // len(matrices), groups, -(-entries // tuning.least_values))
    least = -(-entries // (tuning.most_tiles * tuning.most_values))
    return max(1, min(most, max(least, processors // (len(matrices) * streams))))


def share_out(matrix: SparseMatrix, directions: int, programs: int) -> Shares:
    """Deal the groups of units of each direction out to so many programs."""
    counts = np.diff(matrix.row_pointers.numpy().astype(np.int64)).reshape(matrix.gates, -1)
    dealt = [_deal(part.sum(axis=0), programs) for part in np.split(counts, directions, axis=1)]
    owner = np.concatenate([number + programs * d for d, (number, _) in enumerate(dealt)])
    return Shares(directions, directions * programs, counts, owner, np.concatenate([slot for _, slot in dealt]))


def sizes_of(matrix: SparseMatrix, shares: Shares, tuning: Tuning) -> tuple[int, int, int]:
    """Blocks a chunk, chunks a tile, and warps, for the program with most to do."""
    values = shares.chunks_of(1) * matrix.height
    most = tuning.most_values // (2 if matrix.values.itemsize == 4 else 1)
    if matrix.height == 1:
        chunk = 8 if shares.chunks_of(1) <= tuning.most_of_eight else 16
        if shares.counts.max(initial=0) > tuning.longest_row * chunk:
            chunk = 64
        per_tile = min(power(shares.chunks_of(chunk)), max(1, most // chunk))
        places = per_tile * chunk
        warps = 16 if places > tuning.places_of_16_warps else 8 if places > tuning.places_of_8_warps else 4
        return chunk, per_tile, warps
    warps = 8 if values > tuning.values_of_8_warps else 4
    per_tile = 256 * warps // matrix.height
    chunk = 4
    while shares.chunks_of(chunk) > per_tile and chunk * per_tile * matrix.height <= most:
        chunk *= 2
    return chunk, per_tile, warps


def _deal(cost: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """Program and slot of each group of units; neighbours stay together unless that leaves a program too much."""
    groups, each = len(cost), math.ceil(len(cost) / programs) if programs else 0
    owner = np.arange(groups) * programs // max(1, groups)
    loads = np.bincount(owner, cost, minlength=programs)
    if loads.max(initial=0) > _MOST_UNEVEN * max(1.0, loads.mean()):
        # Dearest first, each to the least loaded program with a place left.
        sums, places = np.zeros(programs), np.full(programs, each)
        for group in np.argsort(-cost, kind="stable"):
            best = int(np.where(places > 0, sums, np.inf).argmin())
            owner[group], sums[best], places[best] = best, sums[best] + cost[group], places[best] - 1
    slot = np.zeros(groups, np.int64)
    sorting = np.argsort(owner, kind="stable")
    first = np.r_[0, np.cumsum(np.bincount(owner, minlength=programs))[:-1]]
    slot[sorting] = np.arange(groups) - first[owner[sorting]]
    return owner, slot
