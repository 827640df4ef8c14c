"""How weights are kept, zeroed and stored: the one place that names structures and types of values.

A *unit* is what a mask decides on: one weight, or one block N x M, or N of every M weights. Weights are looked at as
``[gates, rows, columns]``, so that a block never crosses a gate; a convolution's columns are its input channels and
kernel, flattened. Where sizes do not divide, the last block of a gate or row is smaller; a block of more rows than a
gate has is a column of it.

Pruning takes every ``Structure``. A packed matrix stores those of ``PACKED_STRUCTURES``, with ``DTYPES`` as values.

Shapes: G gates, R rows of a gate, C columns, U units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.errors import UserError

Values = Literal["fp32", "fp16", "bf16", "int8"]
PackedStructure = Literal["element", "4x1", "8x1", "16x1", "32x1"]
PACKED_STRUCTURES: tuple[PackedStructure, ...] = get_args(PackedStructure)
DTYPES: dict[Values, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}

Shape = tuple[int, int, int]  # [G, R, C]


@dataclass(frozen=True)
class Structure:
    """Blocks of ``rows`` consecutive outputs by ``columns`` consecutive inputs; or ``keep`` of every ``of`` inputs.

    ``str(structure)`` is its spelling: ``element``, ``16x1``, ``4x4``, ``2:4``.

    Example:
        >>> block = Structure.parse("16x1")
        >>> block.block, block.units((3, 256, 64))
        (16, 3072)
        >>> Structure.parse("2:4")
        Structure(rows=1, columns=1, keep=2, of=4)

    Attributes:
        rows: N of a block, consecutive output units of one gate.
        columns: M of a block, consecutive inputs.
        keep: how many weights stay of each run of N:M; 0 for blocks.
        of: how many consecutive inputs a run has; 0 for blocks.
    """

    rows: int = 1
    columns: int = 1
    keep: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str, key: str = "pruning.structure") -> Structure:
        """Read a spelling.

        Args:
            text: ``element``, ``16x1``, ``4x4``, ``2:4``.
            key: the config key, for messages.

        Raises:
            UserError: it is none.
        """
        if text == "element":
            return cls()
        if block := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", str(text)):
            return cls(int(block[1]), int(block[2]))
        if (share := re.fullmatch(r"([1-9]\d?):([1-9]\d?)", str(text))) and int(share[1]) < int(share[2]):
            return cls(keep=int(share[1]), of=int(share[2]))
        raise UserError(
            f"{key}={text!r} must be element, a block of rows x columns such as 16x1 or 4x4, or a share such as "
            f"'2:4' (2 of every 4 weights of a row are kept)."
        )

    def __str__(self) -> str:
        if self.of:
            return f"{self.keep}:{self.of}"
        return "element" if self.block == 1 else f"{self.rows}x{self.columns}"

    @property
    def block(self) -> int:
        """Weights in a whole block."""
        return self.rows * self.columns

    def grid(self, shape: Shape) -> Shape:
        """Units of a weight: [G, block rows, block columns]."""
        gates, rows, columns = shape
        return gates, -(-rows // self.rows), -(-columns // self.columns)

    def extent(self, shape: Shape) -> tuple[int, int]:
        """Rows and columns of the largest unit of a weight: of a whole block, where one fits."""
        return min(self.rows, shape[1]), min(self.columns, shape[2])

    def units(self, shape: Shape) -> int:
        """How many units a weight has."""
        gates, rows, columns = self.grid(shape)
        return gates * rows * columns

    def fits(self, shape: Shape) -> bool:
        """Whether a whole block, or a whole run of M weights, lies inside."""
        return shape[1] >= self.rows and shape[2] >= max(self.columns, self.of)

    def is_even(self, shape: Shape) -> bool:
        """Whether all its units are of the same size."""
        return shape[1] % self.rows == 0 and shape[2] % self.columns == 0

    def sums(self, x_GRC: Tensor) -> Tensor:
        """Of each unit, [U]."""
        return x_GRC.flatten() if self.block == 1 else self._blocks(x_GRC).sum((2, 4)).flatten()

    def maxima(self, x_GRC: Tensor) -> Tensor:
        """Of each unit, [U]; of what is not negative, as cut-off blocks are filled up with zeros."""
        return x_GRC.flatten() if self.block == 1 else self._blocks(x_GRC).amax((2, 4)).flatten()

    def _blocks(self, x_GRC: Tensor) -> Tensor:
        shape = (x_GRC.shape[0], x_GRC.shape[1], x_GRC.shape[2])
        (gates, rows, columns), (tall, wide) = self.grid(shape), self.extent(shape)
        missing = (0, columns * wide - shape[2], 0, rows * tall - shape[1])
        padded = F.pad(x_GRC, missing) if any(missing) else x_GRC
        return padded.reshape(gates, rows, tall, columns, wide)

    def sizes(self, shape: Shape, device: torch.device | None = None) -> Tensor:
        """Weights in each unit, int64 [U]."""
        _, rows, columns = self.grid(shape)
        # Only the last block row and column can be cut off.
        tall = torch.full((rows,), self.rows, device=device)
        wide = torch.full((columns,), self.columns, device=device)
        tall[-1] -= rows * self.rows - shape[1]
        wide[-1] -= columns * self.columns - shape[2]
        return (tall[:, None] * wide).expand(shape[0], -1, -1).flatten()

    def spread(self, values_U: Tensor, shape: Shape) -> Tensor:
        """A value a unit -> the same value for each of its weights, [G, R, C]."""
        if self.block == 1:
            return values_U.view(shape)
        (gates, rows, columns), (tall, wide) = self.grid(shape), self.extent(shape)
        # Whole blocks of expanded views first, then cut off: one copy, and no index for each weight.
        blocks = values_U.view(gates, rows, 1, columns, 1).expand(gates, rows, tall, columns, wide)
        return blocks.reshape(gates, rows * tall, columns * wide)[:, : shape[1], : shape[2]]

    def protected(self, scores_U: Tensor, shape: Shape) -> Tensor | None:
        """Units that N:M leaves no choice about: the N best of each M weights of a row, bool [U]; None for blocks.

        Among equals the earlier are kept. A last share of fewer than M weights keeps N of them.
        """
        if not self.of:
            return None
        # Filled up with what no score is below, so that the last run keeps weights, not filling. A stable sort is what
        # lets the earlier of equals stay; topk promises no order.
        missing = -shape[2] % self.of
        runs = F.pad(scores_U.view(shape), (0, missing), value=-torch.inf).unflatten(2, (-1, self.of))
        best = runs.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
        chosen = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, best, True)
        return chosen.flatten(2)[..., : shape[2]].flatten()


def block_height(structure: str) -> int:
    """N of an N x 1 structure; 1 for ``element``. Raises ``ValueError`` for a name there is not."""
    if structure not in PACKED_STRUCTURES:
        raise ValueError(f"no structure {structure!r}; there are {', '.join(PACKED_STRUCTURES)}")
    return 1 if structure == "element" else int(structure.removesuffix("x1"))
