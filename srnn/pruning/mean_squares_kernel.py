"""Taking gradients into means of their squares on a GPU: torch's operations read and write them two to three times."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srnn.pruning.launches import on_device

MEAN_BLOCK = 2048  # weights of a program
_WARPS = 4


@triton.jit
def with_step(mean, gradient, decay):
    """``decay * mean + (1 - decay) * gradient^2``, of which the compiler may not choose how to round it."""
    return tl.fma(gradient * gradient, 1.0 - decay, mean * decay)


@triton.jit
def take_in(
    tables,  # [M, 3], int64: of each mean its size, its address, and that of the gradient
    owners,  # [programs], the mean of each
    firsts,  # [M], the first program of each
    taken,  # []: whether the step counts
    decay,
    BLOCK: tl.constexpr,
):
    """Take in one."""
    if tl.load(taken) != 0:
        program = tl.program_id(0)
        owner = tl.load(owners + program)
        table = tables + owner * 3
        place = (program - tl.load(firsts + owner)).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < tl.load(table)
        mean = tl.load(table + 1).to(tl.pointer_type(tl.float32)) + place
        gradient = tl.load(tl.load(table + 2).to(tl.pointer_type(tl.float32)) + place, mask=inside, other=0.0)
        before = tl.load(mean, mask=inside, other=0.0)
        tl.store(mean, with_step(before, gradient, decay), mask=inside)


def launch_means(tables: Tensor, owners: Tensor, firsts: Tensor, taken: Tensor, decay: float) -> None:
    """Launch it."""
    with on_device(tables.device):
        take_in[(len(owners),)](tables, owners, firsts, taken.view(torch.uint8), decay, MEAN_BLOCK, num_warps=_WARPS)
