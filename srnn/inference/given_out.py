"""Biases and packed weights that others hold, and may write to: what was made of them is then made anew.

Calls run on copies, laid out as is fastest, and to ask at each call whether a tensor was written to would take a small
network longer than its step. But who writes to a tensor has got it from its module, so it is asked after that only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CALLS = ("usual", ("one call", False), ("one call", True))  # what is made ready for calls that ask least


class GivenOut:
    """What a sparse module gave out, and how it was then.

    What is written through ``.data``, or into memory shared with others, is found out after it was asked for only.

    Args:
        module: whose tensors these are.

    Attributes:
        seen: each tensor with its version, and a copy if it is a bias; nothing while no one else has them.
        for_good: the tensors, once one of them was read by its name: who has it may write to it at any time.
        biases: whether its biases were given out, and not its packed weights alone, by a module that shares one.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.seen: list[tuple[Tensor, int, Tensor | None]] = []
        self.for_good: list[Tensor] = []
        self.biases = False

    def begin(self, for_good: bool, biases: bool) -> None:
        """From here on something may be written."""
        self.biases |= biases
        for key in CALLS:
            self.module._ready.pop(key, None)
        if for_good:
            self.for_good = self.module.tensors()
        if not self.seen and (for_good or self.module._ready):  # else nothing has been made of them
            self.seen = self._look()

    def written(self) -> bool:
        """Whether something was written since."""
        now, before = self._look(), self.seen
        self.for_good = self.module.tensors() if self.for_good else []  # it may have moved
        self.seen = now if self.for_good else []
        return len(now) != len(before) or not all(_same(*pair) for pair in zip(now, before, strict=True))

    def versions(self) -> list[int]:
        """Of the tensors that may be written to at any time; empty if none may be."""
        return [version(tensor) for tensor in self.for_good]

    def _look(self) -> list[tuple[Tensor, int, Tensor | None]]:
        biases = {id(buffer) for buffer in self.module._buffers.values()} if self.biases else set()
        return [(t, version(t), t.detach().clone() if id(t) in biases else None) for t in self.module.tensors()]


def version(tensor: Tensor) -> int:
    """How often it was written to; -1 of one of inference mode, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _same(now: tuple[Tensor, int, Tensor | None], before: tuple[Tensor, int, Tensor | None]) -> bool:
    # A tensor that torch.export lets stand for others has no numbers, and a type of its own.
    numbers = type(now[2]) is type(before[2]) is Tensor
    if now[0] is not before[0] or now[1] != before[1] or not numbers or now[2] is None or before[2] is None:
        return now[0] is before[0] and now[1] == before[1]
    return torch.equal(now[2].view(torch.int32), before[2].view(torch.int32))  # bits: NaN is equal to itself
