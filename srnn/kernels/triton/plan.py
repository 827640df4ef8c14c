"""How a recurrent matrix is laid out over the programs of a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srnn.sparse import SparseMatrix

MOST_UNITS = 1 << 13  # h of so many fits the shared memory that a gather goes through


# Values a program has at least, so that small networks take few programs and more streams at once. Not measured yet.
LEAST_VALUES = 2048
# Values of a tile, which stays in registers: 64 a thread. Half as many of fp32; twice as many of blocks, which have one
# index each.
MOST_VALUES = 1 << 14


@dataclass(frozen=True)
class Plan:
    """Sizes of ``recur_vectors``.

    Attributes:
        programs: of a stream.
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
class Layout:
    """A plan, and the weights as it takes them."""

    plan: Plan
    values: Tensor
    columns: Tensor
    groups: Tensor
    chunks: Tensor

    def to(self, device: torch.device) -> Layout:
        """On a device."""
        moved = (part.to(device) for part in (self.values, self.columns, self.groups, self.chunks))
        return Layout(self.plan, *moved)


def lay_out(matrix: SparseMatrix, processors: int) -> Layout:
    """Deal the groups of units out to programs, and cut each row group into chunks of blocks.

    Args:
        matrix: [G, H], on the CPU.
        processors: of the device; each takes one program at most.
    """
    pointers = matrix.row_pointers.numpy().astype(np.int64)
    per_gate = matrix.groups // matrix.gates
    counts = np.diff(pointers).reshape(matrix.gates, per_gate)
    programs = max(1, min(processors, per_gate, -(-matrix.entries // LEAST_VALUES)))
    owner, slot = _deal(counts.sum(axis=0), programs)
    slots = int(np.bincount(owner, minlength=programs).max()) if per_gate else 1
    chunk, per_tile, warps = _sizes(matrix, counts, owner, programs)
    needed = -(-counts // chunk)  # chunks

    # Chunks in the order program, slot, gate; each takes its place in its program.
    order = np.lexsort((slot, owner))
    rows = (order[:, None] + per_gate * np.arange(matrix.gates)[None, :]).ravel()  # row groups in that order
    row_owner = np.repeat(owner[order], matrix.gates)
    of_row = needed.T[order].ravel()
    row = np.repeat(np.arange(len(rows)), of_row)  # of each chunk
    within = np.arange(len(row)) - np.repeat(np.cumsum(of_row) - of_row, of_row)
    per_program = np.bincount(row_owner[row], minlength=programs)
    place = np.arange(len(row)) - (np.cumsum(per_program) - per_program)[row_owner[row]]
    largest = max(1, int(per_program.max(initial=1)))
    tiles = -(-largest // per_tile)

    # Tables: which chunks of a tile belong to a slot's gate.
    slots_padded = _power(slots)
    row_slot, gate = slot[order].repeat(matrix.gates), np.tile(np.arange(matrix.gates), per_gate)
    in_tile = place // per_tile
    gates = 1 if matrix.gates == 1 else 4  # a power of two
    key = (row_owner[row] * tiles + in_tile) * (gates * slots_padded) + gate[row] * slots_padded + row_slot[row]
    ranks = np.zeros(len(row), np.int64)
    if len(row):
        sorting = np.argsort(key, kind="stable")
        starts = np.r_[0, np.flatnonzero(np.diff(key[sorting])) + 1]
        ranks[sorting] = np.arange(len(row)) - np.repeat(starts, np.diff(np.r_[starts, len(row)]))
    most = _power(int(ranks.max(initial=0)) + 1)
    table = np.full((programs * tiles * gates * slots_padded, most), -1, np.int16)
    table[key, ranks] = place % per_tile

    # Blocks of each chunk.
    size = tiles * per_tile * chunk
    block = pointers[rows[row]][:, None] + within[:, None] * chunk + np.arange(chunk)[None, :]
    used = block < pointers[rows[row] + 1][:, None]
    start = row_owner[row] * size + in_tile * (per_tile * chunk) + place % per_tile
    if matrix.height == 1:
        start += (place % per_tile) * (chunk - 1)
    target = start[:, None] + np.arange(chunk)[None, :] * (1 if matrix.height == 1 else per_tile)
    source, target = torch.from_numpy(block[used]), torch.from_numpy(target[used])
    columns = torch.full((programs * size,), -1, dtype=torch.int16)
    columns[target] = matrix.columns.to(torch.int32)[source].to(torch.int16)
    values = torch.zeros(programs * size, matrix.height, dtype=matrix.values.dtype)
    values[target] = matrix.values[source]
    groups = torch.full((programs, slots_padded), -1, dtype=torch.int32)
    groups[torch.from_numpy(owner), torch.from_numpy(slot)] = torch.arange(per_gate, dtype=torch.int32)
    plan = Plan(programs, chunk, tiles, per_tile, slots_padded, most, warps)
    return Layout(plan, values, columns, groups, torch.from_numpy(table))


def _sizes(matrix: SparseMatrix, counts: np.ndarray, owner: np.ndarray, programs: int) -> tuple[int, int, int]:
    """Blocks a chunk, chunks a tile, and warps, for the program with most to do.

    Measured on an H200 with layers of 1024 to 2560 units at 90 and 95 %, batch 1, fp16. Single elements: about 1024
    chunks of up to 16. Taller blocks: so many chunks that each thread holds 8 values of one, 16 bytes, because it then
    adds up a chunk by itself (32x1, 90 %, GRU 2560: 2.1 us a step; with twice or half as many chunks 3.0).
    """

    def chunks(chunk: int) -> int:
        each = np.bincount(owner, (-(-counts // chunk)).sum(axis=0), minlength=programs)
        return max(1, int(each.max(initial=1)))

    values = chunks(1) * matrix.height
    most = MOST_VALUES // (2 if matrix.values.dtype == torch.float32 else 1)
    if matrix.height == 1:
        chunk = min(16, max(4, _power(values) // 1024))
        per_tile = min(_power(chunks(chunk)), max(1, most // chunk))
        return chunk, per_tile, 8 if per_tile * chunk > 4096 else 4
    warps = 8 if values > 12 << 10 else 4
    per_tile = 256 * warps // matrix.height
    chunk = 4
    while chunks(chunk) > per_tile and chunk * per_tile * matrix.height <= most:
        chunk *= 2
    return chunk, per_tile, warps


def _deal(cost: np.ndarray, programs: int) -> tuple[np.ndarray, np.ndarray]:
    """Program and slot of each group of units; neighbours stay together unless that leaves a program too much."""
    groups, each = len(cost), math.ceil(len(cost) / programs) if programs else 0
    owner = np.arange(groups) * programs // max(1, groups)
    loads = np.bincount(owner, cost, minlength=programs)
    if loads.max(initial=0) > 1.15 * max(1.0, loads.mean()):
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


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
