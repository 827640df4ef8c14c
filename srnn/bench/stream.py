"""The network that ``bench=stream`` times: two layers of GRU 1024, 90 % sparse in 16x1 blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.inference.sparsify import sparsify
from srnn.sparse import Values

SIZE, LAYERS = 1024, 2


class TorchSteps:
    """``nn.GRU``, a step a call."""

    def __init__(self, module: nn.GRU) -> None:
        self.module = module

    def step(self, x_BI: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """One step of B streams."""
        y_TBH, state = self.module(x_BI[None], state)
        return y_TBH[0], state


def networks() -> tuple[dict[str, Any], Tensor]:
    """The networks by name, checked against each other, and inputs [T, 1, I]."""
    generator = torch.Generator().manual_seed(0)
    gru = nn.GRU(SIZE, SIZE, LAYERS).eval()
    with torch.no_grad():
        for weight in gru.parameters():
            if weight.ndim == 2:
                weight.copy_(pruned(weight.shape[0], weight.shape[1], 3, Format(0.9, "16x1", "fp32"), generator))
    gru.requires_grad_(False)
    x_TBI = torch.randn(256, 1, SIZE, generator=generator)
    models: dict[str, Any] = {"nn.GRU": TorchSteps(gru), "best dense": sparsify(gru, kernel="dense")}
    formats: tuple[Values, ...] = ("fp32", "fp16", "int8")
    for values in formats:
        models[f"cpu 16x1 {values}"] = sparsify(gru, "16x1", values, "cpu")
    with torch.inference_mode():
        truth = gru(x_TBI[:8])[0]
        for name, model in models.items():
            state, steps = None, []
            for x_BI in x_TBI[:8]:
                y_BH, state = model.step(x_BI, state)
                steps.append(y_BH)
            error = float((torch.stack(steps) - truth).norm() / truth.norm())
            if not error < (0.05 if "int8" in name else 1e-2 if "fp16" in name else 1e-4):
                raise RuntimeError(f"{name} computes wrong: its error is {error:.1e}")
    return models, x_TBI
