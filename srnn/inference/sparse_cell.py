"""The sparse counterpart of ``nn.RNNCell``, ``nn.GRUCell`` and ``nn.LSTMCell``.

Shapes: B streams, I inputs, H hidden units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srnn.cells import CELL_TYPES, Cell
from srnn.inference.autocast import is_autocast, without_autocast
from srnn.inference.base import TORCH, SparseModule, Weights, no_grad, refuse_tracing, without_gradient
from srnn.kernels.contract import Kernel, Layer, LayerWeights, State


class SparseCell(SparseModule):
    """``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell`` on sparse kernels: the same call, states and default state."""

    def __init__(self, original: nn.RNNCellBase, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.kind: Any = type(original)
        able = [cell for cell, kind in CELL_TYPES.items() if kind.single is self.kind]
        self.cell: Cell = next(cell for cell in able if len(able) == 1 or cell == original.nonlinearity)
        self.input_size, self.hidden_size, self.bias = original.input_size, original.hidden_size, original.bias
        self.describe()

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """As torch's module: the next h, or (h, c) of an LSTM; of one stream without a dimension for it, too.

        Raises:
            ValueError: the input or the state has not one or two dimensions.
            RuntimeError: sizes do not fit; also backward through the outputs.
        """
        refuse_tracing()
        if is_autocast(input):
            return without_autocast(self.forward, input, hx)
        name = self.kind.__name__
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, not {input.shape[-1]}")
        x_BI = input if input.dim() == 2 else input[None]
        state = self._outputs([x_BI, *self._state(hx, x_BI, input.dim())])
        parts = tuple(state if input.dim() == 2 else (part[0] for part in state))
        return parts if self.cell == "lstm" else parts[0]

    def _state(self, hx: Any, x_BI: Tensor, dimensions: int) -> State:
        shape = (x_BI.shape[0], self.hidden_size)
        if hx is None:
            return tuple(torch.zeros(shape, device=x_BI.device, dtype=x_BI.dtype) for _ in range(self._parts))
        given = tuple(hx) if self.cell == "lstm" else (hx,)
        if any(part.dim() not in (1, 2) for part in given):
            raise ValueError(
                f"{self.kind.__name__}: Expected hx to be 1D or 2D, got {[p.dim() for p in given]} instead"
            )
        state = tuple(part if dimensions == 2 or part.dim() == 2 else part[None] for part in given)
        shapes = [tuple(part.shape) for part in state]
        if shapes != [shape] * self._parts:
            raise RuntimeError(f"the state must have shape {[shape] * self._parts}, not {shapes}")
        if x_BI.is_cpu:  # whatever backend was chosen: not all of them take a state of another type
            state = tuple(part.to(x_BI.dtype) for part in state)
        return state

    @property
    def _parts(self) -> int:
        return 2 if self.cell == "lstm" else 1

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The next state of x_BI and the state."""
        self.follow()
        x_BI, *state = inputs
        if not x_BI.shape[0]:
            return tuple(part.clone() for part in state)
        with no_grad():
            if self.recorder is not None:
                self.recorder("weight_ih", x_BI)
                self.recorder("weight_hh", state[0])
            after = self._layer(x_BI).step(x_BI, tuple(state))[1]
        return tuple(without_gradient(part, x_BI, *state) for part in after)

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """The state's."""
        return [torch.empty_like(part) for part in inputs[1:]]

    def weights_to_run(self) -> LayerWeights:
        """As those of a layer."""
        biases = (self._buffers["bias_ih"], self._buffers["bias_hh"])
        return LayerWeights(self.cell, self._matrix("weight_ih"), self._matrix("weight_hh"), *biases)

    def _layer(self, x_BI: Tensor) -> Layer:
        name = self._decision(x_BI, x_BI.shape[0], 1)
        key = (name, x_BI.device, x_BI.dtype)
        ready: Layer | None = self._ready.get(key)
        if ready is None:
            weights = self.weights_to_run()
            self._check(weights, x_BI, x_BI.shape[0])
            # A layer of one step costs 30 us more than torch's own cell.
            if name == TORCH and x_BI.dtype == torch.float32:
                ready = _TorchCell(self.original().requires_grad_(False))
            else:
                ready = self.kernel_named(name).layer(weights, x_BI.device, x_BI.dtype)
            self._ready[key] = ready
        return ready

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """``nn.RNNCell``, ``nn.GRUCell`` or ``nn.LSTMCell``."""
        options: dict[str, Any] = {name: getattr(self, name) for name in ("input_size", "hidden_size", "bias")}
        return self.kind, options | ({"nonlinearity": self.cell} if self.kind is nn.RNNCell else {})

    def extra_repr(self) -> str:
        """The cell, and what was chosen for it."""
        return "\n".join(filter(None, (f"{self.cell}, {self.input_size}, {self.hidden_size}", super().extra_repr())))


class _TorchCell(Layer):
    """Torch's own cell as a layer that is asked for single steps only."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """One step."""
        after = self.module(x_NI, state if len(state) == 2 else state[0])
        parts = after if isinstance(after, tuple) else (after,)
        return parts[0], parts
