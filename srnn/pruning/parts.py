"""The weights that are pruned: parameters, or gates of parameters, with their masks.

Shapes: G gates, R rows of a gate, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from srnn.cells import GATE_LETTERS
from srnn.formats import Shape

# Weights looked at together. A temporary of so many fp32 numbers takes 16 MB, however large a matrix is; smaller pieces
# would launch more kernels on a GPU, each with less to do.
PIECE = 1 << 22
_NAMED = 8  # in a message; a large model may have hundreds


def some_of(names: Sequence[str]) -> str:
    """The first names, for a message, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def count(flags: Tensor) -> Tensor:
    """How many are set, int64 []. In pieces: to add flags up, torch makes numbers of 8 bytes of them first."""
    return torch.stack([piece.sum() for piece in flags.flatten().split(PIECE)]).sum()


@dataclass
class Part:
    """A parameter, or some gates of one, with its mask.

    Attributes:
        parameter_name: in the model.
        parameter: the weights.
        mask: bool, of the parameter's shape, shared by its parts; True keeps the weight.
        layer_type: ``recurrent``, ``linear``, ``embedding``, ``convolution`` or ``other``.
        gates: of the parameter in all, at least 1.
        first: the part's first gate.
        count: how many gates it has.
        own: the settings that a pattern of the scope gave it.
        revived: how many weights came back so far, [count].
    """

    parameter_name: str
    parameter: nn.Parameter
    mask: Tensor
    layer_type: str
    gates: int
    first: int
    count: int
    own: frozenset[str] = frozenset()
    revived: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # On the mask's device, so that counting at an update does not wait for the GPU.
        self.revived = torch.zeros(self.count, dtype=torch.int64, device=self.mask.device)

    @property
    def name(self) -> str:
        """``rnn.weight_hh_l0``, or ``rnn.weight_hh_l0[z]`` for gates of it."""
        whole = self.count == self.gates
        return self.parameter_name if whole else f"{self.parameter_name}[{''.join(self.letters)}]"

    @property
    def letters(self) -> list[str]:
        """The names of its gates; one empty string where there are none."""
        letters = GATE_LETTERS[self.gates][self.first : self.first + self.count]
        return list(letters) or [""]

    @cached_property
    def shape(self) -> Shape:
        """[G, R, C] of this part."""
        rows = self.parameter.shape[0] // self.gates
        return self.count, rows, self.parameter.numel() // (rows * self.gates)

    @property
    def size(self) -> int:
        """Number of weights."""
        gates, rows, columns = self.shape
        return gates * rows * columns

    @property
    def is_square(self) -> bool:
        """Whether it is a recurrent matrix with a diagonal: unit to itself."""
        last = self.parameter_name.rpartition(".")[2]
        return "weight_hh" in last and self.shape[1] == self.shape[2]

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the parameter, its mask or its gradient, [G, R, C]; a view if the tensor is contiguous."""
        _, rows, columns = self.shape
        return tensor.reshape(self.gates, rows, columns)[self.first : self.first + self.count]

    def pieces(self, height: int) -> Iterator[Piece]:
        """The part in pieces of at most ``PIECE`` weights (or one block row), cut between block rows of ``height``."""
        gates, rows, columns = self.shape
        if self.size <= PIECE:
            yield Piece(self, 0, gates, 0, rows)
            return
        # Whole block rows, so that no block falls into two pieces.
        tall = max(height, PIECE // columns // height * height)
        for gate in range(gates):
            for row in range(0, rows, tall):
                yield Piece(self, gate, gate + 1, row, min(rows, row + tall))


@dataclass(frozen=True)
class Piece:
    """Rows ``top`` to ``bottom`` of gates ``first`` to ``last`` of a part; the last of each is outside."""

    part: Part
    first: int
    last: int
    top: int
    bottom: int

    @property
    def shape(self) -> Shape:
        """[G, R, C]."""
        return self.last - self.first, self.bottom - self.top, self.part.shape[2]

    @property
    def key(self) -> str:
        """Names it, in any process: what is random depends on it, and on nothing a process chooses."""
        return f"{self.part.name}/{self.first}/{self.top}"

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of the parameter, its mask or its gradient, [G, R, C]; a view if the tensor is contiguous."""
        return self.part.of(tensor)[self.first : self.last, self.top : self.bottom]

    @property
    def weight(self) -> Tensor:
        """Its weights, without history."""
        return self.of(self.part.parameter.detach())

    @property
    def mask(self) -> Tensor:
        """Its mask, to write to."""
        return self.of(self.part.mask)

    def diagonal(self) -> Tensor:
        """1 where a unit meets itself, else 0, [G, R, C]."""
        rows = torch.arange(self.top, self.bottom, device=self.part.mask.device)
        eye = rows[:, None] == torch.arange(self.shape[2], device=rows.device)
        return eye.expand(self.shape).float()

    def scale(self, factor_GRC: Tensor) -> None:
        """Multiply its weights in place."""
        parameter = self.part.parameter.detach()
        # ``of`` is a copy of what is not contiguous, such as a convolution in channels_last: scale it, and copy back.
        if parameter.is_contiguous():
            self.of(parameter).mul_(factor_GRC)
        else:
            whole = parameter.contiguous()
            self.of(whole).mul_(factor_GRC)
            parameter.copy_(whole)
