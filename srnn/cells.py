"""The recurrent cells: what each is called, torch's classes for it, and the gates that its matrices stack.

A new cell is a row of ``CELL_TYPES``; its arithmetic stands in ``kernels/reference.py`` and in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

Cell = Literal["tanh", "relu", "clipped_relu", "gru", "lstm"]
CLIP = 20.0  # of the clipped ReLU min(max(x, 0), 20) of Deep Speech 2 (Amodei et al., 2015)


@dataclass(frozen=True)
class CellType:
    """What is known of a cell.

    Attributes:
        letters: of its gates, in torch's order; empty where there is one only.
        mode: what torch's layer calls it, ``nn.RNNBase.mode``; None if torch has no such layer.
        layer: torch's layer of it.
        single: torch's module of a single step.
    """

    letters: str = ""
    mode: str | None = None
    layer: type[nn.RNNBase] | None = None
    single: type[nn.RNNCellBase] | None = None


CELL_TYPES: dict[Cell, CellType] = {
    "tanh": CellType("", "RNN_TANH", nn.RNN, nn.RNNCell),
    "relu": CellType("", "RNN_RELU", nn.RNN, nn.RNNCell),
    "clipped_relu": CellType(),
    "gru": CellType("rzn", "GRU", nn.GRU, nn.GRUCell),
    "lstm": CellType("ifgo", "LSTM", nn.LSTM, nn.LSTMCell),
}
CELLS: tuple[Cell, ...] = tuple(CELL_TYPES)
GATES: dict[Cell, int] = {cell: len(kind.letters) or 1 for cell, kind in CELL_TYPES.items()}
GATE_LETTERS: dict[int, str] = {GATES[cell]: kind.letters for cell, kind in CELL_TYPES.items()}  # by how many there are


def cell_of(layer: nn.RNNBase) -> Cell:
    """The cell of one of torch's recurrent layers.

    Example:
        >>> cell_of(nn.RNN(4, 8, nonlinearity="relu")), gates_of(nn.LSTMCell(4, 8))
        ('relu', 4)
    """
    return next(cell for cell, kind in CELL_TYPES.items() if kind.mode == layer.mode)


def gates_of(module: nn.Module) -> int:
    """Gates that the matrices of a torch layer or single cell stack, of a derived class too; 1 for any other module."""
    for cell, kind in CELL_TYPES.items():
        if kind.layer is not None and kind.single is not None and isinstance(module, kind.layer | kind.single):
            return GATES[cell]
    return 1
