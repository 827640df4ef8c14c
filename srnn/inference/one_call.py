"""A step of a whole network with nothing of ours in between: embedding, recurrent layers, decoder.

Taken for one stream where one backend runs all parts, or torch's own modules do. Else they run one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torchs

from srnn.inference.base import TORCH, SparseModule, no_grad
from srnn.kernels.contract import NetworkStep, State


class OneCall:
    """The step of a network, while its parts stay what they are.

    Args:
        before: the embedding; None where the input is no token.
        layers: the sparse recurrent layers.
        after: the decoder; None where the outputs are the layers'.
    """

    def __init__(self, before: Any, layers: Any, after: Any) -> None:
        self.before, self.layers, self.after = before, layers, after
        self.parts = parts = [part for part in (before, layers, after) if part is not None]
        self.key = _key(after)
        self.threads = torch.get_num_threads()
        self.sparse = [(part, part.decided) for part in parts if isinstance(part, SparseModule)]
        others = [part for part in parts if not isinstance(part, SparseModule)]
        self.dense = [(weight, weight.data_ptr()) for part in others for weight in part.parameters()]
        self.hooks = [torchs._global_forward_hooks, torchs._global_forward_pre_hooks]
        self.hooks += [hooks for part in parts for hooks in (part._forward_hooks, part._forward_pre_hooks)]
        self.run: NetworkStep | None = None
        self.tried = False
        for part, _ in self.sparse:
            part.follow()
        versions = [part.given_out.versions() for part, _ in self.sparse]
        self.versions = versions if any(versions) else []
        for part, _ in self.sparse:
            part._ready[self.key] = self  # gone when its weights have changed

    @staticmethod
    def of(before: Any, layers: Any, after: Any) -> OneCall:
        """That of these modules, made anew where one of them has changed."""
        found: OneCall | None = layers._ready.get(_key(after))
        return found if found is not None and found._holds(before, after) else OneCall(before, layers, after)

    def _holds(self, before: Any, after: Any) -> bool:
        if before is not self.before or after is not self.after or torch.get_num_threads() != self.threads:
            return False
        for part, decided in self.sparse:
            if part.decided is not decided or part._ready.get(self.key) is not self:
                return False
        if self.versions and [part.given_out.versions() for part, _ in self.sparse] != self.versions:
            return False
        return all(weight.data_ptr() == address for weight, address in self.dense)

    def __call__(self, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """Outputs and state, as torch shapes it; None where the parts have to run one after the other."""
        if self.tried and self.run is None:
            return None
        state: State = hx if type(hx) is tuple else (hx,)
        if self._is_watched() or not self._takes(input, state):
            return None
        if not self.tried:
            self.run, self.tried = self._made(), True
        done = None if self.run is None else self.run(input, state)
        return None if done is None else (done[0], done[1] if self.layers.cell == "lstm" else done[1][0])

    def _is_watched(self) -> bool:
        """Whether anything else wants to see what goes in or out of a part."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return True
        for hooks in self.hooks:
            if hooks:
                return True
        return any(part.watcher is not None or part.recorder is not None for part, _ in self.sparse)

    def _takes(self, input: Tensor, state: State) -> bool:
        if len(state) != (2 if self.layers.cell == "lstm" else 1) or not input.shape or input.shape[0] != 1:
            return False
        asked = torch.is_grad_enabled()
        if asked and any(weight.requires_grad for weight, _ in self.dense):
            return False
        for part in (input, *state):
            if type(part) is not Tensor or not part.is_cpu or (asked and part.requires_grad):
                return False
        return True

    def _made(self) -> NetworkStep | None:
        layers, after = self.layers, self.after
        if not self._is_a_chain():
            return None
        table = None if self.before is None else self._table()
        if self.before is not None and table is None:
            return None
        x = torch.empty(1, layers.input_size)
        y = torch.empty(1, layers.proj_size or layers.hidden_size)
        name = layers._decision(x, 1, 1)
        of_after = after._decision(y, 1, 1) if isinstance(after, SparseModule) else TORCH
        if name == TORCH and (after is None or of_after == TORCH):
            return _TorchsStep(table, layers, after)
        stack = None if after is not None and of_after != name else layers._stack(x, name)
        if stack is None:
            return None
        decoder = None if after is None else after.product(y, name)
        step: NetworkStep | None = layers.kernel_named(name).network_step(table, stack, decoder)
        return step

    def _is_a_chain(self) -> bool:
        """Whether the parts are the modules they are taken for, and fit each other."""
        before, layers, after = self.before, self.layers, self.after
        if layers.bidirectional or any("forward" in vars(part) for part in self.parts):
            return False
        if before is not None and (_kind(before) is not nn.Embedding or before.embedding_dim != layers.input_size):
            return False
        outputs = layers.proj_size or layers.hidden_size
        return after is None or (_kind(after) is nn.Linear and after.in_features == outputs)

    def _table(self) -> Tensor | None:
        """The tokens' vectors as plain memory, if the embedding is that and no more."""
        if isinstance(self.before, SparseModule):
            found: Tensor | None = self.before.table()
            return found
        weight: Tensor = self.before.weight
        plain = weight.dtype == torch.float32 and weight.is_contiguous() and weight.is_cpu
        return weight.detach() if plain and self.before.max_norm is None else None


def _key(after: Any) -> tuple[str, bool]:
    return "one call", after is not None


def _kind(part: nn.Module) -> type[nn.Module]:
    return part.construction()[0] if isinstance(part, SparseModule) else type(part)


class _TorchsStep:
    """The step by torch's own modules."""

    def __init__(self, table: Tensor | None, layers: Any, after: Any) -> None:
        self.table, self.time = table, 1 if layers.batch_first else 0
        self.layers, self.lstm = layers, layers.cell == "lstm"
        self.weight = None if after is None else after.weight.detach()
        # Not as an attribute, which a sparse module would take for read by someone who may write to it.
        self.bias = None if after is None else (after._buffers | after._parameters).get("bias")

    def __call__(self, x: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Whatever torch takes."""
        if torch.is_autocast_enabled("cpu"):
            return None
        with no_grad():
            if self.table is not None:
                x = torch.embedding(self.table, x)
            elif x.dtype != torch.float32:
                return None
            y, after = self.layers.by_torch(x.unsqueeze(self.time), state if self.lstm else state[0])
            y = y.squeeze(self.time)
            y = y if self.weight is None else nn.functional.linear(y, self.weight, self.bias)
        return y, after if self.lstm else (after,)
