"""The recurrent half of a layer by itself, with gradients: what Deep Speech 2 has and ``nn.RNN`` has not.

``nn.RNN``, ``nn.GRU`` and ``nn.LSTM`` multiply by the input themselves. Here the product is given, so that a network
may normalise it, or share it between directions; and the clipped ReLU is a cell like the others.

Shapes: B batch, T time, H hidden units, G gates * H, D directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from srnn.cells import GATES, Cell, cell_step
from srnn.models.recurring_gpu import GpuRecurrence, product_dtype, runs_on_gpu

RecurringState = tuple[Tensor, ...]  # (h,), and (h, c) of an LSTM


def recur(
    u_TBG: Tensor, w_hh_GH: Tensor, state: RecurringState, cell: Cell = "clipped_relu"
) -> tuple[Tensor, RecurringState]:
    """A recurrence over given products with the input; gradients flow to all of them.

    On a CPU in torch's own operations. On a GPU each step is a product and one more kernel, replayed from CUDA graphs;
    gradients of gradients are not there.

    Args:
        u_TBG: products with the input, with what is added to them, in torch's order of gates. Dimensions between T and
            B, such as directions, are those that ``w_hh_GH`` has in front.
        w_hh_GH: the recurrent matrix.
        state: before the first step: h_BH, and an LSTM's c_BH.
        cell: the recurrence.

    Returns:
        y_TBH, and the state after the last step.

    Example:
        >>> import torch
        >>> y_TBH, state = recur(torch.randn(5, 2, 12), torch.randn(12, 4) / 4, (torch.zeros(2, 4),), "gru")
        >>> y_TBH.shape, torch.equal(y_TBH[-1], state[0])
        (torch.Size([5, 2, 4]), True)
    """
    if runs_on_gpu(u_TBG, w_hh_GH, state):
        return _on_gpu(u_TBG, w_hh_GH, state, cell)
    w_HG, outputs = w_hh_GH.mT, []
    for u_BG in u_TBG.unbind():
        state = cell_step(cell, u_BG, state[0] @ w_HG, state)
        outputs.append(state[0])
    return torch.stack(outputs), state


def _on_gpu(u_TBG: Tensor, w_hh_GH: Tensor, state: RecurringState, cell: Cell) -> tuple[Tensor, RecurringState]:
    products = product_dtype(u_TBG.device.type, u_TBG.dtype)
    keeps = torch.is_grad_enabled() and any(part.requires_grad for part in (u_TBG, w_hh_GH, *state))
    if u_TBG.dim() == 4:
        y_TDBH, *after = GpuRecurrence.apply(cell, products, keeps, u_TBG, w_hh_GH, *state)
        return y_TDBH, tuple(after)
    several = (part[None] for part in state)
    y_TDBH, *after = GpuRecurrence.apply(cell, products, keeps, u_TBG[:, None], w_hh_GH[None], *several)
    return y_TDBH[:, 0], tuple(part[0] for part in after)


class Recurring(nn.Module):
    """The recurrent half of a layer: matrices without biases, one for each direction; the directions are summed.

    Example:
        >>> import torch
        >>> layer = Recurring("clipped_relu", 8, bidirectional=True)
        >>> y_BTH, state = layer(torch.randn(2, 5, 8), torch.tensor([5, 3]))
        >>> y_BTH.shape
        torch.Size([2, 5, 8])

    Attributes:
        layer_type: what its matrices count as when they are pruned.

    Args:
        cell: the recurrence.
        hidden_size: H.
        bidirectional: whether there is a second direction, from the last step to the first.
    """

    layer_type = "recurrent"

    def __init__(self, cell: Cell, hidden_size: int, bidirectional: bool = False) -> None:
        super().__init__()
        self.cell, self.hidden_size, self.bidirectional = cell, hidden_size, bidirectional
        for name in ("weight_hh", "weight_hh_reverse")[: 2 if bidirectional else 1]:
            weight, most = torch.empty(GATES[cell] * hidden_size, hidden_size), hidden_size**-0.5  # torch's own
            self.register_parameter(name, nn.Parameter(nn.init.uniform_(weight, -most, most)))

    def forward(
        self, u_BTG: Tensor, lengths_B: Tensor, state: RecurringState | None = None
    ) -> tuple[Tensor, RecurringState]:
        """Run over sequences of different lengths.

        Args:
            u_BTG: products with the input, as for ``recur``.
            lengths_B: steps of each sequence; what comes after them may be any finite numbers.
            state: [D, B, H] each; None starts from zero.

        Returns:
            y_BTH, of which steps after a sequence's end mean nothing, and the state after the last step, which means
            something where all sequences are of full length.
        """
        if state is None:
            zero = u_BTG.new_zeros(2 if self.bidirectional else 1, len(u_BTG), self.hidden_size)
            state = (zero,) * (2 if self.cell == "lstm" else 1)
        weights: list[Tensor] = [weight for _, weight in self.named_parameters()]
        if not self.bidirectional:
            y_TBH, after = recur(u_BTG.transpose(0, 1), weights[0], tuple(part[0] for part in state), self.cell)
            return y_TBH.transpose(0, 1), tuple(part[None] for part in after)
        # Each sequence the other way round, up to its own end; both directions are one product a step.
        time_T = torch.arange(u_BTG.shape[1], device=u_BTG.device)
        mirror_BT = torch.where(time_T < lengths_B[:, None], lengths_B[:, None] - 1 - time_T, time_T)
        u_TDBG = torch.stack([u_BTG, _reordered(u_BTG, mirror_BT)]).permute(2, 0, 1, 3)
        y_TDBH, after = recur(u_TDBG, torch.stack(weights), state, self.cell)
        forward_BTH, mirrored_BTH = y_TDBH.permute(1, 2, 0, 3)
        return forward_BTH + _reordered(mirrored_BTH, mirror_BT), after

    def extra_repr(self) -> str:
        """Cell and size."""
        return f"{self.cell}, {self.hidden_size}{', bidirectional' if self.bidirectional else ''}"


def _reordered(x_BTG: Tensor, places_BT: Tensor) -> Tensor:
    return x_BTG.gather(1, places_BT[:, :, None].expand_as(x_BTG))
