"""The sparse counterparts of ``nn.RNN``, ``nn.GRU``, ``nn.LSTM``, ``nn.Linear`` and ``nn.Embedding``, for inference.

They hold packed weights, are called as the originals are, and are one operator each in a compiled graph. ``sparsify``
puts them into a network.

Shapes: T steps, B streams, N rows, I inputs, H hidden units, P outputs (H, or an LSTM's projection), L layers times
directions.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from srnn.cells import Cell, cell_of
from srnn.errors import UserError
from srnn.inference.meta_device import without_memory
from srnn.kernels.contract import Kernel, Layer, LayerWeights, Product, State, equal_lengths
from srnn.sparse import SparseMatrix

# By torch's name: a packed matrix, a bias, or None for a bias that is not there.
Weights = Mapping[str, SparseMatrix | Tensor | None]
# Called with the name of a matrix and the rows it multiplies; see ``sparsify.record_inputs``.
Recorder = Callable[[str, Tensor], None]

# Entries of an embedding up to which it is unpacked for lookups: 1 MB. A token takes 16 us then, else 52.
SMALL_TABLE = 1 << 18


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
        self.recorder: Recorder | None = None
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


def _no_grad() -> AbstractContextManager[None]:
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


def _without_gradient(y: Tensor, *sources: Tensor) -> Tensor:
    asked = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    return _NoBackward.apply(y, *sources) if asked else y


class SparseRecurrent(SparseModule):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` on sparse kernels: the same call, outputs and states.

    Dropout between layers is that of a trained network: none.
    """

    def __init__(self, original: nn.RNNBase, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.kind: Any = type(original)
        self.cell: Cell = cell_of(original)
        self.input_size, self.hidden_size, self.proj_size = (
            original.input_size,
            original.hidden_size,
            original.proj_size,
        )
        self.num_layers, self.bidirectional, self.bias = original.num_layers, original.bidirectional, original.bias
        self.batch_first, self.dropout = original.batch_first, original.dropout
        self.suffixes = [
            f"_l{layer}{direction}"
            for layer in range(original.num_layers)
            for direction in (["", "_reverse"] if original.bidirectional else [""])
        ]

    def layer_weights(self, index: int) -> LayerWeights:
        """The weights of a layer and direction, in the order of torch's states."""
        suffix = self.suffixes[index]
        return LayerWeights(
            self.cell,
            self._matrix(f"weight_ih{suffix}"),
            self._matrix(f"weight_hh{suffix}"),
            getattr(self, f"bias_ih{suffix}", None),
            getattr(self, f"bias_hh{suffix}", None),
            self._matrix(f"weight_hr{suffix}") if self.proj_size else None,
            suffix.endswith("_reverse"),
        )

    def flatten_parameters(self) -> None:
        """Nothing to do; for code that calls it on torch's modules."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As torch's module: ``output, h_n`` or ``output, (h_n, c_n)``.

        Raises:
            RuntimeError: shapes do not fit; also backward through the outputs.
        """
        if isinstance(input, PackedSequence):
            begin = self._state(hx, int(input.batch_sizes[0]), input.data, input.sorted_indices)
            y_NP, state = self._run(input.data, input.batch_sizes, begin)
            if input.unsorted_indices is not None:
                state = tuple(part.index_select(1, input.unsorted_indices) for part in state)
            packed = PackedSequence(y_NP, input.batch_sizes, input.sorted_indices, input.unsorted_indices)
            return packed, self._as_torch(state)
        if input.dim() not in (2, 3):
            raise ValueError(f"input must have 2 or 3 dimensions, not {input.dim()}")
        batched = input.dim() == 3
        if not batched:
            hx = hx if hx is None else tuple(p[:, None] for p in hx) if isinstance(hx, tuple) else hx[:, None]
        x_TBI = input[:, None] if not batched else input.transpose(0, 1) if self.batch_first else input
        steps, streams, _ = x_TBI.shape
        if steps == 0 or streams == 0:
            raise RuntimeError(f"sequences of {steps} steps and {streams} streams hold nothing to run over")
        y_TBP, *after = self._outputs([x_TBI, *self._state(hx, streams, input)])
        state = tuple(after)
        if not batched:
            return y_TBP[:, 0], self._as_torch(tuple(part[:, 0] for part in state))
        return (y_TBP.transpose(0, 1) if self.batch_first else y_TBP), self._as_torch(state)

    def step(self, x_BI: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """One step of B streams: y_BP and the state to go on from, as torch shapes it; None starts from zero.

        Safe to call from several threads, each with a state of its own.
        """
        if self.bidirectional:
            raise RuntimeError("a bidirectional network sees the end of a sequence first: it cannot run step by step")
        y_BP, state = self._run(x_BI, equal_lengths(1, x_BI.shape[0]), self._state(hx, x_BI.shape[0], x_BI))
        return y_BP, self._as_torch(state)

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """y_TBP and the state of x_TBI and the state before."""
        x_TBI, *state = inputs
        steps, streams, _ = x_TBI.shape
        rows = x_TBI.reshape(steps * streams, -1)
        y_NP, after = self._run(rows, equal_lengths(steps, streams), tuple(state))
        return y_NP.view(steps, streams, -1), *after

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """y_TBP and the state."""
        x_TBI, *state = inputs
        outputs = (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)
        return [x_TBI.new_empty(*x_TBI.shape[:2], outputs), *(torch.empty_like(part) for part in state)]

    def _as_torch(self, state: State) -> Any:
        return state if self.cell == "lstm" else state[0]

    def _state(self, hx: Any, streams: int, x: Tensor, order: Tensor | None = None) -> State:
        """[L, B, P] (and [L, B, H]), the streams in the order of the rows."""
        layers, outputs = len(self.suffixes), self.proj_size or self.hidden_size
        shapes = [(layers, streams, outputs)] + [(layers, streams, self.hidden_size)] * (self.cell == "lstm")
        if hx is None:
            return tuple(torch.zeros(shape, device=x.device, dtype=x.dtype) for shape in shapes)
        state = tuple(hx) if self.cell == "lstm" else (hx,)
        given = [tuple(part.shape) for part in state]
        if given != shapes:
            raise RuntimeError(f"the state must have shape {shapes}, not {given}")
        return state if order is None else tuple(part.index_select(1, order) for part in state)

    def _run(self, x_NI: Tensor, sizes: Tensor, state: State) -> tuple[Tensor, State]:
        if x_NI.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, not {x_NI.shape[-1]}")
        directions = 2 if self.bidirectional else 1
        y, ends = x_NI, []
        with _no_grad():
            for first in range(0, len(self.suffixes), directions):
                begin = tuple(part[first : first + 2] if self.bidirectional else part[first] for part in state)
                out, end = self._layer(first, y, begin[0].shape[-2]).run(y, sizes, begin)
                if self.recorder is not None:
                    for d, y_NP in enumerate(out.chunk(directions, dim=1)):
                        self._record(first + d, y, sizes, state[0][first + d], y_NP)
                ends.append(end if self.bidirectional else tuple(part[None] for part in end))
                y = out
            after = ends[0] if len(ends) == 1 else tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        return _without_gradient(y, x_NI, *state), tuple(_without_gradient(part, x_NI, *state) for part in after)

    def _layer(self, index: int, x: Tensor, streams: int) -> Layer:
        key = (index, x.device, x.dtype)
        ready: Layer | None = self._ready.get(key)
        if ready is None:
            weights = self.layer_weights(index)
            self._check(weights, x, streams)
            if self.bidirectional:
                ready = self.kernel.both(weights, self.layer_weights(index + 1), x.device, x.dtype)
            else:
                ready = self.kernel.layer(weights, x.device, x.dtype)
            self._ready[key] = ready
        return ready

    def _record(self, index: int, x_NI: Tensor, sizes: Tensor, h_BP: Tensor, y_NP: Tensor) -> None:
        assert self.recorder is not None
        suffix = self.suffixes[index]
        self.recorder(f"weight_ih{suffix}", x_NI)
        self.recorder(f"weight_hh{suffix}", torch.cat([h_BP, y_NP]))
        if self.proj_size:  # what a projection multiplies stays inside the kernel; a column counts as the next
            self.recorder(f"weight_hr{suffix}", x_NI.new_ones(1, self.hidden_size))

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        options: dict[str, Any] = {"nonlinearity": self.cell} if self.kind is nn.RNN else {}
        if self.proj_size:
            options["proj_size"] = self.proj_size
        with without_memory():
            module = self.kind(
                self.input_size, self.hidden_size, self.num_layers, bias=self.bias, batch_first=self.batch_first,
                dropout=self.dropout, bidirectional=self.bidirectional, **options,
            )  # fmt: skip
        return _filled(module, self)

    def extra_repr(self) -> str:
        """The cell."""
        return f"{self.cell}, {self.input_size}, {self.hidden_size}"


class SparseLinear(SparseModule):
    """``nn.Linear`` on sparse kernels."""

    def __init__(self, original: nn.Linear, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.in_features, self.out_features = original.in_features, original.out_features

    def forward(self, input: Tensor) -> Tensor:
        """``input W' + bias``, over the last dimension."""
        if input.shape[-1] != self.in_features:
            raise RuntimeError(f"input must have {self.in_features} features, not {input.shape[-1]}")
        return self._outputs([input])[0]

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The same as ``forward``."""
        (input,) = inputs
        with _no_grad():
            x_NI = input if input.dim() == 2 else input.reshape(-1, self.in_features)
            if self.recorder is not None:
                self.recorder("weight", x_NI)
            y = self._product(x_NI)(x_NI)
            y = y if input.dim() == 2 else y.view(*input.shape[:-1], self.out_features)
        return (_without_gradient(y, input),)

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """One output."""
        return [inputs[0].new_empty(*inputs[0].shape[:-1], self.out_features)]

    def _product(self, x_NI: Tensor) -> Product:
        key = (x_NI.device, x_NI.dtype)
        ready: Product | None = self._ready.get(key)
        if ready is None:
            matrix = self._matrix("weight")
            self._check(matrix, x_NI, x_NI.shape[0])
            ready = self._ready[key] = self.kernel.product(matrix, self._buffers["bias"], *key)
        return ready

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        with without_memory():
            module = nn.Linear(self.in_features, self.out_features, bias=self._buffers["bias"] is not None)
        return _filled(module, self)


class SparseEmbedding(SparseModule):
    """``nn.Embedding`` that keeps its non-zeros only; a small one unpacks them at its first call."""

    def __init__(self, original: nn.Embedding, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        """The rows of these numbers."""
        return self._outputs([input])[0]

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The same as ``forward``."""
        (input,) = inputs
        if self.num_embeddings * self.embedding_dim <= SMALL_TABLE:
            if "table" not in self._ready:
                self._ready["table"] = self._matrix("weight").to_dense()
            return (nn.functional.embedding(input, self._ready["table"]),)
        if input.numel() and not 0 <= int(input.min()) <= int(input.max()) < self.num_embeddings:
            raise IndexError(f"numbers must lie between 0 and {self.num_embeddings - 1}")
        rows = self._matrix("weight").rows(input.reshape(-1))
        return (rows.view(*input.shape, self.embedding_dim),)

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """One output."""
        return [inputs[0].new_empty(*inputs[0].shape, self.embedding_dim, dtype=torch.float32)]

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        with without_memory():
            module = nn.Embedding(self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx)
        return _filled(module, self)


_SPARSE: dict[type[nn.Module], Any] = {
    nn.RNN: SparseRecurrent,
    nn.GRU: SparseRecurrent,
    nn.LSTM: SparseRecurrent,
    nn.Linear: SparseLinear,
    nn.Embedding: SparseEmbedding,
}


def _filled(module: nn.Module, sparse: SparseModule) -> nn.Module:
    tensors: dict[str, Tensor] = {name: b.clone() for name, b in sparse._buffers.items() if b is not None}
    tensors |= {name: matrix.to_dense() for name, matrix in sparse.matrices().items()}
    module.load_state_dict(tensors, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
    return module.eval()


def replaceable(module: nn.Module) -> bool:
    """Whether a module has a sparse counterpart. Embeddings that change their weights when called have none."""
    return type(module) in _SPARSE and getattr(module, "max_norm", None) is None


def sparse_module(module: nn.Module, weights: Weights, kernel: Kernel) -> SparseModule:
    """The sparse counterpart of one of torch's modules."""
    made: SparseModule = _SPARSE[type(module)](module, weights, kernel)
    return made
