"""What was measured on a card: which form of a kernel runs, and in what sizes.

The defaults of ``Tuning`` are for an NVIDIA H100 80GB HBM3, and so are the times beside them unless they name another
card; docs/results/gpu.md has the tables. Those of ``BOUNDS``, where a form loses to another on a card whose memory and
tensor cores are in another proportion, are measured by ``srnn doctor --tune``, and kept in the cache folder under the
name of the card. The others follow from what all cards since Volta have: registers, warps, bytes of a load.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from srnn.kernels.remembering import recall
from srnn.kernels.timing import hardware

_log = logging.getLogger("srnn.kernels")

# How often a thread looks for its input before it gives up. No matter of the card: how long it takes was not measured.
TRIES = 1 << 20


@dataclass(frozen=True)
class Tuning:
    """The numbers of a card. Times are in microseconds: of a step of a recurrence, or of a product.

    Attributes:
        most_units: of a layer; h of so many fits the shared memory that a gather goes through.
        dense_bytes: of a whole recurrent matrix in blocks, zeros and all, a multiprocessor: half of its registers.
        least_values: of a program of ``vectors``, so that small networks take few programs and more streams at once.
        most_values: of a tile of ``vectors``, which stays in registers; half as many of fp32.
        most_tiles: up to which a program takes more values for the sake of more streams at once.
        longest_row: chunks of 8 or 16 elements that a row may have.
        most_of_eight: elements of a program up to which a chunk has 8 of them, else 16.
        places_of_8_warps: of single elements, above which a program has 8 warps instead of 4.
        places_of_16_warps: above which it has 16.
        values_of_8_warps: of taller blocks, above which a program has 8 warps instead of 4.
        slice_chunks: of a program of ``slices``.
        operand_registers: of a thread of ``slices``, for values and rows of h, by warps of its program.
        ieee_registers: the same at most, of fp32 that is not multiplied on tensor cores.
        gate_streams: of a slice of ``gates``.
        most_gate_blocks: that ``gates`` takes of a gate.
        most_ahead: blocks up to which ``gates`` asks for the rows of the next gate early.
        most_beside: streams up to which slices that take turns, or a single gate's, are faster than ``gates``.
        one_by_one: streams up to which one after the other is faster than ``gates`` where blocks do not fit registers.
        output_units: of a program that transposes outputs.
        few_rows: up to which the matrix-vector form of a product is used, for blocks under 16 rows.
        few_rows_of_blocks: the same for taller ones.
        dense_from: a block's height over the density under which sparse products of many rows are of 16 bits.
        tiles_of_16_bits: rows up to so many -> blocks of a tile, for products of many rows.
        tiles_of_fp32: the same for fp32.
    """

    most_units: int = 1 << 13
    dense_bytes: int = 128 << 10

    # vectors. 90 % of single elements: GRU 512 takes 1.2 with one stream, with 512 values 1.8, with 8192 1.6; GRU 256
    # with 16 streams 1.1, 1.1 and 1.3.
    least_values: int = 2048
    # 64 a thread. Half as many of fp32; twice as many of blocks, which have one index each.
    most_values: int = 1 << 14
    most_tiles: int = 4
    # Layers of 1024 to 2560 units at 90 and 95 %, batch 1, fp16. Single elements: chunks of 8 or 16, so that a thread
    # or two add one up; 8 warps, and 16 for more than 8192 places (GRU 2560, 90 %: 2.25, with 8 warps 2.6). A row so
    # long that adding up its chunks would take over wants longer ones.
    longest_row: int = 64
    most_of_eight: int = 8 << 10
    places_of_8_warps: int = 1 << 10
    places_of_16_warps: int = 8 << 10
    # Taller blocks, measured on an H200: so many chunks that each thread holds 8 values of one, 16 bytes, because it
    # then adds up a chunk by itself (32x1, 90 %, GRU 2560: 2.1; with twice or half as many chunks 3.0).
    values_of_8_warps: int = 12 << 10

    # slices. Two chunks a warp of eight.
    slice_chunks: int = 16
    # What is left of a thread's registers is for sums and addresses. GRU 3568 32x1 90 %, 64 streams, takes 16.2 with
    # 192 in 8 warps, and in 16 warps 20.0; GRU 2560 80 %, 16 streams, 4.4 with 108 in 16 warps and by gates 8.6, with
    # up to 640 blocks a gate instead of 576, which need 120, 4.8 and 10.2; GRU 1024 16x1 without zeros, which would
    # need 128 in 16, takes 52 because they don't fit. GRU 2560 16x1 90 % needs the 160 of 4 warps: 5.4 with 16 streams,
    # and one at a time 40. GRU 2560 32x1 90 % of fp32 needs 200 in 8: 11.7 with 16 streams, and 18 from the cache; but
    # as ieee, not on tensor cores, 153, and 31 from the cache.
    operand_registers: Mapping[int, int] = field(default_factory=lambda: {4: 160, 8: 200, 16: 120})
    ieee_registers: int = 192

    # gates. 64 is the least that a warpgroup's product takes, and 640 blocks make a product of 512 rows and one of 128.
    # 512 rows of 64 streams are 64 registers a thread. 32x1 90 %, 64 streams: GRU 2560 takes 5.4 so, in slices of 32
    # 7.3, of 16 10.4; RNN 3072 3.0, 4.7 and 5.4; GRU 3568 7.1, in slices of 16 16.2. Slices that all run at the same
    # time are faster, unless there is one gate: GRU 1760 4.0 against 4.5, LSTM 1500 3.9 against 5.3, but RNN 1760 2.9
    # against 2.4. In two goes they are not: GRU 1760, 128 streams, 6.5 against 4.8; GRU 3568, 32 streams, 8.2 against
    # 7.0; GRU 2560 80 %, 24, 14.0 against 10.0.
    gate_streams: int = 64
    most_gate_blocks: int = 640
    # GRU 2560 takes 5.8 without; with more blocks, and with four gates, registers run out: GRU 3568 takes 9.5 with it,
    # LSTM 2150 6.3, without 5.9.
    most_ahead: int = 320
    # With two programs a multiprocessor an LSTM stays with slices: 2150 16x1 90 %, 64 streams, 12.2 by gates, 10.7 so.
    most_beside: int = 32
    # GRU 3568 16x1 90 % takes 3.2 for each stream, and 17.5 for up to 64.
    one_by_one: int = 5
    output_units: int = 64  # not measured against others

    # products. 7680x2560, 90 %: elements take 9.7 for 4 rows and 14 for 8, cuBLAS 9.7 and 8.8; 32x1 blocks 5.1 for 2
    # rows and 6.8 for 4, as dot products 6.2 for both.
    few_rows: int = 4
    few_rows_of_blocks: int = 2
    # 7680x2560 by 4096 rows: cuBLAS takes 197; 32x1 blocks 103 at 90 %, 16x1 blocks 173.
    dense_from: int = 150
    # 4096 rows of 16 bits by 256 and 16 take 89, by 256 and 32 108, by 128 and 64 168; of fp32 by 128 and 32 as tf32
    # 285, by 64 and 32 430.
    tiles_of_16_bits: Mapping[int, int] = field(default_factory=lambda: {32: 64, 64: 32, 256: 16})
    tiles_of_fp32: Mapping[int, int] = field(default_factory=lambda: {128: 32})


# What ``srnn doctor --tune`` measures, and the least and the most that is believed.
BOUNDS: dict[str, tuple[int, int]] = {"few_rows": (0, 8), "few_rows_of_blocks": (1, 8), "dense_from": (32, 3200)}
KEPT = "tuning"  # its name in the cache, under the hardware


def tuning_of(device: torch.device) -> Tuning:
    """The numbers of a device: those that were measured on its kind and kept, else an H100's."""
    return tuned(_kept(device) or {})


def is_measured(device: torch.device) -> bool:
    """Whether ``srnn doctor --tune`` has measured on a device of its kind."""
    return _kept(device) is not None


def _kept(device: torch.device) -> dict[str, Any] | None:
    return recall(hardware(device), KEPT) if device.type == "cuda" else None


def tuned(measured: Mapping[str, Any]) -> Tuning:
    """An H100's numbers but for those measured. What no measurement gives, as in a damaged file, is passed over."""
    sound = {name: value for name, value in measured.items() if _is_sound(name, value)}
    if odd := measured.keys() - sound.keys():
        names = ", ".join(sorted(map(str, odd)))
        _log.warning("%s in kernels.json is passed over: run srnn doctor --tune again", names)
    return replace(Tuning(), **sound)


def _is_sound(name: str, value: Any) -> bool:
    least, most = BOUNDS.get(name, (1, 0))
    return type(value) is int and least <= value <= most
