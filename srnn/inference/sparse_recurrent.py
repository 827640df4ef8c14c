"""The sparse counterpart of ``nn.RNN``, ``nn.GRU`` and ``nn.LSTM``.

Shapes: T steps, B streams, N rows, I inputs, H hidden units, P outputs (H, or an LSTM's projection), L layers times
directions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from srnn.cells import cell_of
from srnn.inference.autocast import is_autocast, without_autocast
from srnn.inference.base import TORCH, Weights, no_grad, refuse_tracing, without_gradient
from srnn.inference.one_call import OneCall
from srnn.inference.replayed_calls import ReplayedCalls
from srnn.inference.usual_calls import UsualSequences
from srnn.kernels.contract import Kernel, Layer, LayerWeights, State, equal_lengths
from srnn.models.stepping import one_stream, with_a_stream


class SparseRecurrent(ReplayedCalls):
    """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` on sparse kernels: the same call, outputs and states.

    Dropout between layers is that of a trained network: none.
    """

    def __init__(self, original: nn.RNNBase, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.kind: Any = type(original)
        self.cell = cell_of(original)
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
        self.describe()

    def layer_weights(self, index: int) -> LayerWeights:
        """The weights of a layer and direction, in the order of torch's states."""
        suffix = self.suffixes[index]
        return LayerWeights(
            self.cell,
            self._matrix(f"weight_ih{suffix}"),
            self._matrix(f"weight_hh{suffix}"),
            self._buffers.get(f"bias_ih{suffix}"),
            self._buffers.get(f"bias_hh{suffix}"),
            self._matrix(f"weight_hr{suffix}") if self.proj_size else None,
            suffix.endswith("_reverse"),
        )

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """As torch's: the weights of each layer and direction, packed ones as dense copies."""
        return [[getattr(self, name) for name in names] for names in self._all_weights]

    @property
    def _flat_weights(self) -> list[Tensor]:
        return [weight for weights in self.all_weights for weight in weights]

    @property
    def _flat_weights_names(self) -> list[str]:
        return [name for names in self._all_weights for name in names]

    @property
    def _all_weights(self) -> list[list[str]]:
        of_one = ["weight_ih", "weight_hh", *["bias_ih", "bias_hh"] * self.bias, *["weight_hr"] * bool(self.proj_size)]
        return [[f"{name}{suffix}" for name in of_one] for suffix in self.suffixes]

    def flatten_parameters(self) -> None:
        """Nothing to do; for code that calls it on torch's modules."""

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """As torch's module: ``output, h_n`` or ``output, (h_n, c_n)``.

        Raises:
            RuntimeError: shapes do not fit; also backward through the outputs.
        """
        if not torch.compiler.is_compiling():
            usual = self._ready.get("usual")
            done = self._again("sequence", input, hx) if usual is None else usual(input, hx)
            if done is not None:
                return done
        refuse_tracing()
        if is_autocast(input):
            return without_autocast(self.forward, input, hx)
        self.follow()
        if type(input) is Tensor and input.is_cpu:  # nothing is replayed there, and a small network feels each question
            return self._plain(input, hx)
        replayed = self._replayed("sequence", input, hx, self._plain)
        return self._plain(input, hx) if replayed is None else replayed

    def _plain(self, input: Tensor | PackedSequence, hx: Any) -> tuple[Any, Any]:
        if type(input) is Tensor and input.dim() == 3:
            done = self._quickly(input, hx, *(input.shape[1::-1] if self.batch_first else input.shape[:2]))
            if done is not None:
                return done
        if isinstance(input, PackedSequence):
            _check_packed(input)
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
            hx = with_a_stream(hx)
        x_TBI = input[:, None] if not batched else input.transpose(0, 1) if self.batch_first else input
        steps, streams, _ = x_TBI.shape
        if steps == 0:
            raise RuntimeError(f"sequences of {steps} steps and {streams} streams hold nothing to run over")
        y_TBP, *after = self._outputs([x_TBI, *self._state(hx, streams, input)])
        state = tuple(after)
        if not batched:
            return y_TBP[:, 0], self._as_torch(tuple(part[:, 0] for part in state))
        return (y_TBP.transpose(0, 1) if self.batch_first else y_TBP), self._as_torch(state)

    def step(self, x_BI: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """One step of B streams: y_BP and the next state, as torch shapes it; None starts from zero.

        Of one stream without a dimension for it, x_I, also: then y_P, and states of two dimensions. Safe to call from
        several threads, each with a state of its own.

        Raises:
            ValueError: the input or the state has another number of dimensions.
            RuntimeError: sizes do not fit, or the layers are bidirectional.
        """
        if not isinstance(x_BI, Tensor) or x_BI.dim() != 2:
            return one_stream(self.step, x_BI, hx, 2)
        hooks = self._forward_hooks or self._forward_pre_hooks
        done = None if hooks or torch.compiler.is_compiling() else self._again("step", x_BI, hx)
        if done is not None:
            return done
        refuse_tracing()
        if self.bidirectional:
            raise RuntimeError("a bidirectional network sees the end of a sequence first: it cannot run step by step")
        at_once = OneCall.of(None, self, None)(x_BI, hx) if hx is not None and x_BI.is_cpu else None
        if at_once is not None:
            return at_once
        if is_autocast(x_BI):
            return without_autocast(self.step, x_BI, hx)
        self.follow()
        time = 1 if self.batch_first else 0
        if hooks:  # which see sequences, as those of torch's modules do
            y, state = self(x_BI.unsqueeze(time), hx)
            return y.squeeze(time), state
        replayed = self._replayed("step", x_BI, hx, self._plain_step)
        return self._plain_step(x_BI, hx) if replayed is None else replayed

    def step_of_network(self, before: Any, after: Any, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """A step of an embedding (or None), these layers and a decoder; None where each has to be called by itself."""
        return OneCall.of(before, self, after)(input, hx)

    def _plain_step(self, x_BI: Tensor, hx: Any) -> tuple[Tensor, Any]:
        time = 1 if self.batch_first else 0
        done = self._quickly(x_BI.unsqueeze(time), hx, 1, x_BI.shape[0])
        if done is not None:
            return done[0].squeeze(time), done[1]
        y_BP, state = self._run(x_BI, equal_lengths(1, x_BI.shape[0]), self._state(hx, x_BI.shape[0], x_BI))
        return y_BP, self._as_torch(state)

    def weights_to_run(self) -> LayerWeights:
        """Those of its first layer; the others are of its kind."""
        return self.layer_weights(0)

    def _quickly(self, input: Tensor, hx: Any, steps: int, streams: int) -> tuple[Tensor, Any] | None:
        """By torch's own module or all layers in one call, where that is to be; nothing else stands in between."""
        if torch.compiler.is_compiling() or self.recorder is not None or not input.numel():
            return None
        name = self._decision(input, streams, steps)
        if name == TORCH and input.dtype == torch.float32:
            return self.by_torch(input, hx)
        stack = self._stack(input, name) if streams == 1 else None
        if stack is None:
            return None
        if input.is_cpu:
            UsualSequences.keep(self, steps, stack)
        begin = self._state(hx, 1, input)
        y, after = stack.run(self._rows(input, steps), equal_lengths(steps, 1), begin)
        y = without_gradient(y, input, *begin).view(*input.shape[:2], self.hidden_size)
        return y, self._as_torch(tuple(without_gradient(part, input, *begin) for part in after))

    def _rows(self, x: Tensor, rows: int) -> Tensor:
        if x.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, not {x.shape[-1]}")
        return x.reshape(rows, self.input_size)

    def by_torch(self, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        """Torch's own layers, where these are fastest, of an input of three dimensions."""
        streams = input.shape[0 if self.batch_first else 1]
        if input.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, not {input.shape[-1]}")
        begin, run = self._state(hx, streams, input), self._torchs_function()
        with no_grad():
            y, *after = run(input, begin if self.cell == "lstm" else begin[0])
        state = tuple(without_gradient(part, input, *begin) for part in after)
        return without_gradient(y, input, *begin), self._as_torch(state)

    def _torchs_function(self) -> Callable[..., tuple[Tensor, ...]]:
        """What torch's module calls, with these weights: the module itself takes 20 us more, for checks made here."""
        if TORCH not in self._ready:
            weights = list(self.original().requires_grad_(False).parameters())
            self._ready[TORCH] = partial(
                getattr(torch, self.cell if self.kind is not nn.RNN else f"rnn_{self.cell}"),
                params=weights,
                has_biases=self.bias,
                num_layers=self.num_layers,
                dropout=0.0,
                train=False,
                bidirectional=self.bidirectional,
                batch_first=self.batch_first,
            )
        function: Callable[..., tuple[Tensor, ...]] = self._ready[TORCH]
        return function

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """y_TBP and the state of x_TBI and the state before."""
        self.follow()
        x_TBI, *state = inputs
        steps, streams, _ = x_TBI.shape
        rows = x_TBI.reshape(steps * streams, x_TBI.shape[-1])
        y_NP, after = self._run(rows, equal_lengths(steps, streams), tuple(state))
        return y_NP.view(steps, streams, y_NP.shape[-1]), *after

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
        if x.is_cpu:  # whatever backend was chosen: not all of them take a state of another type
            state = tuple(part.to(x.dtype) for part in state)
        return state if order is None else tuple(part.index_select(1, order) for part in state)

    def _run(self, x_NI: Tensor, sizes: Tensor, state: State) -> tuple[Tensor, State]:
        if x_NI.shape[-1] != self.input_size:
            raise RuntimeError(f"input must have {self.input_size} features, not {x_NI.shape[-1]}")
        directions = 2 if self.bidirectional else 1
        if not x_NI.shape[0]:  # no streams, as in a last batch that is empty: kernels need not know of it
            return x_NI.new_empty(0, directions * (self.proj_size or self.hidden_size)), state
        y, ends = x_NI, []
        name = self._decision(x_NI, state[0].shape[1], len(sizes))
        stack = self._stack(x_NI, name) if state[0].shape[1] == 1 and self.recorder is None else None
        if stack is not None:
            y, after = stack.run(x_NI, sizes, state)
            return without_gradient(y, x_NI, *state), tuple(without_gradient(part, x_NI, *state) for part in after)
        with no_grad():
            for first in range(0, len(self.suffixes), directions):
                begin = tuple(part[first : first + 2] if self.bidirectional else part[first] for part in state)
                out, end = self._layer(first, y, begin[0].shape[-2], name).run(y, sizes, begin)
                if self.recorder is not None:
                    for d, y_NP in enumerate(out.chunk(directions, dim=1)):
                        self._record(first + d, y, sizes, state[0][first + d], y_NP)
                ends.append(end if self.bidirectional else tuple(part[None] for part in end))
                y = out
            after = ends[0] if len(ends) == 1 else tuple(torch.cat(parts) for parts in zip(*ends, strict=True))
        return without_gradient(y, x_NI, *state), tuple(without_gradient(part, x_NI, *state) for part in after)

    def _layer(self, index: int, x: Tensor, streams: int, name: str | None) -> Layer:
        key = (name, index, x.device, x.dtype)
        ready: Layer | None = self._ready.get(key)
        if ready is None:
            weights, kernel = self.layer_weights(index), self.kernel_named(name)
            self._check(weights, x, streams)
            if self.bidirectional:
                ready = kernel.both(weights, self.layer_weights(index + 1), x.device, x.dtype)
            else:
                ready = kernel.layer(weights, x.device, x.dtype)
            self._ready[key] = ready
        return ready

    def _stack(self, x: Tensor, name: str | None) -> Layer | None:
        """All layers in one call, where the kernel has that."""
        key = ("stack", name, x.device, x.dtype)
        if key not in self._ready:
            kernel = self.kernel_named(name)
            layers = [] if self.bidirectional else [self._layer(i, x, 1, name) for i in range(len(self.suffixes))]
            self._ready[key] = kernel.stack(layers) if layers else None
        ready: Layer | None = self._ready[key]
        return ready

    def _record(self, index: int, x_NI: Tensor, sizes: Tensor, h_BP: Tensor, y_NP: Tensor) -> None:
        assert self.recorder is not None
        suffix = self.suffixes[index]
        self.recorder(f"weight_ih{suffix}", x_NI)
        self.recorder(f"weight_hh{suffix}", torch.cat([h_BP, y_NP]))
        if self.proj_size:  # what a projection multiplies stays inside the kernel; a column counts as the next
            self.recorder(f"weight_hr{suffix}", x_NI.new_ones(1, self.hidden_size))

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """``nn.RNN``, ``nn.GRU`` or ``nn.LSTM``."""
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        options = {name: getattr(self, name) for name in names}
        options |= {"nonlinearity": self.cell} if self.kind is nn.RNN else {}
        return self.kind, options | ({"proj_size": self.proj_size} if self.proj_size else {})

    def extra_repr(self) -> str:
        """The cell, and what was chosen for it."""
        return "\n".join(filter(None, (f"{self.cell}, {self.input_size}, {self.hidden_size}", super().extra_repr())))


def _check_packed(input: PackedSequence) -> None:
    """Raises RuntimeError of rows that are not those of the streams at each step: addresses are made of these."""
    sizes = input.batch_sizes.tolist()
    falls = all(after <= before for before, after in pairwise(sizes))
    if input.data.dim() != 2 or not sizes or sum(sizes) != len(input.data) or sizes[-1] < 1 or not falls:
        raise RuntimeError(
            f"a PackedSequence must hold [rows, features], as many rows as its batch_sizes add up to, which must not "
            f"rise: not {tuple(input.data.shape)} with batch_sizes {sizes[:8]}"
        )
