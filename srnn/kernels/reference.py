"""The plain truth: a recurrent layer as its equations say, one step after the other, in any dtype.

Also the loop of the backends that have only products of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from srnn.cells import Cell, cell_step
from srnn.kernels.contract import LayerWeights, Product, Recurrence, State


@dataclass(frozen=True)
class StepLoop(Recurrence):
    """A recurrence of torch operations around a product of any kind."""

    cell: Cell
    product: Product
    new_bias: Tensor | None
    project: Product | None
    reverse: bool

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """One step after the other."""
        sizes = batch_sizes.tolist()
        steps = list(enumerate(u_NG.split(sizes)))
        outputs: list[Tensor] = [u_NG] * len(steps)
        whole = state
        for t, u_BG in reversed(steps) if self.reverse else steps:
            before = tuple(part[: sizes[t]] for part in whole)
            after = cell_step(self.cell, u_BG, self.product(before[0]), before, self.new_bias)
            if self.project is not None:
                after = (self.project(after[0]), after[1])
            outputs[t] = after[0]
            if sizes[t] < whole[0].shape[0]:  # streams that have ended, or have not begun
                after = tuple(torch.cat([new, old[sizes[t] :]]) for new, old in zip(after, whole, strict=True))
            whole = after
        return (torch.cat(outputs) if outputs else u_NG.new_empty(0, whole[0].shape[1])), whole


def run_layer(weights: LayerWeights, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
    """A layer in the dtype of ``x_NI``, float64 for a truth to compare with; as ``Layer.run``."""

    def product_with(weight: Tensor, bias: Tensor | None = None) -> Product:
        weight = weight.to(x_NI.dtype)
        return lambda x: x @ weight.T if bias is None else x @ weight.T + bias.to(x)

    new_bias = weights.new_bias
    recurrence = StepLoop(
        weights.cell,
        product_with(weights.w_hh.to_dense()),
        None if new_bias is None else new_bias.to(x_NI),
        None if weights.w_hr is None else product_with(weights.w_hr.to_dense()),
        weights.reverse,
    )
    return recurrence(product_with(weights.w_ih.to_dense(), weights.input_bias)(x_NI), batch_sizes, state)
