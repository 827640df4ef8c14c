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


class GradientHooks:
    """Hooks on parameters that call their owner when there are gradients, in anyone's loop.

    On a CPU with each as soon as it is there, while it is in the cache. On a GPU once at the end of the backward pass,
    because launches take longer than what they do: before anything after ``backward()`` sees a gradient. Where several
    processes train, also with each, because data parallelism adds them up before the backward pass ends.

    The owner is held weakly: hooks that outlive it do nothing. torch neither copies nor pickles hooks.

    Args:
        owner: whose methods are called.
        mask: called with the owner, a parameter's name, and its gradient to mask in place.
        mask_all: called with the owner, to mask those of all parameters on a GPU.
        cast: called with the owner, a parameter's name, and the dtype it had at first, where it has another now.

    Attributes:
        clip_masks: someone has promised to clip gradients on a GPU before they are used, which masks them.
        unmasked: there have been such gradients since they were clipped.
    """

    def __init__(
        self,
        owner: object,
        mask: Callable[[Any, str, Tensor], None],
        mask_all: Callable[[Any], None],
        cast: Callable[[Any, str, torch.dtype], None],
    ) -> None:
        self._owner = weakref.ref(owner)
        self._mask, self._mask_all, self._cast = mask, mask_all, cast
        self._handles: dict[str, RemovableHandle] = {}
        self.clip_masks = self.unmasked = False
        self._backward = -1  # torch's number of the backward pass whose end is waited for

    def attach(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put hooks on those that are trained and have none yet; torch allows none on frozen ones."""
        for name, parameter in parameters.items():
            if parameter.requires_grad and name not in self._handles:
                self._handles[name] = parameter.register_post_accumulate_grad_hook(self._hook(name, parameter.dtype))

    def _hook(self, name: str, dtype: torch.dtype) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def at_once(parameter: Tensor) -> None:
            pruner = self._owner()
            if pruner is not None and parameter.grad is not None:
                self._mask(pruner, name, parameter.grad)

        def hook(parameter: Tensor) -> None:
            if parameter.dtype != dtype and (pruner := self._owner()) is not None:
                self._cast(pruner, name, dtype)
            backward = torch._C._current_graph_task_id() if parameter.is_cuda else -1  # which is outside of any
            if backward == -1 or _several_processes():
                at_once(parameter)
            elif backward != self._backward:
                self._backward = backward
                # What data parallelism in torch waits for the end by; it has no public name.
                torch.autograd.Variable._execution_engine.queue_callback(self._at_the_end)

        return hook

    @torch.no_grad()
    def _at_the_end(self) -> None:
        if self.clip_masks:
            self.unmasked = True
        elif (pruner := self._owner()) is not None:
            self._mask_all(pruner)

    def were_left(self) -> bool:
        """Whether someone who has promised to clip did not, since the last time this was asked."""
        left, self.unmasked = self.unmasked, False
        return left

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()


def _several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
