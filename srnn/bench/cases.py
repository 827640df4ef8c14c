"""What is timed: one layer or one product, with random weights pruned to order."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from srnn.cells import GATES, Cell
from srnn.errors import UserError
from srnn.kernels.choosing import zero_state
from srnn.kernels.contract import Kernel, LayerWeights, equal_lengths
from srnn.kernels.reference import run_layer
from srnn.kernels.timing import Call
from srnn.sparse import PACKED_STRUCTURES, PackedStructure, SparseMatrix, Values

_SHAPES = "gru:2560, lstm:1500, tanh:1760 (one layer with as many inputs), or product:7680x2560"


@dataclass(frozen=True)
class LayerShape:
    """A layer, or a product with a matrix [outputs, inputs].

    Attributes:
        kind: a cell, or ``product``.
        inputs: I.
        outputs: H, or rows of the product's matrix.
    """

    kind: Cell | Literal["product"]
    inputs: int
    outputs: int

    @classmethod
    def parse(cls, text: str) -> LayerShape:
        """``gru:2560`` or ``product:7680x2560``. Raises UserError."""
        kind, _, size = text.partition(":")
        numbers = size.split("x")
        if kind not in (*GATES, "product") or not all(n.isdigit() and 0 < int(n) < 1 << 20 for n in numbers):
            raise UserError(f"shapes={text}: a shape is {_SHAPES}.")
        if len(numbers) != (2 if kind == "product" else 1):
            raise UserError(f"shapes={text}: a shape is {_SHAPES}.")
        return cls(kind, int(numbers[-1]), int(numbers[0]))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.outputs}x{self.inputs}" if self.kind == "product" else f"{self.kind}:{self.outputs}"


@dataclass(frozen=True)
class Format:
    """How weights are pruned and stored."""

    sparsity: float
    structure: PackedStructure
    values: Values

    def __str__(self) -> str:
        return f"{100 * self.sparsity:g} % {self.structure} {self.values}"


FLOAT_DTYPES: dict[Values, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dense_format(dtype: torch.dtype) -> Format:
    """Of the dense baselines, which compute in the dtype of the inputs."""
    return Format(0.0, "element", next(name for name, other in FLOAT_DTYPES.items() if other == dtype))


@dataclass(frozen=True)
class Case:
    """What is measured in one go, dense and sparse in turns.

    Attributes:
        shape: the layer or product.
        batch: streams, or columns of the product.
        steps: of a sequence; 1 for streaming and for products.
        threads: of the CPU.
    """

    shape: LayerShape
    batch: int
    steps: int
    threads: int

    def __str__(self) -> str:
        steps = "" if self.shape.kind == "product" else f" T={self.steps}"
        return f"{self.shape} B={self.batch}{steps} threads={self.threads}"


def pruned(rows: int, columns: int, gates: int, format: Format, generator: torch.Generator) -> Tensor:
    """A random matrix with so many blocks of its structure zero, to the nearest block."""
    height = 1 if format.structure == "element" else int(format.structure.removesuffix("x1"))
    per_gate = math.ceil(rows // gates / height)
    device = generator.device
    scores = torch.rand(gates * per_gate, columns, generator=generator, dtype=torch.float64, device=device)
    zeros = round(format.sparsity * scores.numel())
    kept = scores > _smallest(scores, zeros) if zeros else scores >= 0
    units = kept.view(gates, per_gate, columns).repeat_interleave(height, dim=1)[:, : rows // gates]
    weight = torch.randn(rows, columns, generator=generator, device=device) / math.sqrt(
        columns * max(0.01, 1 - format.sparsity)
    )
    return weight * units.reshape(rows, columns)


def _smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest; torch selects it slowly on a GPU."""
    flat = scores.flatten()
    return flat.sort().values[k - 1] if flat.is_cuda else flat.kthvalue(k).values


@dataclass
class Problem:
    """A case with weights of one format: calls to time, and the truth to compare with."""

    case: Case
    format: Format
    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0
    weights: Any = field(init=False)

    def __post_init__(self) -> None:
        shape, generator = self.case.shape, torch.Generator(self.device).manual_seed(self.seed)

        def matrix(rows: int, columns: int, gates: int) -> SparseMatrix:
            dense = pruned(rows, columns, gates, self.format, generator)
            return SparseMatrix.from_dense(dense, self.format.structure, self.format.values, gates)

        if shape.kind == "product":
            self.weights = matrix(shape.outputs, shape.inputs, 1)
        else:
            gates = GATES[shape.kind]
            rows = gates * shape.outputs
            bias = torch.randn(2, rows, generator=generator, device=self.device) * 0.1
            w_ih, w_hh = matrix(rows, shape.inputs, gates), matrix(rows, shape.outputs, gates)
            self.weights = LayerWeights(shape.kind, w_ih, w_hh, bias[0], bias[1])

    def inputs(self, steps: int) -> Tensor:
        """Random rows, the same each time."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        rows = torch.randn(steps * self.case.batch, self.case.shape.inputs, generator=generator)
        return rows.to(self.device, self.dtype)

    def prepare(self, kernel: Kernel) -> Callable[[int], Call]:
        """Steps -> a call that runs so many and returns the outputs."""
        if isinstance(self.weights, SparseMatrix):
            product = kernel.product(self.weights, None, self.device, self.dtype)
            return lambda steps: partial(product, self.inputs(steps))
        layer = kernel.layer(self.weights, self.device, self.dtype)
        state = zero_state(self.weights, self.case.batch, self.device, self.dtype)

        def run(x_NI: Tensor, sizes: Tensor) -> Tensor:
            return layer.run(x_NI, sizes, state)[0]

        return lambda steps: partial(run, self.inputs(steps), equal_lengths(steps, self.case.batch))

    def truth(self, steps: int) -> Tensor:
        """The outputs in float64, of the same rounded weights and inputs."""
        x = self.inputs(steps).double()
        if isinstance(self.weights, SparseMatrix):
            return x @ self.weights.to_dense().to(x).T
        weights = self.weights.to(self.device)
        state = zero_state(weights, self.case.batch, self.device, torch.float64)
        return run_layer(weights, x, equal_lengths(steps, self.case.batch), state)[0]


@dataclass(frozen=True)
class LayerPlan:
    """All layers and products that one ``bench`` is to measure, and how they are pruned and stored."""

    shapes: tuple[LayerShape, ...]
    sparsities: tuple[float, ...] = (0.8, 0.9, 0.95)
    structures: tuple[PackedStructure, ...] = ("element", "16x1")
    values: tuple[Values, ...] = ("fp32",)
    batches: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    steps: int = 100
    dtype: torch.dtype = torch.float32

    def cases(self) -> Iterator[Case]:
        """Smallest number of streams first, so that a limit leaves out the least interesting."""
        for batch in self.batches:
            for shape in self.shapes:
                for threads in self.threads:
                    yield Case(shape, batch, 1 if shape.kind == "product" else self.steps, threads)

    def formats(self) -> list[Format]:
        """Sparsest last."""
        return [Format(s, t, v) for s in self.sparsities for t in self.structures for v in self.values]


def check_structures(names: tuple[str, ...]) -> None:
    """Raises UserError for a name there is not."""
    for name in names:
        if name not in PACKED_STRUCTURES:
            raise UserError(f"structure={name}: there are {', '.join(PACKED_STRUCTURES)}.")


_GPU_SHAPES = ("gru:2560", "gru:1024", "gru:1760", "gru:3568", "lstm:1500", "tanh:1760", "tanh:3072")
LAYER_PLANS = {
    "paper": LayerPlan(
        tuple(map(LayerShape.parse, ("gru:2560", "gru:1024", "lstm:1500", "tanh:1760"))),
        values=("fp32", "fp16", "int8"),
        batches=(1, 4, 16),
        threads=(1, 2),
    ),
    "deepbench": LayerPlan(
        tuple(map(LayerShape.parse, ("product:7680x2560", "product:10752x3584"))),
        sparsities=(0.9, 0.95),
        values=("fp32", "fp16"),
        batches=(1, 4, 1500, 6000),
    ),
    "gpu": LayerPlan(
        tuple(map(LayerShape.parse, _GPU_SHAPES)),
        sparsities=(0.9, 0.95),
        structures=("element", "16x1", "32x1"),
        values=("fp16",),
        batches=(1, 16, 64),
        steps=256,
        dtype=torch.float16,
    ),
}
