"""What a kernel backend provides."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import nn

from srnn.sparse import ElementMatrix


class Kernel(ABC):
    """A way to run a packed model. Registered as ``@register.kernel("name")``, selected as ``kernel=name``."""

    @abstractmethod
    def supports(self, device: torch.device) -> str | None:
        """None if it runs on this device, else the reason why not."""

    @abstractmethod
    def bind(self, model: nn.Module, matrices: Mapping[str, ElementMatrix], device: torch.device) -> nn.Module:
        """Make ``model``, built dense, run on this backend.

        Args:
            model: the model with its weights.
            matrices: parameter name -> the same weight, packed.
            device: where it has to run.

        Returns:
            A module with the same call and outputs.
        """
