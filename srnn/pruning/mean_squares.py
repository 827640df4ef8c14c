"""Means of squared gradients, as Adam keeps them: a step's gradients are taken in where all of them are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from srnn.pruning.launches import Launches, RecentLaunches, blocks_of, has_triton, put

DECAY = 0.999  # share of itself that a method's mean of squared gradients keeps at a step: Adam's own


def are_finite(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Whether all their gradients are, bool [], one answer a device; nobody waits for it.

    Where one is not, mixed precision skips the step, and a fused optimiser leaves the others as they were scaled.
    """
    places: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in dict.fromkeys(parameters):
        if parameter.grad is not None:
            gradient = parameter.grad.detach()
            one = gradient._values() if gradient.is_sparse else gradient
            if one.numel():
                places.setdefault((one.device, one.dtype), []).append(one)
    answers = []
    for (_, dtype), values in places.items():
        # The root of the sum of squares: on a CPU an eighth of the largest one's time. In 16 bits it would be infinite
        # early; of float64 and complex numbers torch takes it in no narrower type.
        norms = torch._foreach_norm(values, 2, dtype=torch.float32 if dtype.itemsize < 4 else None)
        answers.append(torch.stack(norms).isfinite().all())
    return answers


class MeanSquares:
    """Adds steps to means, for all weights at once: a training loop on a GPU has no time for many launches.

    Args:
        decay: share of itself that a mean keeps at a step.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._recent = RecentLaunches()

    def __reduce__(self) -> tuple[type[MeanSquares], tuple[float]]:
        return MeanSquares, (self.decay,)  # addresses are no good elsewhere

    def __call__(
        self, means: Mapping[str, Tensor], gradients: Mapping[str, Tensor | None], finite: Sequence[Tensor]
    ) -> None:
        """Take in a step.

        Args:
            means: fp32, by name, all on one device.
            gradients: by name, of the same shapes; None, which counts as zeros, of a branch that was not taken.
            finite: whether the step's gradients are, bool []; nothing is taken in where one is not, or there is none.
        """
        if not finite:
            return
        taken = torch.stack(list(finite)).all()
        there = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        if len(there) == len(means) and _lie_alike(means, there):
            self._on_gpu(means, there, taken)
            return
        # In fp32, whatever torch makes of numbers by default: bfloat16 would round 0.999 to 1.
        torch._foreach_mul_(list(means.values()), 1 - (1 - self.decay) * taken.float())
        if there:
            several = [torch.where(taken, gradient.float(), 0.0) for gradient in there.values()]
            torch._foreach_addcmul_([means[name] for name in there], several, several, value=1 - self.decay)

    def _on_gpu(self, means: Mapping[str, Tensor], gradients: Mapping[str, Tensor], taken: Tensor) -> None:
        """In one launch that reads and writes each once."""
        rows = tuple([(mean.numel(), mean.data_ptr(), gradients[name].data_ptr()) for name, mean in means.items()])
        launches, flag = self._recent.get(rows, lambda: self._launches(rows, taken.device))
        flag.copy_(taken)
        launches.run()

    def _launches(self, rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Launches, Tensor]:
        from srnn.pruning.mean_squares_kernel import MEAN_BLOCK, launch_means  # here, because Triton may be missing

        flag = torch.zeros((), dtype=torch.bool, device=device)
        rows = [row for row in rows if row[0]]
        blocks = put(rows, device), *blocks_of([row[0] for row in rows], MEAN_BLOCK, device)
        several = [partial(launch_means, *blocks, flag, self.decay)] if rows else []
        return Launches(several, device), flag


def _lie_alike(means: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> bool:
    """Whether one launch can do all: fp32 on a GPU, in the same order."""
    if not has_triton():
        return False
    return all(mean.shape == gradients[name].shape for name, mean in means.items()) and all(
        one.is_cuda and one.dtype == torch.float32 and one.layout == torch.strided and one.is_contiguous()
        for name, mean in means.items()
        for one in (mean, gradients[name])
    )
