"""The recurrent cells: what each is called, torch's classes for it, and the gates that its matrices stack.

A new cell is a row of ``CELL_TYPES``; its arithmetic stands in ``cell_step`` and in each backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

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
    """Gates that a module's recurrent matrices stack: of torch's layers and single cells, of a derived class too.

    Another module says by its attribute ``cell`` which recurrence its ``weight_ih*`` and ``weight_hh*`` are of; 1
    without.
    """
    for cell, kind in CELL_TYPES.items():
        if kind.layer is not None and kind.single is not None and isinstance(module, kind.layer | kind.single):
            return GATES[cell]
    own: Any = getattr(module, "cell", None)
    return GATES.get(own, 1)


def cell_step(
    cell: Cell, u_BG: Tensor, v_BG: Tensor, state: tuple[Tensor, ...], new_bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The state after a step; an LSTM's h is not projected yet.

    Args:
        cell: the recurrence.
        u_BG: product with the input, with its bias.
        v_BG: product with h.
        state: before.
        new_bias: [H], of a GRU.
    """
    if cell == "gru":
        (h_BH,) = state
        u_r, u_z, u_n = u_BG.chunk(3, dim=-1)
        v_r, v_z, v_n = v_BG.chunk(3, dim=-1)
        z_BH = torch.sigmoid(u_z + v_z)
        n_BH = torch.tanh(u_n + torch.sigmoid(u_r + v_r) * (v_n if new_bias is None else v_n + new_bias))
        return ((1 - z_BH) * n_BH + z_BH * h_BH,)
    if cell == "lstm":
        i_BH, f_BH, g_BH, o_BH = (u_BG + v_BG).chunk(4, dim=-1)
        c_BH = torch.sigmoid(f_BH) * state[1] + torch.sigmoid(i_BH) * torch.tanh(g_BH)
        return torch.sigmoid(o_BH) * torch.tanh(c_BH), c_BH
    a_BH = u_BG + v_BG
    if cell == "tanh":
        return (a_BH.tanh(),)
    return (a_BH.relu(),) if cell == "relu" else (a_BH.clamp(0, CLIP),)
