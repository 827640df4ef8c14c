"""Zeroing what is pruned on a GPU: weights, and all that goes with them."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

Masked = tuple[Tensor, Sequence[Tensor]]  # a mask, and tensors of its shape
_SIZES = (2, 4, 8)  # bytes of an element


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def zero_on_gpu(mask: Tensor, tensor: Tensor) -> None:
    """Zero a tensor of a GPU where its mask is zero: one launch, where ``masked_fill_`` takes two and more memory."""
    if _has_triton() and _lies_alike(mask, tensor) and mask.numel():
        from srnn.pruning.masking_kernel import launch_one  # here, because Triton may be missing

        launch_one(mask, tensor)
    else:
        tensor.masked_fill_(~mask, 0)


class GpuMasking:
    """Zeroes tensors where their masks are zero, whatever was there: one launch for all of them.

    Where an address changes, as an optimiser's state may, the kernel's table of addresses is made anew. Without Triton,
    and where elements do not lie as those of their mask, torch's operations do it, two launches a tensor.
    """

    def __init__(self) -> None:
        self._addresses: list[tuple[int, int]] = []
        self._launches: list[Callable[[], None]] = []

    def __call__(self, masked: Sequence[Masked]) -> None:
        """Zero them."""
        addresses = [(part.data_ptr(), part.itemsize) for mask, tensors in masked for part in (mask, *tensors)]
        if addresses != self._addresses:
            self._launches = [] if not _has_triton() else list(_launches(masked))
            self._addresses = addresses
        for launch in self._launches:
            launch()
        for mask, tensors in masked:
            for tensor in tensors:
                if not (_has_triton() and _lies_alike(mask, tensor)):
                    tensor.masked_fill_(~mask, 0)


def _lies_alike(mask: Tensor, tensor: Tensor) -> bool:
    return mask.is_contiguous() and tensor.is_contiguous() and tensor.itemsize in _SIZES


def _launches(masked: Sequence[Masked]) -> Iterator[Callable[[], None]]:
    """One for each device and size of elements."""
    from srnn.pruning.masking_kernel import BLOCK, launch  # here, because Triton may be missing

    for device in {mask.device for mask, _ in masked}:
        for size in _SIZES:
            alike = [(m, [t for t in ts if t.itemsize == size and _lies_alike(m, t)]) for m, ts in masked]
            rows = [(mask, tensors) for mask, tensors in alike if tensors and mask.numel() and mask.device == device]
            if not rows:
                continue
            most = max(len(tensors) for _, tensors in rows)
            table = [[m.data_ptr(), m.numel(), *(t.data_ptr() for t in ts), *[0] * (most - len(ts))] for m, ts in rows]
            programs = torch.tensor([-(-mask.numel() // BLOCK) for mask, _ in rows])
            owners = torch.arange(len(rows)).repeat_interleave(programs)
            tables = [torch.tensor(table), owners.int(), (programs.cumsum(0) - programs).int()]
            yield partial(launch, size, most, *(one.to(device) for one in tables))
