"""A network as a chain: embedding, recurrent layers with their states, linear layers, activations, as plain data.

What an export writes is made of this. The weights are those of the modules: dense tensors, or packed matrices of
sparse ones.

Shapes: V tokens, E width of a token's vector, I inputs, O outputs, H hidden units, P outputs of a recurrent layer (H,
or an LSTM's projection), G = gates * H, L layers times directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from srnn.cells import Cell, cell_of
from srnn.errors import UserError
from srnn.inference.base import SparseModule
from srnn.inference.left_dense import unmasked, why_dense
from srnn.inference.modules import SparseEmbedding, SparseLinear
from srnn.inference.sparse_cell import SparseCell
from srnn.inference.sparse_recurrent import SparseRecurrent
from srnn.sparse import SparseMatrix

ChainWeight = Tensor | SparseMatrix  # dense fp32 on the CPU, or packed
ActivationKind = Literal["relu", "tanh", "sigmoid", "softmax", "log_softmax"]
ACTIVATIONS: dict[type[nn.Module], ActivationKind] = {
    nn.ReLU: "relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softmax: "softmax",
    nn.LogSoftmax: "log_softmax",
}
# What does nothing to a trained network.
_NOTHING = (nn.Dropout, nn.Identity)


@dataclass(frozen=True)
class EmbeddingPart:
    """Tokens -> their vectors.

    Attributes:
        name: of the module, as an identifier.
        weight: [V, E].
    """

    name: str
    weight: ChainWeight


@dataclass(frozen=True)
class Direction:
    """One direction of one recurrent layer, with torch's gate order and meaning.

    Attributes:
        w_ih: [G, I].
        w_hh: [G, P].
        b_ih: [G], or None.
        b_hh: [G], or None.
        w_hr: [P, H], an LSTM's projection, or None.
    """

    w_ih: ChainWeight
    w_hh: ChainWeight
    b_ih: Tensor | None = None
    b_hh: Tensor | None = None
    w_hr: ChainWeight | None = None


@dataclass(frozen=True)
class RecurrentPart:
    """Recurrent layers one on top of the other: one module of torch's.

    Attributes:
        name: of the module, as an identifier.
        cell: the recurrence.
        layers: for each layer its directions: the forward one, and the backward one where it is bidirectional.
    """

    name: str
    cell: Cell
    layers: tuple[tuple[Direction, ...], ...]

    @property
    def directions(self) -> int:
        """1, or 2 of a bidirectional one."""
        return len(self.layers[0])

    @property
    def input_size(self) -> int:
        """I of the first layer."""
        return int(self.layers[0][0].w_ih.shape[1])

    @property
    def output_size(self) -> int:
        """P, of a direction."""
        return int(self.layers[0][0].w_hh.shape[1])

    @property
    def hidden_size(self) -> int:
        """H."""
        projection = self.layers[0][0].w_hr
        return self.output_size if projection is None else int(projection.shape[1])

    @property
    def states(self) -> dict[str, tuple[int, int]]:
        """Name of each state -> (L, P), or (L, H) for an LSTM's cell state; streams lie between, as in torch."""
        count = len(self.layers) * self.directions
        found = {f"{self.name}_h": (count, self.output_size)}
        return found | ({f"{self.name}_c": (count, self.hidden_size)} if self.cell == "lstm" else {})


@dataclass(frozen=True)
class LinearPart:
    """``x W' + bias``, over the last dimension.

    Attributes:
        name: of the module, as an identifier.
        weight: [O, I].
        bias: [O], or None.
    """

    name: str
    weight: ChainWeight
    bias: Tensor | None = None


@dataclass(frozen=True)
class ActivationPart:
    """An activation; softmax is over the last dimension.

    Attributes:
        name: of the module, as an identifier.
        kind: which.
    """

    name: str
    kind: ActivationKind


ChainPart = EmbeddingPart | RecurrentPart | LinearPart | ActivationPart


@dataclass(frozen=True)
class Chain:
    """Parts one after the other.

    Attributes:
        parts: in the order they run.
        batch_first: inputs and outputs are [B, T, ...], else [T, B, ...].
        last_only: what follows the recurrent layers reads their final state, [B, D * P], not every step: there is one
            output a sequence.
    """

    parts: tuple[ChainPart, ...]
    batch_first: bool
    last_only: bool = False

    @property
    def recurrent(self) -> tuple[RecurrentPart, ...]:
        """Its recurrent parts."""
        return tuple(part for part in self.parts if isinstance(part, RecurrentPart))

    @property
    def states(self) -> dict[str, tuple[int, int]]:
        """All states, as ``RecurrentPart.states``."""
        return {name: sizes for part in self.recurrent for name, sizes in part.states.items()}

    @property
    def bidirectional(self) -> bool:
        """Whether a part reads the sequence from its end, too, so that it cannot run step by step."""
        return any(part.directions > 1 for part in self.recurrent)

    @property
    def vocabulary_size(self) -> int | None:
        """V, where inputs are tokens; None where they are vectors."""
        first = self.parts[0]
        return int(first.weight.shape[0]) if isinstance(first, EmbeddingPart) else None

    @property
    def input_size(self) -> int:
        """I, of vectors that come in; 1 for tokens."""
        first = next((p for p in self.parts if not isinstance(p, ActivationPart)), None)
        if isinstance(first, LinearPart):
            return int(first.weight.shape[1])
        return first.input_size if isinstance(first, RecurrentPart) else 1


def dense_weight(weight: ChainWeight) -> Tensor:
    """A weight as a dense tensor, fp32."""
    return weight.to_dense() if isinstance(weight, SparseMatrix) else weight


def layers_of(model: nn.Module) -> tuple[tuple[ChainPart, ...], bool]:
    """The layers of a network in the order it holds them, and whether they are batch first.

    Whether that is also the order in which it runs them only running it can tell: see ``read_chain``.

    Raises:
        UserError: a layer is none that a chain can hold; names it.
    """
    parts: list[ChainPart] = []
    layouts: dict[bool, str] = {}
    for name, module in _leaves("", model):
        part = _part(name, module, {p.name for p in parts})
        if isinstance(part, EmbeddingPart) and parts:
            raise UserError(f"{name} is an embedding behind other layers: a chain starts with it.")
        if isinstance(part, RecurrentPart):
            layouts.setdefault(bool(module.batch_first), name)
        parts.append(part)
    if not layouts:
        raise UserError(f"{type(model).__name__} holds no recurrent layer.")
    if len(layouts) == 2:
        raise UserError(f"{layouts[True]} has batch_first=True and {layouts[False]} not: a chain has one layout.")
    return tuple(parts), next(iter(layouts))


def _leaves(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, _NOTHING):
        return
    if isinstance(module, SparseCell | nn.RNNCellBase):
        name = prefix or type(module).__name__
        raise UserError(f"{name} is a single cell: a chain is made of whole layers, nn.GRU in place of nn.GRUCell.")
    if isinstance(module, SparseModule) or type(module) in ACTIVATIONS:
        yield prefix, module
        return
    plain = unmasked(module)
    reason = why_dense(plain)
    if reason is None:
        yield prefix, plain
        return
    if not module._modules or module._parameters or is_parametrized(module):
        name = prefix or type(module).__name__
        raise UserError(f"{name} {reason.replace('sparse counterpart', 'place in a chain of layers')}.")
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _leaves(f"{prefix}.{child_name}" if prefix else child_name, child)


def _part(path: str, module: nn.Module, taken: set[str]) -> ChainPart:
    kind: Any = type(module)
    if isinstance(module, SparseEmbedding) or kind is nn.Embedding:
        return EmbeddingPart(_identifier(path, "embedding", taken), _weight(module, "weight"))
    if isinstance(module, SparseLinear) or kind is nn.Linear:
        name = _identifier(path, "linear", taken)
        return LinearPart(name, _weight(module, "weight"), _tensor(module, "bias"))
    if kind in ACTIVATIONS:
        if ACTIVATIONS[kind].endswith("softmax") and module.dim not in (-1, 1, 2):
            raise UserError(f"{path} has dim={module.dim}: in a chain softmax is over the last dimension, dim=-1.")
        return ActivationPart(_identifier(path, ACTIVATIONS[kind], taken), ACTIVATIONS[kind])
    return _recurrent(path, module, taken)


def _recurrent(path: str, module: Any, taken: set[str]) -> RecurrentPart:
    cell: Cell = module.cell if isinstance(module, SparseRecurrent) else cell_of(module)
    endings = ["", "_reverse"] if module.bidirectional else [""]
    layers = tuple(
        tuple(
            Direction(
                _weight(module, f"weight_ih_l{layer}{ending}"),
                _weight(module, f"weight_hh_l{layer}{ending}"),
                _tensor(module, f"bias_ih_l{layer}{ending}"),
                _tensor(module, f"bias_hh_l{layer}{ending}"),
                _weight(module, f"weight_hr_l{layer}{ending}") if module.proj_size else None,
            )
            for ending in endings
        )
        for layer in range(module.num_layers)
    )
    kind = cell if cell in ("gru", "lstm") else "rnn"
    return RecurrentPart(_identifier(path, kind, taken), cell, layers)


def _weight(module: nn.Module, name: str) -> ChainWeight:
    if isinstance(module, SparseModule) and name in module.matrices():
        return module.matrices()[name].to("cpu")
    tensor = _tensor(module, name)
    assert tensor is not None
    return tensor


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    tensor = getattr(module, name, None)
    return None if tensor is None else tensor.detach().cpu().float().contiguous()


def _identifier(path: str, kind: str, taken: set[str]) -> str:
    """A name that is an identifier in any language, and not taken."""
    name = re.sub(r"\W", "_", path, flags=re.ASCII) or kind
    name = f"{kind}_{name}" if name[0].isdigit() else name
    while name in taken:
        name += "_"
    return name
