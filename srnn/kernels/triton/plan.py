"""How a recurrent matrix is laid out over the programs of a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from srnn.sparse import SparseMatrix, stacked

MOST_UNITS = 1 << 13  # h of so many fits the shared memory that a gather goes through


# Values a program has at least, so that small networks take few programs and more streams at once. On an H100, 90 % of
# single elements, us a step: GRU 512 takes 1.2 with one stream, with 512 of them 1.8, with 8192 1.6; GRU 256 with 16
# streams 1.1, 1.1 and 1.3.
LEAST_VALUES = 2048
# Values of a tile, which stays in registers: 64 a thread. Half as many of fp32; twice as many of blocks, which have one
# index each.
MOST_VALUES = 1 << 14
# Tiles up to which a program takes more values for the sake of more streams at once.
MOST_TILES = 4
# Chunks of 8 or 16 elements that a row may have.
LONGEST = 64
# Chunks of a program of ``recur_blocks``: two a warp of eight.
CHUNKS = 16
# Streams of a product of all blocks of a gate, and blocks that it may have: 512 rows of 64 streams are 64 registers a
# thread. On an H100, 32x1 90 %, 64 streams: GRU 2560 takes 5.4 us a step so, in slices of 32 7.3, of 16 10.4; RNN 3072
# 3.0, 4.7 and 5.4; GRU 3568 7.1, in slices of 16 16.2. Slices that all run at the same time are faster, unless there is
# one gate: GRU 1760 4.0 against 4.5, LSTM 1500 3.9 against 5.3, but RNN 1760 2.9 against 2.4. In two goes they are not:
# GRU 1760, 128 streams, 6.5 against 4.8; GRU 3568, 32 streams, 8.2 against 7.0; GRU 2560 80 %, 24, 14.0 against 10.0.
BY_GATE, MOST_BY_GATE = 64, 640
# Of these, up to which the rows of the next gate are asked for early: GRU 2560 takes 5.8 without; with more, and with
# four gates, registers run out: GRU 3568 takes 9.5 with it, LSTM 2150 6.3, without 5.9.
MOST_AHEAD = 320
# Streams up to which one after the other is faster than 64 at once where blocks are too many for registers. On an H100,
# GRU 3568 16x1 90 % takes 3.2 us for each, and 17.5 for up to 64.
ONE_BY_ONE = 5
# Bytes of shared memory that the driver takes for a program.
RESERVED = 1 << 10
# Registers that a thread's values and rows of h may take, by warps of its program, beside those for sums and addresses.
# On an H100: GRU 3568 32x1 90 %, 64 streams, takes 16.2 us a step with 192 in 8 warps, and in 16 warps 20.0; GRU 2560
# 80 %, 16 streams, 4.4 with 108 in 16 warps and by gates 8.6, with up to 640 blocks a gate instead of 576, which need
# 120, 4.8 and 10.2; GRU 1024 16x1 without zeros, which would need 128 in 16, takes 52 because they don't fit. GRU 2560
# 16x1 90 % needs the 160 of 4 warps: 5.4 us with 16 streams, and one at a time 40. GRU 2560 32x1 90 % of fp32 needs 200
# in 8: 11.7 us with 16 streams, and 18 from the cache; but as ieee, not on tensor cores, 153, and 31 from the cache.
OPERAND_REGISTERS = {4: 160, 8: 200, 16: 120}
IEEE_REGISTERS = 192


@dataclass(frozen=True)
class Plan:
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
class Layout:
    """A plan, and the weights as it takes them.

    Attributes:
        groups: of units, of each slot; -1 for none.
        groups_in_h: where h has them.
        places: of the hidden units in h, [D, H]; None where all are in their own order.
        units: at each place, [D, H].
    """

    plan: Plan
    values: Tensor
    columns: Tensor
    groups: Tensor
    groups_in_h: Tensor
    chunks: Tensor
    places: Tensor | None
    units: Tensor | None

    def to(self, device: torch.device) -> Layout:
        """On a device."""
        parts = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return Layout(**vars(self) | parts)


def programs_of(matrices: Sequence[SparseMatrix], processors: int, streams: int) -> int:
    """Programs of a direction that share a stream, so that all streams that fit run at once, one a processor."""
    entries = max(matrix.entries for matrix in matrices)
    most = min(processors // len(matrices), matrices[0].groups // matrices[0].gates, -(-entries // LEAST_VALUES))
    least = -(-entries // (MOST_TILES * MOST_VALUES))
    return max(1, min(most, max(least, processors // (len(matrices) * streams))))


def padded(hidden: int) -> int:
    """Units that h takes in memory, so that its rows begin at multiples of 32 bytes."""
    return -(-hidden // 16) * 16


def lay_out(matrices: Sequence[SparseMatrix], programs: int) -> Layout:
    """Deal the groups of units out to programs, and cut each row group into chunks of blocks.

    Columns of padding are ``padded(H)``, where a kernel has a zero.

    Args:
        matrices: [G, H] of each direction, on the CPU, of the same shape and structure.
        programs: of a direction; at most the groups of units.
    """
    matrix = _joined(matrices)
    padding = padded(matrix.shape[1])
    pointers = matrix.row_pointers.numpy().astype(np.int64)
    directions, each = len(matrices), programs
    programs, per_gate = directions * each, matrix.groups // matrix.gates
    counts = np.diff(pointers).reshape(matrix.gates, per_gate)
    dealt = [_deal(part.sum(axis=0), each) for part in np.split(counts, directions, axis=1)]
    owner = np.concatenate([number + each * d for d, (number, _) in enumerate(dealt)])
    slot = np.concatenate([places for _, places in dealt])
    slots = int(np.bincount(owner, minlength=programs).max()) if per_gate else 1
    units = _order(owner, directions) if matrix.height == 1 else None
    places = None if units is None else units.argsort(axis=1)
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
    if each == 1:  # has h to itself, in its slots, and there a zero at the place of padding
        slots_padded = max(slots_padded, _power(padding // matrix.height + 1))
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
    source = torch.full((programs * size,), -1)
    source[torch.from_numpy(target[used])] = torch.from_numpy(block[used])
    wide = matrix.columns.to(torch.int32)
    if places is not None:
        of_row_group = np.repeat(np.arange(matrix.groups) % per_gate * directions // per_gate, np.diff(pointers))
        wide = torch.from_numpy(places[of_row_group, wide.numpy()].astype(np.int32))
    if matrix.height == 1:
        per_word = 2 if matrix.values.itemsize == 2 else 1
        source = torch.from_numpy(_spread(source.numpy(), wide.numpy() // per_word, chunk))
    target = (source >= 0).nonzero().flatten()
    source = source[target]
    columns = torch.full((programs * size,), padding, dtype=torch.int16)
    columns[target] = wide[source].to(torch.int16)
    values = torch.zeros(programs * size, matrix.height, dtype=matrix.values.dtype)
    values[target] = matrix.values[source]
    groups = torch.full((2, programs, slots_padded), -1, dtype=torch.int32)
    own_order = np.arange(per_gate) % max(1, per_gate // directions)
    groups[0, owner, slot] = torch.from_numpy(own_order).int()
    groups[1, owner, slot] = torch.from_numpy(own_order if places is None else places.ravel()).int()
    return Layout(
        Plan(each, chunk, tiles, per_tile, slots_padded, most, warps), values, columns, groups[0], groups[1],
        torch.from_numpy(table), *(None if part is None else torch.from_numpy(part) for part in (places, units)),
    )  # fmt: skip


@dataclass(frozen=True)
class BlockPlan:
    """Sizes of ``recur_blocks``, which has a program for each group of units, or of ``recur_gates``.

    Attributes:
        programs: of a slice of streams and a direction.
        wide: streams of a slice.
        chunks: that a program's blocks fall into, each of one gate.
        k: blocks of a chunk, in a tile.
        k_2: blocks that a chunk has beyond, in a smaller tile of its own; 0 for none.
        tiles: that a chunk's blocks fall into; 1 keeps them on the chip.
        warps: of a program.
        each: groups of a program, 1 or 2.

    With ``BY_GATE`` streams a slice it is ``recur_gates``, and a chunk is all blocks of a gate of a group, one product.
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

    @property
    def by_gate(self) -> bool:
        """One product a gate."""
        return self.wide == BY_GATE

    @property
    def ahead(self) -> bool:
        """Whether the rows of the next gate are asked for before the product of one, which takes registers."""
        return self.by_gate and self.warps == 8 and self.chunks < 4 and self.k + self.k_2 <= MOST_AHEAD

    def vectors(self, k: int, size: int) -> int:
        """Of 16 bytes, that a thread loads at a time of the rows of h for so many blocks a chunk."""
        return max(1, self.chunks * k * self.wide * size // (16 * 32 * self.warps))

    def fits(self, processors: int, shared: int, height: int, size: int) -> bool:
        """Whether all programs of a direction run at once on its processors, each of so many bytes of shared memory."""
        enough = self.resident * (self.shared_bytes(height, size) + RESERVED) <= shared
        return enough and self.programs <= self.resident * processors

    def shared_bytes(self, height: int, size: int) -> int:
        """Of shared memory that a program takes at most, with values of so many bytes."""
        values = self.chunks * height * (self.k + self.k_2) * size * (1 if self.tiles == 1 else 3)
        if self.by_gate:
            rows = (self.k + self.k_2) * self.wide * size
            return values + rows * (2 if self.ahead else 1) + self.each * height * self.wide * 4
        return values + max(self.chunks * self.k * self.wide * size, self.chunks * height * self.wide * 4)


@dataclass(frozen=True)
class BlockLayout:
    """A plan, and the weights as it takes them; the second parts are empty where ``k_2`` is 0."""

    plan: BlockPlan
    values: Tensor
    columns: Tensor
    values_2: Tensor
    columns_2: Tensor
    units: Tensor

    def to(self, device: torch.device) -> BlockLayout:
        """On a device."""
        parts = (self.values, self.columns, self.values_2, self.columns_2, self.units)
        return BlockLayout(self.plan, *(part.to(device) for part in parts))


def plan_blocks(
    matrices: Sequence[SparseMatrix],
    processors: int,
    size: int,
    streams: int,
    shared: int = 228 << 10,
    warpgroups: bool = True,
    ieee: bool = False,
) -> BlockPlan:
    """Sizes for matrices, one a direction, of 16x1 or 32x1 blocks whose values take ``size`` bytes.

    Args:
        matrices: on the CPU.
        processors: of the device.
        size: 2 or 4.
        streams: at a time.
        shared: bytes of memory that the programs of a processor share; those of an H100.
        warpgroups: whether the device has instructions of four warps together, as Hopper GPUs do. On others
            ``recur_gates`` runs out of registers: compiled for an A100, GRU 2560 32x1 spills 7,800 bytes a thread.
        ieee: whether products, if of fp32, are not on tensor cores.
    """
    matrix, directions = matrices[0], len(matrices)
    groups = matrix.groups // matrix.gates
    most = max(1, *(int(m.row_pointers.diff().max()) for m in matrices))
    at_once = processors // (directions * groups)  # slices, of a program a processor
    by_gate = _plan_gates(matrix, most, processors // directions, shared) if size == 2 and warpgroups else None
    chunks = CHUNKS if matrix.gates == 1 else CHUNKS // 4
    needed = -(-most // chunks)
    k, k_2 = _two_powers(needed, 16)
    narrow = 8 if streams <= 8 or size == 4 else 16
    # Slices and warps, the best first. Of 4 warps, two programs run on a multiprocessor.
    forms = [(narrow, 8 if at_once else 4)]
    if at_once and size == 2:
        forms = [*([(32, 16)] if streams > 16 * at_once else []), *forms, (16, 16)]
    for wide, warps in forms:
        registers = min(OPERAND_REGISTERS[warps], IEEE_REGISTERS if ieee and size == 4 else 255)
        plan = BlockPlan(groups, wide, CHUNKS, k, k_2, 1, warps)
        if CHUNKS * (k + k_2) * (matrix.height + wide) * size > registers * 128 * warps:
            continue
        if plan.fits(processors // directions, shared, matrix.height, size):
            return by_gate if by_gate and _crowded(streams, wide, at_once, matrix.gates) else plan
    if by_gate and streams > ONE_BY_ONE:
        return by_gate
    k = 32 if size == 4 else 64
    return BlockPlan(groups, narrow, CHUNKS, k, 0, -(-needed // k), 8 if at_once else 4)


def _crowded(streams: int, wide: int, at_once: int, gates: int) -> bool:
    """Whether slices of so many streams take longer than 64 at a time, one product a gate."""
    if not at_once:  # two programs a multiprocessor; slower for LSTMs: 2150 16x1 90 %, 64 streams, 12.2 against 10.7
        return gates < 4 and streams > 32
    return streams > (min(32, wide * at_once) if gates == 1 else wide * at_once)


def _plan_gates(matrix: SparseMatrix, most: int, processors: int, shared: int) -> BlockPlan | None:
    """For ``recur_gates``, if a gate's blocks are not too many.

    Where groups outnumber the processors, programs of one gate fit two a processor, and others take two groups each.
    """
    groups, gates = matrix.groups // matrix.gates, matrix.gates
    k, k_2 = _two_powers(most, 32)  # that each thread of 8 warps loads a whole vector
    each = 2 if groups > processors and gates > 1 else 1
    warps = 4 if groups > processors and gates == 1 else 8
    plan = BlockPlan(-(-groups // each), BY_GATE, gates * each, k, k_2, 1, warps, each)
    return plan if k + k_2 <= MOST_BY_GATE and plan.fits(processors, shared, matrix.height, 2) else None


def lay_out_blocks(matrices: Sequence[SparseMatrix], plan: BlockPlan, dtype: torch.dtype) -> BlockLayout:
    """Deal the blocks of each row group out to the chunks of its gate.

    Args:
        matrices: [G, H] of each direction, on the CPU.
        plan: of these matrices.
        dtype: of the layers' inputs, which values are rounded to.
    """
    matrix, directions = _joined(matrices), len(matrices)
    programs, groups = plan.programs * directions, matrices[0].groups // matrix.gates
    pointers = matrix.row_pointers.numpy().astype(np.int64)
    counts = np.diff(pointers)
    row = np.repeat(np.arange(len(counts)), counts)  # of each block
    within = np.arange(len(row)) - pointers[row]
    gate, group = row // (directions * groups), row % (directions * groups)
    program = group // groups * plan.programs + group % groups // plan.each
    if plan.by_gate:
        chunk, k = gate * plan.each + group % groups % plan.each, within
    elif matrix.gates == 1:
        chunk, k = within % plan.chunks, within // plan.chunks
    else:  # a warp's chunks are of one gate: chunk s is warp s % warps's
        share, each = plan.chunks // 4, max(1, plan.warps // 4)
        number, k = within % share, within // share
        chunk = number // each * plan.warps + gate * each + number % each
    tile, first = np.where(k < plan.tiles * plan.k, k // plan.k, 0), k < plan.tiles * plan.k
    place = (program * plan.tiles + tile) * plan.chunks + chunk
    place_2 = program * plan.chunks + chunk
    values, columns = matrix.values.to(dtype), matrix.columns.to(torch.int32).to(torch.int16)

    def filled(chosen: np.ndarray, where: np.ndarray, k: np.ndarray, chunks: int, size: int) -> tuple[Tensor, Tensor]:
        number, at = (torch.from_numpy(part[chosen]) for part in (where, k))
        blocks = torch.zeros(chunks, size, matrix.height, dtype=dtype)
        blocks[number, at] = values[torch.from_numpy(chosen)]
        column = torch.full((chunks, size), -1, dtype=torch.int16)
        column[number, at] = columns[torch.from_numpy(chosen)]
        return blocks if plan.by_gate else blocks.transpose(1, 2).contiguous(), column

    chunks = programs * plan.chunks
    main = filled(first, place, k % plan.k, chunks * plan.tiles, plan.k)
    rest = filled(~first, place_2, k - plan.k, chunks, plan.k_2)
    units = torch.arange(plan.programs * plan.each * matrix.height, dtype=torch.int32)
    units = units.view(plan.programs, plan.each, -1).transpose(1, 2).flatten().repeat(directions)
    return BlockLayout(plan, *main, *rest, units)


def _two_powers(n: int, least: int) -> tuple[int, int]:
    """Two powers of two of at least ``least``, or one and 0, of the smallest sum that holds n."""
    whole = max(least, _power(n))
    half, rest = whole // 2, max(least, _power(n - whole // 2))
    return (half, rest) if half >= least and half + rest < whole else (whole, 0)


def _sizes(matrix: SparseMatrix, counts: np.ndarray, owner: np.ndarray, programs: int) -> tuple[int, int, int]:
    """Blocks a chunk, chunks a tile, and warps, for the program with most to do.

    Measured with layers of 1024 to 2560 units at 90 and 95 %, batch 1, fp16. Single elements, on an H100: chunks of 8
    or 16, so that a thread or two add one up; 8 warps, and 16 for more than 8192 places (GRU 2560, 90 %: 2.25 us a
    step, with 8 warps 2.6). A row so long that adding up its chunks would take over wants longer ones. Taller blocks,
    on an H200: so many chunks that each thread holds 8 values of one, 16 bytes, because it then adds up a chunk by
    itself (32x1, 90 %, GRU 2560: 2.1 us a step; with twice or half as many chunks 3.0).
    """

    def chunks(chunk: int) -> int:
        each = np.bincount(owner, (-(-counts // chunk)).sum(axis=0), minlength=programs)
        return max(1, int(each.max(initial=1)))

    values = chunks(1) * matrix.height
    most = MOST_VALUES // (2 if matrix.values.dtype == torch.float32 else 1)
    if matrix.height == 1:
        chunk = 8 if chunks(1) <= 8 << 10 else 16
        if counts.max(initial=0) > LONGEST * chunk:
            chunk = 64
        per_tile = min(_power(chunks(chunk)), max(1, most // chunk))
        places = per_tile * chunk
        return chunk, per_tile, 16 if places > 8 << 10 else 8 if places > 1 << 10 else 4
    warps = 8 if values > 12 << 10 else 4
    per_tile = 256 * warps // matrix.height
    chunk = 4
    while chunks(chunk) > per_tile and chunk * per_tile * matrix.height <= most:
        chunk *= 2
    return chunk, per_tile, warps


def _joined(matrices: Sequence[SparseMatrix]) -> SparseMatrix:
    """One matrix whose gates hold the row groups of all directions, one after the other."""
    if len(matrices) == 1:
        return matrices[0]
    parts = [matrix.gate(gate) for gate in range(matrices[0].gates) for matrix in matrices]
    rows = sum(part.groups * part.height for part in parts)
    return replace(stacked(parts), gates=matrices[0].gates, shape=(rows, parts[0].shape[1]))


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


def _order(owner: np.ndarray, directions: int) -> np.ndarray | None:
    """The units of each direction by program, [D, H]; None if they are so already.

    A program's units have to be neighbours in h: single ones, written one by one among other programs' to the same 32
    bytes, made a step of a GRU 1024 take 1.5 times as long on an H100.
    """
    if not (np.diff(owner) < 0).any():
        return None
    return owner.reshape(directions, -1).argsort(axis=1, kind="stable")


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
