"""Clipping gradients by the norm of those that are not pruned, which it masks on its way, on a GPU.

Means of their squares, which a method may keep, take them in there too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from srnn.pruning.gradient_hooks import GradientHooks
from srnn.pruning.launches import Launches, RecentLaunches, blocks_of, has_triton, pointer, put
from srnn.pruning.mean_squares import DECAY

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

    def __call__(self, gradients: Gradients, max_norm: float, means: Sequence[Tensor | None] = ()) -> Tensor:
        """Clip those that ``can_clip`` accepts, in place.

        Args:
            gradients: and their masks.
            max_norm: the largest norm.
            means: of squared gradients, which take in what is left where the norm is finite: one for each of the
                gradients, like it, or None; nothing for none at all.

        Returns:
            The norm, [], which the next call writes to.
        """
        several = zip(gradients, means or [None] * len(gradients), strict=True)
        rows = tuple([(g.numel(), g.data_ptr(), pointer(mask), pointer(mean)) for (g, mask), mean in several])
        device = gradients[0][0].device
        launches, found = self._recent.get((max_norm, *rows), lambda: self._launches(rows, max_norm, device))
        launches.run()
        return found[0]

    def _launches(
        self, rows: Sequence[Sequence[int]], max_norm: float, device: torch.device
    ) -> tuple[Launches, Tensor]:
        from srnn.pruning.clipping_kernel import CLIP_BLOCK, launch_clipping  # here, because Triton may be missing

        found = torch.zeros(2, dtype=torch.float32, device=device)
        rows = [row for row in rows if row[0]]
        if not rows:
            return Launches([], device), found
        sizes = tuple(row[0] for row in rows)  # which stay as they are where gradients move in memory
        owners, firsts = self._programs.get((device, sizes), lambda: blocks_of(sizes, CLIP_BLOCK, device))
        sums = torch.empty(len(owners), dtype=torch.float32, device=device)
        decay = DECAY if any(row[3] for row in rows) else None
        launch = partial(launch_clipping, put(rows, device), owners, firsts, sums, found, float(max_norm), decay)
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
        means: of those that it is called with, the means of squared gradients that are to take in this step's.
    """

    def __init__(
        self,
        hooks: GradientHooks,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        has_masks: Callable[[], bool],
        mask_all: Callable[[], None],
        means: Callable[[Collection[nn.Parameter]], Mapping[nn.Parameter, Tensor]],
    ) -> None:
        self._hooks, self._has_masks, self._mask_all, self._means = hooks, has_masks, mask_all, means
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
                # A graph that is captured here would go on writing to means, and nobody would be told.
                means = {} if torch.cuda.is_current_stream_capturing() else self._means(given)
                self._clipping(gradients, max_norm, [means.get(parameter) for parameter in given])
                return
            self._mask_all()
        clip_grad_norm_(given, max_norm)

    def end(self) -> None:
        """Gradients are masked when the backward pass ends again."""
        self._hooks.clip_masks = False
