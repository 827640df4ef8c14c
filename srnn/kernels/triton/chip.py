"""What the kernels run on: a GPU, or Triton's interpreter on a CPU."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from srnn.kernels.triton.tuning import Tuning, tuning_of


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def current(device: torch.device) -> AbstractContextManager[None]:
    """Make a device the current one, on which Triton launches wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@dataclass(frozen=True)
class Chip:
    """What plans depend on.

    Attributes:
        processors: multiprocessors of the device.
        shared_memory: bytes that the programs of a multiprocessor share.
        warpgroups: whether it has instructions of four warps together, as Hopper GPUs do.
        tf32: whether it multiplies in tf32, as GPUs since Ampere do.
        tuning: what was measured on it.
    """

    processors: int
    shared_memory: int
    warpgroups: bool
    tf32: bool
    tuning: Tuning


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The device's own; the interpreter is an H100 of three multiprocessors, so that tests see more than one go."""
    if interpreted():
        return Chip(3, 228 << 10, True, True, tuning_of(device))
    found = torch.cuda.get_device_properties(device)
    # wgmma is Hopper's alone: later GPUs multiply with other instructions.
    return Chip(
        found.multi_processor_count,
        found.shared_memory_per_multiprocessor,
        found.major == 9,
        (found.major, found.minor) >= (8, 0),
        tuning_of(device),
    )
