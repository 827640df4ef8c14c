"""The sparse counterpart of ``models.recurring.Recurring``.

Shapes: T steps, B streams, N rows, H hidden units, G gates * H, D directions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from srnn.cells import GATES
from srnn.inference.autocast import is_autocast, without_autocast
from srnn.inference.base import SparseModule, Weights, no_grad, refuse_tracing, without_gradient
from srnn.kernels.contract import Kernel, LayerWeights, Recurrence, equal_lengths
from srnn.models.recurring import Recurring, RecurringState


class SparseRecurring(SparseModule):
    """The recurrent half of a layer on sparse kernels: the same call, outputs and states."""

    def __init__(self, original: Recurring, weights: Weights, kernel: Kernel) -> None:
        super().__init__(kernel, weights)
        self.cell, self.hidden_size, self.bidirectional = original.cell, original.hidden_size, original.bidirectional
        self.describe()

    def forward(
        self, u_BTG: Tensor, lengths_B: Tensor, state: RecurringState | None = None
    ) -> tuple[Tensor, RecurringState]:
        """As ``Recurring``; what comes after a sequence's end is 0."""
        refuse_tracing()
        if is_autocast(u_BTG):
            return without_autocast(self.forward, u_BTG, lengths_B, state)
        self._check_shapes(u_BTG, lengths_B, state)
        if state is None:
            zero = u_BTG.new_zeros(2 if self.bidirectional else 1, len(u_BTG), self.hidden_size)
            state = (zero,) * (2 if self.cell == "lstm" else 1)
        y_BTH, *after = self._outputs([u_BTG, lengths_B, *state])
        return y_BTH, tuple(after)

    def _check_shapes(self, u_BTG: Tensor, lengths_B: Tensor, state: RecurringState | None) -> None:
        """Raises RuntimeError of what kernels would read beyond its end."""
        products = GATES[self.cell] * self.hidden_size
        if u_BTG.dim() != 3 or u_BTG.shape[2] != products or lengths_B.shape != u_BTG.shape[:1]:
            raise RuntimeError(
                f"products must have shape [streams, steps, {products}], and lengths be as many as streams, not "
                f"{tuple(u_BTG.shape)} with lengths of {tuple(lengths_B.shape)}"
            )
        shape = (2 if self.bidirectional else 1, len(u_BTG), self.hidden_size)
        wanted = [shape] * (2 if self.cell == "lstm" else 1)
        given = wanted if state is None else [tuple(part.shape) for part in state]
        if given != wanted:
            raise RuntimeError(f"the state must have shape {wanted}, not {given}")

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """y_BTH and the state."""
        self.follow()
        u_BTG, lengths_B, *state = inputs
        lengths_B = lengths_B.cpu()
        if bool((lengths_B == u_BTG.shape[1]).all()):
            return self._all_of_one_length(u_BTG, state)
        with no_grad():
            rows = pack_padded_sequence(u_BTG, lengths_B, batch_first=True, enforce_sorted=False)
            order, back = rows.sorted_indices, rows.unsorted_indices
            assert order is not None
            assert back is not None
            ys, ends = [], []
            for d, recurrence in enumerate(self._recurrences(u_BTG)):
                begin = tuple(part[d].index_select(0, order) for part in state)
                y_NH, end = recurrence(rows.data, rows.batch_sizes, begin)
                if self.recorder is not None:
                    self.recorder(self._names[d], torch.cat([begin[0], y_NH]))
                ys.append(y_NH)
                ends.append(tuple(part.index_select(0, back) for part in end))
            packed = PackedSequence(ys[0] if len(ys) == 1 else ys[0] + ys[1], rows.batch_sizes, order, back)
            y_BTH, _ = pad_packed_sequence(packed, batch_first=True, total_length=u_BTG.shape[1])
        after = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return tuple(without_gradient(tensor, u_BTG, *state) for tensor in (y_BTH, *after))

    def _all_of_one_length(self, u_BTG: Tensor, state: list[Tensor]) -> tuple[Tensor, ...]:
        """As ``compute``, without putting sequences in order, which takes longer than a few steps of a stream."""
        streams, steps, _ = u_BTG.shape
        with no_grad():
            u_NG, sizes = u_BTG.transpose(0, 1).flatten(0, 1), equal_lengths(steps, streams)
            y_NH, ends = None, []
            for d, recurrence in enumerate(self._recurrences(u_BTG)):
                begin = tuple(part[d] for part in state)
                out_NH, end = recurrence(u_NG, sizes, begin)
                if self.recorder is not None:
                    self.recorder(self._names[d], torch.cat([begin[0], out_NH]))
                y_NH = out_NH if y_NH is None else y_NH + out_NH
                ends.append(end)
            assert y_NH is not None
            y_BTH = y_NH.unflatten(0, (steps, streams)).transpose(0, 1)
        after = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        return tuple(without_gradient(tensor, u_BTG, *state) for tensor in (y_BTH, *after))

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """y_BTH and the state."""
        u_BTG, _, *state = inputs
        return [u_BTG.new_empty(*u_BTG.shape[:2], self.hidden_size), *(torch.empty_like(part) for part in state)]

    @property
    def _names(self) -> list[str]:
        return ["weight_hh", "weight_hh_reverse"][: 2 if self.bidirectional else 1]

    def _recurrences(self, u_BTG: Tensor) -> list[Recurrence]:
        key = (u_BTG.device, u_BTG.dtype)
        if key not in self._ready:
            ready = []
            for d, name in enumerate(self._names):
                # The product with the input is not the kernel's; what it has no use for is any matrix of these rows.
                matrix = self._matrix(name)
                weights = LayerWeights(self.cell, matrix, matrix, reverse=d == 1)
                self._check(weights, u_BTG, len(u_BTG))
                ready.append(self.kernel.recurrence(weights, *key))
            self._ready[key] = ready
        found: list[Recurrence] = self._ready[key]
        return found

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """``Recurring``."""
        return Recurring, {name: getattr(self, name) for name in ("cell", "hidden_size", "bidirectional")}

    def extra_repr(self) -> str:
        """The cell, and what was chosen for it."""
        return "\n".join(filter(None, (f"{self.cell}, {self.hidden_size}", super().extra_repr())))
