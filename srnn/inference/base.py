"""What the sparse modules share: packed weights as buffers, one operator in a compiled graph, no gradients.

Shapes: N rows, I inputs.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.kernels.contract import Kernel, LayerWeights
from srnn.sparse import SparseMatrix

# By torch's name: a packed matrix, a bias, or None for a bias that is not there.
Weights = Mapping[str, SparseMatrix | Tensor | None]
# Called with the name of a matrix and the rows it multiplies; see ``sparsify.record_inputs``.
InputRecorder = Callable[[str, Tensor], None]


class PackedWeight(nn.Module):
    """A sparse matrix as buffers, so that it is part of its module's ``state_dict``."""

    def __init__(self, matrix: SparseMatrix) -> None:
        super().__init__()
        self.shape, self.gates = matrix.shape, matrix.gates
        for name in ("values", "columns", "row_pointers", "scales"):
            self.register_buffer(name, matrix.parts.get(name))

    @property
    def matrix(self) -> SparseMatrix:
        """The matrix; shares memory."""
        b = self._buffers
        values, columns, pointers = b["values"], b["columns"], b["row_pointers"]
        assert values is not None
        assert columns is not None
        assert pointers is not None
        return SparseMatrix(self.shape, self.gates, values, columns, pointers, b["scales"])

    def extra_repr(self) -> str:
        """Shape, format, density."""
        matrix, (rows, columns) = self.matrix, self.shape
        density = matrix.entries / max(1, rows * columns)
        return f"{rows}x{columns}, {matrix.structure}, {matrix.values_name}, density={density:.3f}"


# Modules by number, which an operator of a compiled graph knows them by.
_modules: weakref.WeakValueDictionary[int, SparseModule] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("srnn::sparse_module", mutates_args=())
def _call(inputs: list[Tensor], number: int) -> list[Tensor]:
    """A sparse module as one operator, so that ``torch.compile`` keeps a network around it in one graph."""
    return [part.clone() for part in _modules[number].compute(inputs)]  # an operator's outputs share no memory


@_call.register_fake
def _shapes(inputs: list[Tensor], number: int) -> list[Tensor]:
    return _modules[number].shapes(inputs)


class SparseModule(nn.Module):
    """What the sparse modules share: packed weights, a kernel, and no gradients."""

    def __init__(self, kernel: Kernel, weights: Weights) -> None:
        super().__init__()
        self._number()
        self.kernel = kernel
        self.recorder: InputRecorder | None = None
        self._ready: dict[Any, Any] = {}
        for name, weight in weights.items():
            if isinstance(weight, SparseMatrix):
                self.add_module(name, PackedWeight(weight))
            else:
                self.register_buffer(name, None if weight is None else weight.detach().float().clone())
        self.eval()

    def matrices(self) -> dict[str, SparseMatrix]:
        """Its packed weights by name."""
        return {name: child.matrix for name, child in self.named_children() if isinstance(child, PackedWeight)}

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        raise NotImplementedError

    def _matrix(self, name: str) -> SparseMatrix:
        child = getattr(self, name)
        assert isinstance(child, PackedWeight)
        return child.matrix

    def _check(self, weights: LayerWeights | SparseMatrix, x: Tensor, batch: int) -> None:
        reason = None if x.is_floating_point() else f"inputs are {x.dtype}, and have to be floats"
        reason = reason or self.kernel.supports(weights, x.device, x.dtype, batch)
        if reason is not None:
            raise UserError(f"{type(self).__name__} cannot run: {reason}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        """Moves between devices; what values are stored as was decided when they were packed."""
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                probe = fn(torch.empty(1, device=buffer.device))
                if probe.dtype not in (torch.float32, buffer.dtype):
                    raise TypeError(
                        f"{type(self).__name__} cannot become {probe.dtype}: choose sparsify(values=...) instead"
                    )
                module._buffers[name] = buffer.to(probe.device)
        self._ready.clear()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._ready.clear()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}, "recorder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number()

    def _number(self) -> None:
        self.number = next(_numbers)
        _modules[self.number] = self

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Outputs, of plain tensors: what is one operator in a compiled graph."""
        raise NotImplementedError

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """Empty tensors like the outputs."""
        raise NotImplementedError

    def _outputs(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            return _call(inputs, self.number)
        return self.compute(inputs)


def no_grad() -> AbstractContextManager[None]:
    """``torch.no_grad()``, which costs a step of a stream 5 us, only where it changes anything."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class _NoBackward(torch.autograd.Function):
    """Passes values on; asking for gradients through it raises."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *sources: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("gradients do not flow through sparse kernels: train the dense module (srnn.desparsify)")


def without_gradient(y: Tensor, *sources: Tensor) -> Tensor:
    """The output ``y``; backward through it raises where a source asks for a gradient."""
    asked = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    return _NoBackward.apply(y, *sources) if asked else y


def filled(module: nn.Module, sparse: SparseModule) -> nn.Module:
    """Torch's ``module`` with the weights of a sparse one, trainable, in eval mode."""
    tensors: dict[str, Tensor] = {name: b.clone() for name, b in sparse._buffers.items() if b is not None}
    tensors |= {name: matrix.to_dense() for name, matrix in sparse.matrices().items()}
    module.load_state_dict(tensors, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
    return module.eval()
