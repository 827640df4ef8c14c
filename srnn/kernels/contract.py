"""What a kernel backend provides.

Sequences are packed rows, as in torch's ``PackedSequence``: the rows of all streams at step 0, then at step 1, and
so on. ``batch_sizes`` (int64, on the CPU) says how many streams each step has; they never rise, so stream ``b`` is row
``b`` of every step it takes part in. A padded ``[T, B, ...]`` tensor of equal lengths is the same memory.

Shapes: T steps, B streams, N = sum(batch_sizes) rows, I inputs, H hidden units, G = gates * H, P outputs of a layer (H,
or an LSTM's projection).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from srnn.cells import Cell
from srnn.sparse import SparseMatrix

State = tuple[Tensor, ...]  # (h_BP,), and (h_BP, c_BH) of an LSTM
Product = Callable[[Tensor], Tensor]  # x_NI -> y_NO
# The step of a whole network for one stream; None of inputs that it does not take. See ``Kernel.network_step``.
NetworkStep = Callable[[Tensor, State], tuple[Tensor, State] | None]


@dataclass(frozen=True)
class LayerWeights:
    """One direction of one recurrent layer, with torch's gate order (r, z, n; i, f, g, o) and meaning.

    Attributes:
        cell: the recurrence.
        w_ih: [G, I].
        w_hh: [G, P].
        b_ih: [G], or None.
        b_hh: [G], or None.
        w_hr: [P, H], an LSTM's projection, or None.
        reverse: whether it runs from the last step to the first.
    """

    cell: Cell
    w_ih: SparseMatrix
    w_hh: SparseMatrix
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: SparseMatrix | None = None
    reverse: bool = False

    @property
    def hidden_size(self) -> int:
        """H, hidden units."""
        return self.w_hh.units

    @property
    def output_size(self) -> int:
        """P, outputs of a step: those of the projection where there is one, else H."""
        return self.w_hh.shape[1]

    @property
    def matrices(self) -> dict[str, SparseMatrix]:
        """Its matrices by name; ``w_hr`` only where there is a projection."""
        found = {"w_ih": self.w_ih, "w_hh": self.w_hh, "w_hr": self.w_hr}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    @property
    def input_bias(self) -> Tensor | None:
        """[G], what can be added before the recurrence: both biases, but for a GRU's ``new_bias``."""
        if self.b_hh is None or (self.b_ih is None and self.cell != "gru"):
            return self.b_ih if self.b_hh is None else self.b_hh
        if self.b_ih is None:  # the last gate's is ``new_bias``, and must not count twice
            return torch.cat([self.b_hh[: 2 * self.hidden_size], torch.zeros_like(self.b_hh[2 * self.hidden_size :])])
        if self.cell != "gru":
            return self.b_ih + self.b_hh
        first = 2 * self.hidden_size
        return torch.cat([self.b_ih[:first] + self.b_hh[:first], self.b_ih[first:]])

    @property
    def new_bias(self) -> Tensor | None:
        """[H], the bias that a GRU's reset gate multiplies; None for other cells."""
        return self.b_hh[2 * self.hidden_size :] if self.cell == "gru" and self.b_hh is not None else None

    def to(self, device: torch.device | str) -> LayerWeights:
        """The same weights on a device."""
        moved: dict[str, Any] = {name: matrix.to(device) for name, matrix in self.matrices.items()}
        moved |= {name: b.to(device) for name in ("b_ih", "b_hh") if (b := getattr(self, name)) is not None}
        return replace(self, **moved)


class Layer(ABC):
    """One recurrent layer, or both directions of a bidirectional one, made ready to run.

    What ``Kernel.layer`` and ``Kernel.both`` return. It is safe to call from several threads at once, so a call keeps
    nothing of its own in the object. Gradients are not asked for: the modules that call it refuse them.
    """

    @abstractmethod
    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """Run over sequences.

        Args:
            x_NI: packed rows, [N, I], of the device and dtype that the layer was prepared for. N may be 0.
            batch_sizes: [T], int64 on the CPU, streams of each step; they never rise.
            state: of the B streams before their first step, h [B, P] and an LSTM's c [B, H]; left as it is. With both
                directions each part has one dimension more in front, of 2.

        Returns:
            y [N, P], in the order of ``x_NI`` ([N, 2 P] of both directions), and the state of each stream after its
            last step, shaped as ``state``.
        """

    def step(self, x_BI: Tensor, state: State) -> tuple[Tensor, State]:
        """One step of B streams: y [B, P] of x [B, I], and the new state. Override it where that can be faster."""
        return self.run(x_BI, equal_lengths(1, x_BI.shape[0]), state)

    def run_one(self, x: Tensor, steps: int, state: State) -> tuple[Tensor, State]:
        """``run`` of one stream, x [T, 1, I] or [1, T, I], y shaped like it. Override it where that can be faster."""
        y, after = self.run(x.reshape(steps, x.shape[2]), equal_lengths(steps, 1), state)
        return y.view(x.shape[0], x.shape[1], y.shape[1]), after

    def chosen(self, steps: int, streams: int) -> Layer:
        """What runs sequences of so many steps: the layer itself, but for one that chooses among several."""
        return self


@lru_cache
def equal_lengths(steps: int, streams: int) -> Tensor:
    """``batch_sizes`` of streams of equal length. Not to be changed: callers share it."""
    return torch.full((steps,), streams)


class Recurrence(ABC):
    """The recurrent half of a layer made ready to run: all but the product with the input.

    What ``Kernel.recurrence`` returns. Networks that do something of their own between the two halves, such as Deep
    Speech 2 with its norms, run it by itself.
    """

    @abstractmethod
    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """Run over sequences.

        Args:
            u_NG: ``x W_ih' + input_bias``, [N, G], one block of H columns a gate. Rows need not be contiguous.
            batch_sizes: [T], as in ``Layer.run``.
            state: as in ``Layer.run``.

        Returns:
            As ``Layer.run``.
        """


@dataclass(frozen=True)
class ComposedLayer(Layer):
    """A layer made of its two halves.

    Attributes:
        product: ``x_NI -> x W_ih' + input_bias``.
        recurrence: the rest.
    """

    product: Product
    recurrence: Recurrence

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """Product with the input for all steps at once, then the recurrence."""
        return self.recurrence(self.product(x_NI), batch_sizes, state)


@dataclass(frozen=True)
class OneAfterTheOther(Layer):
    """Both directions of a bidirectional layer. Parts of the state are [2, B, ...], outputs [N, 2 P].

    Attributes:
        forward: the direction that runs from the first step to the last.
        backward: the other, of weights with ``reverse``.
    """

    forward: Layer
    backward: Layer

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """The forward direction, then the other."""
        both = (self.forward, self.backward)
        done = [one.run(x_NI, batch_sizes, tuple(part[d] for part in state)) for d, one in enumerate(both)]
        ends = zip(*(end for _, end in done), strict=True)
        return torch.cat([y for y, _ in done], dim=1), tuple(torch.stack(parts) for parts in ends)


class Kernel(ABC):
    """A way to run sparse weights: what a plug-in derives from.

    Registered as ``@register.kernel("name")`` it is selected as ``kernel=name``, tried by ``kernel=auto`` and timed by
    ``srnn bench``. The typed arguments of its ``__init__`` are its options: ``kernel.option=value``.

    ``supports``, ``product`` and ``recurrence`` have to be there. ``layer`` and ``both`` are made of them, and worth
    overriding where a whole layer can be faster than its halves. A backend that has only a product of its own derives
    from ``StepLoopKernel``, which loops over the steps in torch. Kernels are for inference: no gradients.

    Attributes:
        tolerance: how far outputs may be from float64's with the same weights, as a relative norm. ``bench`` leaves
            a kernel out that is further away, and a run stops.
        unasked: whether ``auto`` and ``bench`` try it without being told to.
        device_types: where ``auto`` tries it, such as ``("cuda",)``; None for everywhere.

    Example:
        Only the columns of W that hold anything are multiplied. In a plug-in the class is decorated with
        ``@register.kernel("columns")``.

        >>> import torch
        >>> from srnn.kernels import StepLoopKernel
        >>> from srnn.sparse import SparseMatrix
        >>> class Columns(StepLoopKernel):
        ...     def supports(self, weights, device, dtype=torch.float32, batch=1):
        ...         return None if device.type == "cpu" else f"runs on a CPU, not on {device.type}"
        ...
        ...     def product(self, matrix, bias, device, dtype):
        ...         weight_OI = matrix.to_dense().to(device, dtype)
        ...         used = weight_OI.any(dim=0).nonzero().flatten()
        ...         weight_OU = weight_OI[:, used]
        ...         bias = None if bias is None else bias.to(device, dtype)
        ...         return lambda x_NI: torch.nn.functional.linear(x_NI[:, used], weight_OU, bias)
        >>> matrix = SparseMatrix.from_dense(torch.tensor([[0.0, 2.0], [0.0, 3.0]]))
        >>> product = Columns().product(matrix, None, torch.device("cpu"), torch.float32)
        >>> product(torch.tensor([[5.0, 10.0]]))
        tensor([[20., 30.]])
    """

    tolerance: float = 1e-5
    unasked: bool = True
    device_types: tuple[str, ...] | None = None

    @abstractmethod
    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """None if it can run, else the reason why not, as a sentence without its subject and full stop.

        ``auto`` leaves a kernel out that gives a reason; a run that asked for it by name stops with the reason.

        Args:
            weights: a layer, a matrix to multiply with, or None to ask for the device alone.
            device: where.
            dtype: of the inputs and outputs.
            batch: streams at a time.
        """

    @abstractmethod
    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> Product:
        """Make ``y_NO = x_NI W' + bias`` ready to run.

        Args:
            matrix: W, [O, I], on any device.
            bias: [O], on any device, or None.
            device: of inputs and outputs.
            dtype: of inputs and outputs.

        Returns:
            A function of x [N, I] that gives y [N, O], for any N.
        """

    @abstractmethod
    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Recurrence:
        """Make the recurrence of a layer ready to run.

        Args:
            weights: of one direction, on any device; ``w_ih`` and ``b_ih`` are the product's.
            device: of inputs and outputs.
            dtype: of inputs and outputs.
        """

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """Make a whole layer ready to run; here, ``product`` and ``recurrence`` one after the other.

        Args:
            weights: of one direction, on any device.
            device: of inputs and outputs.
            dtype: of inputs and outputs.
        """
        product = self.product(weights.w_ih, weights.input_bias, device, dtype)
        return ComposedLayer(product, self.recurrence(weights, device, dtype))

    def stack(self, layers: Sequence[Layer]) -> Layer | None:
        """All layers of one direction in one call, for one stream; here None: they run one after the other.

        Args:
            layers: what ``layer`` gave, the first one first.

        Returns:
            A layer that is given x [T, I] and states [L, 1, ...], and returns as ``Layer.run``.
        """
        return None

    def network_step(self, table: Tensor | None, stack: Layer, decoder: Product | None) -> NetworkStep | None:
        """A step of a whole network in one call, for one stream; here None: its parts run one after the other.

        Args:
            table: the tokens' vectors [V, I]; None where the input is no token.
            stack: what ``stack`` gave.
            decoder: what ``product`` gave; None where the outputs are the layers'.

        Returns:
            A function of a token [1] or x [1, I], and the state [L, 1, ...], that gives y [1, O] and the new state.
        """
        return None

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """Make both directions of a bidirectional layer ready to run; here, one after the other.

        Args:
            forward: weights of the direction that runs from the first step to the last.
            backward: weights of the other, with ``reverse``.
            device: of inputs and outputs.
            dtype: of inputs and outputs.

        Returns:
            A layer whose states are [2, B, ...] and whose outputs are [N, 2 P], as ``OneAfterTheOther``.
        """
        return OneAfterTheOther(self.layer(forward, device, dtype), self.layer(backward, device, dtype))
