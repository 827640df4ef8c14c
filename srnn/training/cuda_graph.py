"""A network's training step replayed from a CUDA graph: small networks wait for kernel launches otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from srnn.cuda_graphs import undisturbed


class Graphed:
    """Calls a network, forward and backward from a CUDA graph; inputs of another shape than the example's run eagerly.

    The graph is recorded at the first call, when no step's gradients are alive: recording must not meet them.
    Parameters keep their memory, so optimisers and pruning in place go on as ever. Gradients are valid until the next
    call, so they cannot be added up over calls.

    Args:
        model: ``outputs, state = model(inputs, state)`` with a tensor or a pair of tensors as state.
        example: inputs of the shape that most batches have.
    """

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        self.model = model
        self.example = example
        # Graphs are recorded on a stream of their own, which torch warns of at every step.
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        self._graph: Any = None
        self._zero: Any = None

    def __call__(self, inputs: Tensor, state: Any = None) -> Any:
        """As the network; a state of None starts from zero."""
        if self._graph is None:
            example = self.example.to(inputs.device)
            # Without the cache: casts of weights have to happen in the graph, and one that was kept from before belongs
            # to another stream, which the recorded backward pass would wait for.
            with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False):
                self._zero = self._zero_state(example)
                samples = (example, _map(torch.clone, self._zero))  # which states are copied into
                pool = torch.cuda.graph_pool_handle()
                with undisturbed(inputs.device, pool), _own_dropout(self.model, inputs.device, pool):
                    self._graph = torch.cuda.make_graphed_callables(_Call(self.model), samples, pool=pool)
        if inputs.shape != self.example.shape:
            return self.model(inputs, state)
        return self._graph(inputs, self._zero if state is None else state)

    @torch.no_grad()
    def _zero_state(self, inputs: Tensor) -> Any:
        training = self.model.training
        try:  # a norm keeps statistics of what it sees in training
            return _map(torch.zeros_like, self.model.eval()(inputs[:, :1])[1])
        finally:
            self.model.train(training)


@contextmanager
def _own_dropout(model: nn.Module, device: torch.device, pool: Any) -> Iterator[None]:
    """Around a recording of the network: what its dropout reads is memory of the recording, and stays as long.

    Layers of cuDNN draw their dropout from states that torch keeps for all networks of a device. At the first call
    after a seed was set, for another network, say, torch makes new ones and lets go of the memory of those before.

    Args:
        model: the network.
        device: of it, with an index.
        pool: the memory of the recording.
    """
    if not any(isinstance(module, nn.RNNBase) and module.dropout > 0 for module in model.modules()):
        yield
        return
    torch.cuda.set_rng_state(torch.cuda.get_rng_state(device), device)  # the same numbers, which torch takes for a seed
    layers = nn.LSTM(1, 1, 2, dropout=0.5, device="meta").to_empty(device=device)  # weights of it take no numbers
    torch._C._cuda_beginAllocateCurrentThreadToPool(device.index, pool)
    try:
        try:
            with torch.no_grad():
                layers(torch.zeros(1, 1, 1, device=device))
        finally:
            torch._C._cuda_endAllocateToPool(device.index, pool)
        yield
    finally:
        torch._C._cuda_releasePool(device.index, pool)  # which the graphs hold now


class _Call(nn.Module):
    """The network as a module of its own: graphing replaces a module's ``forward``, and the network's must stay."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, state: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            # So that cuBLAS makes its workspaces in the graph's memory. One that was there before, as torch's streams
            # take turns, would be let go whenever somebody clears them: Lightning does when another Trainer starts.
            torch._C._cuda_clearCublasWorkspaces()
        return self.model(inputs, state)


def _map(function: Any, state: Any) -> Any:
    return tuple(_map(function, each) for each in state) if isinstance(state, tuple) else function(state)
