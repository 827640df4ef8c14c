"""The calls that a network of one stream makes again and again on a CPU, with few questions asked.

A small network's step takes half a microsecond, and finding out what to run took twenty. So what was found is kept,
with what it depends on: the first call of a kind goes the long way, the next ones come here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, is_autocast_enabled

from srnn.inference.base import SparseModule
from srnn.kernels.choosing import length_class
from srnn.kernels.contract import Layer, Product, State


class UsualCalls:
    """What runs sequences of one stream, or rows, of each class of lengths, while decisions stay what they are.

    Args:
        part: the module that is called.
    """

    def __init__(self, part: SparseModule) -> None:
        self.part, self.decided, self.threads = part, part.decided, torch.get_num_threads()
        self.found: dict[int, Any] = {}
        self.versions = part.given_out.versions()

    @classmethod
    def keep(cls, part: SparseModule, steps: int, found: Layer | Product) -> None:
        """What ran so many steps, for the next calls."""
        kept: UsualCalls | None = part._ready.get("usual")
        if kept is None or kept.decided is not part.decided or kept.threads != torch.get_num_threads():
            kept = part._ready["usual"] = cls(part)  # gone when its weights have changed
        kept.found[length_class(steps)] = found

    def _takes(self, input: Tensor) -> bool:
        """Whether a call is as it always is, and nothing wants to see what goes in or out."""
        part = self.part
        return (
            type(input) is Tensor
            and input.dtype is torch.float32
            and input.is_cpu
            and part.decided is self.decided
            and part.recorder is None
            and part.watcher is None
            and torch.get_num_threads() == self.threads
            and (not self.versions or part.given_out.versions() == self.versions)
            and not is_autocast_enabled("cpu")
            and not (input.requires_grad and torch.is_grad_enabled())
            and not torch.jit.is_tracing()
        )


class UsualSequences(UsualCalls):
    """Those of recurrent layers of one direction."""

    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.time, self.inputs, self.units = int(layers.batch_first), layers.input_size, layers.hidden_size
        self.lstm, self.shape = layers.cell == "lstm", (len(layers.suffixes), 1, layers.hidden_size)
        self.zeros: State = (torch.zeros(self.shape, dtype=torch.float32, device="cpu"),) * (2 if self.lstm else 1)

    def __call__(self, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """As ``SparseRecurrent.forward``; None of what is not usual."""
        if not self._takes(input):
            return None
        shape = input.shape
        if len(shape) != 3 or shape[1 - self.time] != 1 or shape[2] != self.inputs:
            return None
        steps = shape[self.time]
        stack: Layer | None = self.found.get(length_class(steps)) if steps else None
        state = self.zeros if hx is None else hx if self.lstm else (hx,)
        if stack is None or not self._takes_state(state):
            return None
        y, after = stack.run_one(input, steps, state)
        return y, after if self.lstm else after[0]

    def _takes_state(self, state: Any) -> bool:
        if type(state) is not tuple or len(state) != len(self.zeros):
            return False
        asked = torch.is_grad_enabled()
        for part in state:
            if type(part) is not Tensor or part.shape != self.shape or not part.is_cpu:
                return False
            if part.dtype is not torch.float32 or (asked and part.requires_grad):
                return False
        return True


class UsualRows(UsualCalls):
    """Those of a linear layer."""

    def __init__(self, linear: Any) -> None:
        super().__init__(linear)
        self.inputs, self.outputs = linear.in_features, linear.out_features

    def __call__(self, input: Tensor) -> Tensor | None:
        """As ``SparseLinear.forward``; None of what is not usual."""
        if not self._takes(input):
            return None
        shape = input.shape
        if len(shape) != 3 or shape[2] != self.inputs:
            return None
        rows = shape[0] * shape[1]
        product: Any = self.found.get(length_class(rows)) if rows else None
        if product is None:
            return None
        if hasattr(product, "shaped"):
            y: Tensor = product.shaped(input, rows, (shape[0], shape[1], self.outputs))
        else:
            y = product(input.reshape(rows, self.inputs)).view(shape[0], shape[1], self.outputs)
        return y
