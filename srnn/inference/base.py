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


_LIKE = "like"  # the parameter of a sparse module, never trained

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
    """What the sparse modules share: packed weights, a kernel, and no gradients.

    A packed weight read as an attribute, as in ``layer.weight``, is a dense copy of it; changing the copy changes
    nothing. ``matrices`` gives the packed ones.
    """

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
        # For code that makes its tensors like ``next(model.parameters())``. It is empty, and part of no file.
        device = next(self.buffers()).device
        self.register_parameter(_LIKE, nn.Parameter(torch.empty(0, device=device).float(), requires_grad=False))
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Python asks here for what it did not find: parameters, buffers, modules; packed weights are given dense."""
        found = super().__getattr__(name)
        return self._dense(name, found) if isinstance(found, PackedWeight) else found

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to replace a packed weight, which the kernel would not see. Raises UserError."""
        if isinstance(self.__dict__.get("_modules", {}).get(name), PackedWeight):
            raise UserError(
                f"{type(self).__name__}.{name} is packed and cannot be set: change the dense network "
                "(srnn.desparsify) and sparsify it again."
            )
        super().__setattr__(name, value)

    def _dense(self, name: str, packed: PackedWeight) -> Tensor:
        # Kept, because a forward that reads it does so at every call.
        if ("dense", name) not in self._ready:
            self._ready["dense", name] = packed.matrix.to_dense()
        dense: Tensor = self._ready["dense", name]
        return dense

    def matrices(self) -> dict[str, SparseMatrix]:
        """Its packed weights by name."""
        return {name: child.matrix for name, child in self.named_children() if isinstance(child, PackedWeight)}

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        raise NotImplementedError

    def _matrix(self, name: str) -> SparseMatrix:
        child = self._modules[name]
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
                probe = fn(torch.empty(1, device=buffer.device, dtype=torch.float32))
                if probe.dtype not in (torch.float32, buffer.dtype):
                    raise TypeError(
                        f"{type(self).__name__} cannot become {probe.dtype}: choose sparsify(values=...) instead"
                    )
                # fn itself, where it only moves: share_memory shares the tensor it is given.
                moved = fn(buffer)
                module._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(probe.device)
        like = self._parameters.get(_LIKE)
        if like is not None:
            like.data = like.data.to(next(self.buffers()).device)
        self._ready.clear()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + _LIKE, None)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self._ready.clear()
        like = self._parameters.pop(_LIKE, None)  # so that no file has to hold it
        try:
            super()._load_from_state_dict(state, prefix, *arguments)
        finally:
            self._parameters[_LIKE] = like

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
