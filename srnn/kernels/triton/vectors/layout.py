"""How weights lie in memory for ``recur_vectors``: by program, each row group cut into chunks of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from srnn.kernels.triton.arrange import joined, power
from srnn.kernels.triton.tuning import Tuning
from srnn.kernels.triton.vectors.plan import Shares, VectorPlan, share_out, sizes_of
from srnn.sparse import SparseMatrix


@dataclass(frozen=True)
class VectorLayout:
    """A plan, and the weights as it takes them.

    Attributes:
        plan: its sizes.
        values: of blocks, by program and place.
        columns: of blocks in h, as ``values``; of padding where h has a zero.
        groups: of units, of each slot; -1 for none.
        groups_in_h: where h has them.
        chunks: of a tile that belong to each gate and slot; -1 for none.
        places: of the hidden units in h, [D, H]; None where all are in their own order.
        units: at each place, [D, H].
    """

    plan: VectorPlan
    values: Tensor
    columns: Tensor
    groups: Tensor
    groups_in_h: Tensor
    chunks: Tensor
    places: Tensor | None
    units: Tensor | None

    def to(self, device: torch.device) -> VectorLayout:
        """On a device."""
        parts = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return VectorLayout(**vars(self) | parts)


def padded(hidden: int) -> int:
    """Units that h takes in memory, so that its rows begin at multiples of 32 bytes."""
    return -(-hidden // 16) * 16


def lay_out_vectors(matrices: Sequence[SparseMatrix], programs: int, tuning: Tuning) -> VectorLayout:
    """Deal the groups of units out to programs, and cut each row group into chunks of blocks.

    Columns of padding are ``padded(H)``, where a kernel has a zero.

    Args:
        matrices: [G, H] of each direction, on the CPU, of the same shape and structure.
        programs: of a direction; at most the groups of units.
        tuning: of the device.
    """
    matrix, directions = joined(matrices), len(matrices)
    shares = share_out(matrix, directions, programs)
    chunk, per_tile, warps = sizes_of(matrix, shares, tuning)
    chunks = _cut(shares, chunk, per_tile)
    slots = power(shares.slots)  # the kernel's tensors have sides of powers of two
    if programs == 1:  # has h to itself, in its slots, and there a zero at the place of padding
        slots = max(slots, power(padded(matrix.shape[1]) // matrix.height + 1))
    table, most = _table(chunks, shares.programs, 1 if matrix.gates == 1 else 4, slots)
    plan = VectorPlan(programs, chunk, chunks.tiles, per_tile, slots, most, warps)
    units = _order(shares.owner, directions) if matrix.height == 1 else None
    places = None if units is None else units.argsort(axis=1)
    groups = torch.full((2, shares.programs, slots), -1, dtype=torch.int32)
    own_order = np.arange(shares.groups) % max(1, shares.groups // directions)
    groups[0, shares.owner, shares.slot] = torch.from_numpy(own_order).int()
    groups[1, shares.owner, shares.slot] = torch.from_numpy(own_order if places is None else places.ravel()).int()
    return VectorLayout(
        plan, *_blocks(matrix, directions, plan, chunks, places), groups[0], groups[1], torch.from_numpy(table),
        *(None if part is None else torch.from_numpy(part) for part in (places, units)),
    )  # fmt: skip


@dataclass(frozen=True)
class _Chunks:
    """All chunks in the order program, slot, gate. Each takes its place in its program.

    Attributes:
        tiles: of each program.
        row: group of the matrix that a chunk is of.
        within: number of a chunk in its row group.
        owner: its program.
        slot: of its units.
        gate: of its row group.
        tile: that it falls into.
        place: in its tile.
    """

    tiles: int
    row: np.ndarray
    within: np.ndarray
    owner: np.ndarray
    slot: np.ndarray
    gate: np.ndarray
    tile: np.ndarray
    place: np.ndarray


def _cut(shares: Shares, chunk: int, per_tile: int) -> _Chunks:
    """Cut each row group into chunks of so many blocks, so many of which make a tile."""
    needed = -(-shares.counts // chunk)  # chunks
    order = np.lexsort((shares.slot, shares.owner))
    rows = (order[:, None] + shares.groups * np.arange(shares.gates)[None, :]).ravel()  # row groups in that order
    owner = np.repeat(shares.owner[order], shares.gates)
    of_row = needed.T[order].ravel()
    row = np.repeat(np.arange(len(rows)), of_row)  # of each chunk
    within = np.arange(len(row)) - np.repeat(np.cumsum(of_row) - of_row, of_row)
    per_program = np.bincount(owner[row], minlength=shares.programs)
    place = np.arange(len(row)) - (np.cumsum(per_program) - per_program)[owner[row]]
    tiles = -(-max(1, int(per_program.max(initial=1))) // per_tile)
    slot, gate = shares.slot[order].repeat(shares.gates), np.tile(np.arange(shares.gates), shares.groups)
    return _Chunks(tiles, rows[row], within, owner[row], slot[row], gate[row], place // per_tile, place % per_tile)


def _table(chunks: _Chunks, programs: int, gates: int, slots: int) -> tuple[np.ndarray, int]:
    """Which chunks of a tile belong to a slot's gate, and how many at most."""
    key = (chunks.owner * chunks.tiles + chunks.tile) * (gates * slots) + chunks.gate * slots + chunks.slot
    ranks = np.zeros(len(key), np.int64)
    if len(key):
        sorting = np.argsort(key, kind="stable")
        starts = np.r_[0, np.flatnonzero(np.diff(key[sorting])) + 1]
        ranks[sorting] = np.arange(len(key)) - np.repeat(starts, np.diff(np.r_[starts, len(key)]))
    most = power(int(ranks.max(initial=0)) + 1)
    table = np.full((programs * chunks.tiles * gates * slots, most), -1, np.int16)
    table[key, ranks] = chunks.place
    return table, most


def _blocks(
    matrix: SparseMatrix, directions: int, plan: VectorPlan, chunks: _Chunks, places: np.ndarray | None
) -> tuple[Tensor, Tensor]:
    """Values and columns of the blocks at each place of each program."""
    pointers = matrix.row_pointers.numpy().astype(np.int64)
    per_gate = matrix.groups // matrix.gates
    wide = matrix.columns.to(torch.int32)
    if places is not None:
        of_row_group = np.repeat(np.arange(matrix.groups) % per_gate * directions // per_gate, np.diff(pointers))
        wide = torch.from_numpy(places[of_row_group, wide.numpy()].astype(np.int32))
    source = _sources(pointers, plan, chunks, directions, matrix.height)
    # Taller blocks share an index among many values, so look-ups are few.
    if matrix.height == 1:
        per_word = 2 if matrix.values.itemsize == 2 else 1
        source = torch.from_numpy(_spread(source.numpy(), wide.numpy() // per_word, plan.chunk))
    target = (source >= 0).nonzero().flatten()
    columns = torch.full((len(source),), padded(matrix.shape[1]), dtype=torch.int16)
    values = torch.zeros(len(source), matrix.height, dtype=matrix.values.dtype)
    source = source[target]
    columns[target] = wide[source].to(torch.int16)
    values[target] = matrix.values[source]
    return values, columns


def _sources(pointers: np.ndarray, plan: VectorPlan, chunks: _Chunks, directions: int, height: int) -> Tensor:
    """Which block of the matrix is at each place of each program; -1 for none.

    Single elements of a chunk are neighbours; taller blocks of a chunk lie as far apart as a tile has chunks.
    """
    chunk, per_tile = plan.chunk, plan.chunks
    size = plan.tiles * per_tile * chunk
    block = pointers[chunks.row][:, None] + chunks.within[:, None] * chunk + np.arange(chunk)[None, :]
    used = block < pointers[chunks.row + 1][:, None]
    start = chunks.owner * size + chunks.tile * (per_tile * chunk) + chunks.place
    if height == 1:
        start += chunks.place * (chunk - 1)
    target = start[:, None] + np.arange(chunk)[None, :] * (1 if height == 1 else per_tile)
    source = torch.full((directions * plan.programs * size,), -1)
    source[torch.from_numpy(target[used])] = torch.from_numpy(block[used])
    return source


def _spread(source: np.ndarray, words: np.ndarray, chunk: int) -> np.ndarray:
    """Order the elements of each chunk so that the threads of a warp find theirs in different banks of shared memory.

    A thread holds 8 elements in a row, and the 32 threads of a warp look up their n-th ones together: in one go if
    their words of h lie in different banks of the 32, else in as many as the fullest bank has words. For random columns
    that is 3.5; here each place takes, of what is left of its chunk, an element of an emptier bank.

    Args:
        source: number of the element at each place, or -1.
        words: the word of h that each element is multiplied with.
        chunk: places of a chunk.
    """
    if len(source) % 256:
        return source
    rows = source.reshape(-1, 256)
    number = np.arange(len(rows))
    left = rows.reshape(len(rows), 256 // chunk, chunk).copy()
    bank = np.where(left >= 0, words[np.maximum(left, 0)] % 32, 32)
    taken = np.zeros_like(left, dtype=bool)
    ordered = np.empty_like(rows)
    for place in range(8):
        load = np.zeros((len(rows), 33), np.int8)
        for lane in range(32):
            at = lane * 8 + place
            own = at // chunk
            cost = np.take_along_axis(load, bank[:, own], axis=1) * 2 + (bank[:, own] == 32)
            best = np.where(taken[:, own], 127, cost).argmin(axis=1)
            taken[number, own, best] = True
            ordered[:, at] = left[number, own, best]
            load[number, bank[number, own, best]] += 1
            load[:, 32] = 0  # padding asks for nothing
    return ordered.ravel()


def _order(owner: np.ndarray, directions: int) -> np.ndarray | None:
    """The units of each direction by program, [D, H]; None if they are so already.

    A program's units have to be neighbours in h: single ones, written one by one among other programs' to the same 32
    bytes, made a step of a GRU 1024 take 1.5 times as long on an H100.
    """
    if not (np.diff(owner) < 0).any():
        return None
    return owner.reshape(directions, -1).argsort(axis=1, kind="stable")
