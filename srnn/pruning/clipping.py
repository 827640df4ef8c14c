"""Clipping gradients by the norm of those that are not pruned, which it masks on its way, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from srnn.pruning.gradient_hooks import GradientHooks
from srnn.pruning.launches import Launches, RecentLaunches, blocks_of, has_triton, pointer, put

Gradients = Sequence[tuple[Tensor, Tensor | None]]  # gradients, and the mask of what they are of


def can_clip(gradients: Gradients) -> bool:
    """Whether ``GpuClipping`` can: fp32 on one GPU, in the order of their masks."""
    if not gradients or not has_triton():
        return False
    first = gradients[0][0].device
    return first.type == "cuda" and all(_lies_alike(gradient, mask, first) for gradient, mask in gradients)


def _lies_alike(gradient: Tensor, mask: Tensor | None, device: torch.device) -> bool:
    own = gradient.layout == torch.strided and gradient.dtype == torch.float32 and gradient.is_contiguous()
    return own and gradient.device == device and (mask is None or (mask.is_contiguous() and mask.device == device))


class GpuClipping:
    """``torch.nn.utils.clip_grad_norm_`` of masked gradients, in the two passes over them that it takes unmasked.

    The first reads gradients and masks and writes nothing, the second multiplies and masks. Masking apart would take a
    third pass: 9 bytes a weight, where these take 2 more than torch's own. Where the norm is within bounds, what is
    left is to the bit what masking alone leaves; else the norm is torch's up to rounding.
    """

    def __init__(self) -> None:
        self._recent, self._programs = RecentLaunches(), RecentLaunches()

    def __reduce__(self) -> tuple[type[GpuClipping], tuple[()]]:
        return GpuClipping, ()  # addresses are no good elsewhere

    def __call__(self, gradients: Gradients, max_norm: float) -> Tensor:
        """Clip those that ``can_clip`` accepts, in place. Returns the norm, [], which the next call writes to."""
        own = [(gradient.data_ptr(), gradient.numel(), pointer(mask)) for gradient, mask in gradients]
        launches, found = self._recent.get((max_norm, *own), lambda: self._launches(gradients, max_norm))
        launches.run()
        return found[0]

    def _launches(self, gradients: Gradients, max_norm: float) -> tuple[Launches, Tensor]:
        from srnn.pruning.clipping_kernel import CLIP_BLOCK, launch_clipping  # here, because Triton may be missing

        device = gradients[0][0].device
        found = torch.zeros(2, dtype=torch.float32, device=device)
        rows = [[g.numel(), g.data_ptr(), pointer(mask)] for g, mask in gradients if g.numel()]
        if not rows:
            return Launches([], device), found
        sizes = tuple(row[0] for row in rows)  # which stay as they are where gradients move in memory
        owners, firsts = self._programs.get((device, sizes), lambda: blocks_of(sizes, CLIP_BLOCK, device))
        sums = torch.empty(len(owners), dtype=torch.float32, device=device)
        launch = partial(launch_clipping, put(rows, device), owners, firsts, sums, found, float(max_norm))
        return Launches([launch], device), found


class MaskingClip:
    """Clips gradients by their norm in a loop that does so after each backward pass, and before they are used.

    Those on a GPU are masked here then, and not when the backward pass ends.

    Args:
        hooks: which mask gradients when the backward pass ends.
        parameters: what is pruned, by name.
        masks: by name.
        has_masks: whether gradients are masked at this step.
        mask_all: masks them all, in a pass of its own.
    """

    def __init__(
        self,
        hooks: GradientHooks,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        has_masks: Callable[[], bool],
        mask_all: Callable[[], None],
    ) -> None:
        self._hooks, self._has_masks, self._mask_all = hooks, has_masks, mask_all
        self._pruned = list(parameters.values())
        self._masks = {parameter: masks[name] for name, parameter in parameters.items()}
        self._clipping = GpuClipping()
        hooks.clip_masks = True

    @torch.no_grad()
    def __call__(self, parameters: Iterable[nn.Parameter], max_norm: float) -> None:
        """Clip, as ``torch.nn.utils.clip_grad_norm_`` does."""
        self._hooks.unmasked = False
        given = [parameter for parameter in parameters if parameter.grad is not None]
        if self._has_masks():
            gradients = [(p.grad, self._masks.get(p)) for p in given if p.grad is not None]
            masked = sum(mask is not None for _, mask in gradients)
            if masked == sum(parameter.grad is not None for parameter in self._pruned) and can_clip(gradients):
                self._clipping(gradients, max_norm)
                return
            self._mask_all()
        clip_grad_norm_(given, max_norm)

    def end(self) -> None:
        """Gradients are masked when the backward pass ends again."""
        self._hooks.clip_masks = False
