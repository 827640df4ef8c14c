"""``kernel=dense``: torch's own modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from srnn.kernels.contract import Kernel
from srnn.registry import register
from srnn.sparse import ElementMatrix


@register.kernel("dense")
class Dense(Kernel):
    """Unpack to torch's own dense modules: right everywhere, as fast as dense, small only on disk."""

    def supports(self, device: torch.device) -> None:
        """Every device torch runs on."""

    def bind(self, model: nn.Module, matrices: Mapping[str, ElementMatrix], device: torch.device) -> nn.Module:
        """The model itself, moved."""
        return model.to(device)
