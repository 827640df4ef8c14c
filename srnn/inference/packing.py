"""Packing: a network's weights -> non-zeros, the same for the packed file and for ``sparsify``.

A matrix is packed if its zeros make it smaller. ``pack`` and ``unpack`` (``unpacking``) turn a whole registered network
into a ``PackedModel`` and back; ``packed_file`` writes and reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from srnn.cells import CELL_TYPES, GATES, cell_of, gates_of
from srnn.errors import UserError
from srnn.formats import DTYPES, PACKED_STRUCTURES, PackedStructure, Values
from srnn.models.recurring import Recurring
from srnn.sparse import SparseMatrix, cheapest_structure, has_structure, packed_nbytes
from srnn.vocabulary import Vocabulary

WantedStructure = PackedStructure | Literal["auto"]
Energies = Mapping[str, Tensor]  # parameter name -> [columns], the mean square of what each column multiplies

# Not what derives from them.
_LAYERS: dict[Any, int] = {kind: GATES[c] for c, known in CELL_TYPES.items() for kind in (known.layer, known.single)}


def matrix_gates(name: str, module: nn.Module) -> int:
    """Gates that the rows of a module's matrix fall into."""
    if name.startswith("weight_hr"):
        return 1
    return _LAYERS.get(type(module)) or (gates_of(module) if type(module) is Recurring else 1)


class Packer:
    """Packs matrices one way, each of them once: a weight that two modules share is the same object in both.

    Args:
        structure: the blocks of every packed matrix; ``auto`` takes the fewest bytes for each.
        values: what non-zeros are stored as.
        energies: from ``record_inputs``; int8 scales are then chosen for the least error of the products.

    Raises:
        UserError: there is no such structure or type of values.
    """

    def __init__(self, structure: WantedStructure, values: Values, energies: Energies | None = None) -> None:
        if structure not in (*PACKED_STRUCTURES, "auto"):
            raise UserError(f"structure={structure!r}: there are auto, {', '.join(PACKED_STRUCTURES)}.")
        if values not in DTYPES:
            raise UserError(f"values={values!r}: there are {', '.join(DTYPES)}.")
        self.structure, self.values, self.energies = structure, values, energies or {}
        self._done: dict[tuple[str, int], SparseMatrix] = {}

    def is_worth(self, weight: Tensor, gates: int) -> bool:
        """Whether a matrix is smaller for its zeros, not only for the width of its values."""
        if weight.ndim != 2:
            return False
        return self._smaller_than(torch.empty((), dtype=DTYPES[self.values]).element_size(), weight, gates)

    def is_narrower(self, weight: Tensor, gates: int) -> bool:
        """Whether a file that holds it packed is smaller than one that holds it dense, in fp32."""
        return weight.ndim == 2 and self._smaller_than(4, weight, gates)

    def _smaller_than(self, width: int, weight: Tensor, gates: int) -> bool:
        structure = cheapest_structure(weight, self.values, gates)
        return packed_nbytes(weight, structure, self.values, gates) < width * weight.numel()

    def matrix(self, name: str, weight: Tensor, gates: int) -> SparseMatrix:
        """Pack a parameter.

        Args:
            name: of the parameter in its network.
            weight: [rows, columns].
            gates: that the rows fall into.

        Raises:
            UserError: it is not pruned in the blocks asked for, or a value is not finite in ``values``.
        """
        if (name, gates) not in self._done:
            # What has few zeros is packed for its values' width alone, whatever blocks others are pruned in.
            structure = self.structure if self.is_worth(weight, gates) else "auto"
            self._done[name, gates] = self._packed(name, weight.detach().float(), gates, structure)
        return self._done[name, gates]

    def _packed(self, name: str, weight: Tensor, gates: int, structure: WantedStructure) -> SparseMatrix:
        if structure != "auto" and not has_structure(weight, structure, self.values, gates):
            taken = packed_nbytes(weight, structure, self.values, gates)
            least = packed_nbytes(weight, "element", self.values, gates)
            raise UserError(
                f"{name} is not pruned in {structure} blocks: they would take {taken:,} bytes, its single "
                f"elements {least:,}. Use structure=element, or auto."
            )
        try:
            return SparseMatrix.from_dense(weight, structure, self.values, gates, self.energies.get(name))
        except ValueError as error:
            diverged = "the training has probably diverged"
            fp16 = f", at most 65,504: {diverged}; else use values=fp32 or bf16"
            raise UserError(f"{name} {error}{fp16 if self.values == 'fp16' else f': {diverged}'}.") from None


@dataclass(frozen=True)
class PackedModel:
    """A registered network as the packed file holds it.

    Attributes:
        model: the config that builds it, ``name`` and options.
        supplied: what a run supplied to build it, such as ``vocabulary_size``.
        matrices: name -> packed matrix.
        dense: name -> tensor left dense (biases, buffers, and matrices that packing would not shrink); fp32, but for
            buffers that fp32 cannot hold.
        vocabulary: of a language model; else None.
        about: free-form facts of the run (metrics, sparsity); plain data.
        tied: name -> the name whose weight it shares; stored once.
    """

    model: dict[str, Any]
    supplied: dict[str, Any]
    matrices: dict[str, SparseMatrix]
    dense: dict[str, Tensor]
    vocabulary: Vocabulary | None = None
    about: dict[str, Any] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """All weights, dense, fp32, and buffers, under the model's own names."""
        once = self.dense | {name: matrix.to_dense() for name, matrix in self.matrices.items()}
        return once | {name: once[source] for name, source in self.tied.items()}

    @property
    def allowance(self) -> int:
        """Bytes that the dense network may take: 1,000 times those held (99.9 % zeros), and 64 MiB."""
        return 1000 * sum(t.numel() * t.element_size() for t in self.tensors().values()) + (64 << 20)

    @property
    def calls(self) -> int:
        """Calls to torch that building the network may take: 100 a tensor held, and 2,000."""
        return 2000 + 100 * len(self.tensors())

    @property
    def nonzeros(self) -> dict[str, int]:
        """Matrix name -> stored entries; of blocks all, whatever their value."""
        return {name: matrix.entries for name, matrix in self.matrices.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything the file stores, by the name it stores it under."""
        return self.dense | {f"{name}.{part}": t for name, m in self.matrices.items() for part, t in m.parts.items()}


def pack(
    module: nn.Module,
    model: Mapping[str, Any],
    supplied: Mapping[str, Any],
    values: Values = "fp32",
    structure: WantedStructure = "auto",
    energies: Energies | None = None,
) -> PackedModel:
    """Pack a registered network: each matrix that gets smaller for its zeros.

    Vocabulary and facts are added by ``dataclasses.replace(packed, vocabulary=..., about=...)``.

    Args:
        module: the network, dense.
        model: the config that builds it.
        supplied: what the run supplied to build it.
        values: what non-zeros are stored as.
        structure: the blocks of every packed matrix; ``auto`` takes the fewest bytes for each.
        energies: from ``record_inputs``, for int8.

    Raises:
        UserError: a weight is not finite, too large for fp16 values, or not pruned in these blocks.
    """
    packer = Packer(structure, values, energies)
    gates = {
        f"{prefix}.{name}" if prefix else name: matrix_gates(name, child)
        for prefix, child in module.named_modules()
        for name, _ in child.named_parameters(recurse=False)
    }
    matrices, dense, tied = {}, {}, tied_names(module)
    for name, tensor in module.state_dict().items():
        if name in tied:
            continue
        if not isinstance(tensor, Tensor):
            raise UserError(f"{name} is a {type(tensor).__name__}: a packed file holds tensors only, no extra state.")
        if name not in gates:
            dense[name] = _buffer(tensor.detach().cpu())
            continue
        weight, parts = tensor.detach().cpu().float(), gates[name]
        if packer.is_narrower(weight, parts):
            matrices[name] = packer.matrix(name, weight, parts)
        else:
            dense[name] = weight.contiguous().clone()
    return PackedModel(dict(model), dict(supplied), matrices, dense, tied=tied)


def _buffer(tensor: Tensor) -> Tensor:
    """A buffer as it is stored: in fp32, as all versions read it, where that holds its numbers exactly."""
    if not tensor.is_complex():
        wide = tensor.float()
        same = (wide.to(tensor.dtype) == tensor) | (tensor != tensor)  # NaN is not equal to itself
        if bool(same.all()):
            return wide.contiguous().clone()
    return tensor.contiguous().clone()


def recurrent_layers(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of each recurrent layer -> what its weights' names and shapes do not tell: ``cell``, ``batch_first``."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.RNNBase):
            found[name] = {"cell": cell_of(layer), "batch_first": layer.batch_first}
        elif isinstance(layer, nn.RNNCell):
            found[name] = {"cell": layer.nonlinearity}
        elif type(layer) is Recurring:
            found[name] = {"cell": layer.cell}
    return found


def tied_names(module: nn.Module) -> dict[str, str]:
    """Name of each parameter that is another one's -> that one's name."""
    first: dict[int, str] = {}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if first.setdefault(id(parameter), name) != name
    }
