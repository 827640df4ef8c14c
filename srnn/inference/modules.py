"""The sparse counterparts of torch's modules, for inference; ``sparsify`` puts them into a network.

They hold packed weights, are called as the originals are, and are one operator each in a compiled graph.

Shapes: N rows, I inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.autocast import is_autocast, without_autocast
from srnn.inference.base import TORCH, SparseModule, Weights, no_grad, refuse_tracing, without_gradient
from srnn.inference.operator import rebuilders
from srnn.inference.sparse_cell import SparseCell
from srnn.inference.sparse_recurrent import SparseRecurrent
from srnn.inference.sparse_recurring import SparseRecurring
from srnn.inference.usual_calls import UsualRows
from srnn.kernels.contract import Kernel, Product
from srnn.meta_device import without_memory
from srnn.models.recurring import Recurring
from srnn.registry import register
from srnn.sparse import SparseMatrix

# Entries of an embedding up to which it is unpacked for lookups: 1 MB. A token takes 16 us then, else 52.
SMALL_TABLE = 1 << 18


class SparseLinear(SparseModule):
    """``nn.Linear`` on sparse kernels."""

    def __init__(self, original: nn.Linear, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.describe()

    def forward(self, input: Tensor) -> Tensor:
        """``input W' + bias``, over the last dimension."""
        usual = None if torch.compiler.is_compiling() else self._ready.get("usual")
        done: Tensor | None = None if usual is None else usual(input)
        if done is not None:
            return done
        refuse_tracing()
        if is_autocast(input):
            return without_autocast(self.forward, input)
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"input must have {self.in_features} features, not {input.shape[-1]}")
        return self._outputs([input])[0]

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The same as ``forward``."""
        self.follow()
        (input,) = inputs
        name = self._decision(input, 1, input.shape[:-1].numel())
        by_torch = name == TORCH and self.recorder is None and input.dtype == torch.float32
        with no_grad():
            if by_torch:
                y = nn.functional.linear(input, self._dense("weight"), self._buffers["bias"])
            else:
                y = self._by_kernel(input, name)
        return (without_gradient(y, input),)

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """One output."""
        return [inputs[0].new_empty(*inputs[0].shape[:-1], self.out_features)]

    def weights_to_run(self) -> SparseMatrix:
        """Its matrix."""
        return self._matrix("weight")

    def _by_kernel(self, input: Tensor, name: str | None) -> Tensor:
        x_NI = input if input.dim() == 2 else input.reshape(-1, self.in_features)
        if self.recorder is not None:
            self.recorder("weight", x_NI)
        product = self.product(x_NI, name)
        if input.is_cpu and self.recorder is None and not torch.compiler.is_compiling():
            UsualRows.keep(self, x_NI.shape[0], product)
        y = product(x_NI)
        return y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)

    def product(self, x_NI: Tensor, name: str | None) -> Product:
        """The product with such rows, by a candidate of the kernel, or the kernel itself for None."""
        key = (name, x_NI.device, x_NI.dtype)
        ready: Product | None = self._ready.get(key)
        if ready is None:
            matrix = self._matrix("weight")
            self._check(matrix, x_NI, x_NI.shape[0])
            ready = self.kernel_named(name).product(matrix, self._buffers["bias"], *key[1:])
            self._ready[key] = ready
        return ready

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """``nn.Linear``."""
        bias = self._buffers["bias"] is not None
        return nn.Linear, {"in_features": self.in_features, "out_features": self.out_features, "bias": bias}


class SparseEmbedding(SparseModule):
    """``nn.Embedding`` that keeps its non-zeros only; a small one, or one on a GPU, unpacks them at its first call."""

    def __init__(self, original: nn.Embedding, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx
        self.describe()

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers."""
        refuse_tracing()
        return self._outputs([input])[0]

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The same as ``forward``."""
        self.follow()
        (input,) = inputs
        table = self.table(any_size=input.is_cuda)  # rows of a size not known ahead cannot be recorded in a graph
        if table is not None:
            return (nn.functional.embedding(input, table),)
        if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < self.num_embeddings:
            raise IndexError(f"numbers must lie between 0 and {self.num_embeddings - 1}")
        rows = self._matrix("weight").rows(input.reshape(-1))
        return (rows.view(*input.shape, self.embedding_dim),)

    def table(self, any_size: bool = False) -> Tensor | None:
        """All rows, dense, where these are few, or however many there are."""
        if not any_size and self.num_embeddings * self.embedding_dim > SMALL_TABLE:
            return None
        if "table" not in self._ready:
            self._ready["table"] = self._matrix("weight").to_dense()
        table: Tensor = self._ready["table"]
        return table

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """One output."""
        return [inputs[0].new_empty(*inputs[0].shape, self.embedding_dim, dtype=torch.float32)]

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """``nn.Embedding``."""
        sizes = {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim}
        return nn.Embedding, sizes | {"padding_idx": self.padding_idx}


# A module -> what stands for it; not for what derives from these.
SPARSE_KINDS: dict[type[nn.Module], Any] = {
    nn.RNN: SparseRecurrent,
    nn.GRU: SparseRecurrent,
    nn.LSTM: SparseRecurrent,
    nn.RNNCell: SparseCell,
    nn.GRUCell: SparseCell,
    nn.LSTMCell: SparseCell,
    nn.Linear: SparseLinear,
    nn.Embedding: SparseEmbedding,
    Recurring: SparseRecurring,
}


def replaceable(module: nn.Module) -> bool:
    """Whether a module has a sparse counterpart. Embeddings that change their weights when called have none."""
    return type(module) in SPARSE_KINDS and getattr(module, "max_norm", None) is None


def sparse_module(module: nn.Module, weights: Weights, kernel: Kernel) -> SparseModule:
    """The sparse counterpart of one of torch's modules."""
    made: SparseModule = SPARSE_KINDS[type(module)](module, weights, kernel)
    return made


def _rebuilt(about: dict[str, Any], tensors: list[Tensor]) -> SparseModule:
    """The module that ``SparseModule.describe`` described, of these tensors."""
    if about["kernel"] is None:
        raise UserError("this program runs on a kernel that was not registered where it was made: make it again.")
    waiting = iter(tensors)
    weights: dict[str, SparseMatrix | Tensor | None] = {
        name: next(waiting).clone() if is_there else None for name, is_there in about["biases"].items()
    }
    for name, (shape, gates, scaled) in about["matrices"].items():
        values, columns, pointers = next(waiting), next(waiting), next(waiting)
        scales = next(waiting) if scaled else None
        weights[name] = SparseMatrix((shape[0], shape[1]), gates, values, columns, pointers, scales)
    kinds = {kind.__name__: kind for kind in SPARSE_KINDS}
    with without_memory():
        original = kinds[about["kind"]](**about["options"])
    return sparse_module(original, weights, register.rebuild("kernel", about["kernel"]))


rebuilders.append(_rebuilt)
