"""Gradients of pruned weights are zero before anything looks at them.

A norm over all gradients counts those of weights that masks hide: at 80 to 95 % zeros it is two to four times that of
the weights that live, so that clipping by it shortens every step. Masking in the forward pass gives the same gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class GradientMasks:
    """Hooks on parameters that pass each gradient to its owner as soon as it is there, in anyone's loop.

    The owner is held weakly: hooks that outlive it do nothing. torch neither copies nor pickles hooks.

    Args:
        owner: whose method is called.
        mask: the method: called with the parameter's name, and its gradient to mask in place.
    """

    def __init__(self, owner: object, mask: Callable[[Any, str, Tensor], None]) -> None:
        self._owner = weakref.ref(owner)
        self._mask = mask
        self._handles: dict[str, RemovableHandle] = {}

    def attach(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put hooks on those that are trained and have none yet; torch allows none on frozen ones."""
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self._handles:
                self._handles[name] = parameter.register_post_accumulate_grad_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        owner, mask = self._owner, self._mask

        @torch.no_grad()
        def hook(parameter: Tensor) -> None:
            pruner = owner()
            if pruner is not None and parameter.grad is not None:
                mask(pruner, name, parameter.grad)

        return hook

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def mask_gradient(gradient: Tensor, mask: Tensor, bits: Tensor | None) -> None:
    """Zero the gradient of what is pruned.

    Args:
        gradient: of any layout: ``nn.Embedding(sparse=True)`` has some rows of the parameter, with repeats.
        mask: True keeps a weight.
        bits: the mask as integers of the gradient's size, all ones where it keeps a weight; faster on a CPU.
    """
    if gradient.is_sparse:
        gradient._values().masked_fill_(~mask[gradient._indices()[0]], 0)
    elif bits is None:
        gradient.masked_fill_(~mask, 0)
    else:
        gradient.view(bits.dtype).bitwise_and_(bits)
