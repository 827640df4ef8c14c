"""What is pruned on a GPU, weights and optimisers' state: masked at each step only where it does not stay zero.

To read all of it takes 2 to 4 % of a training step that is replayed from a CUDA graph: memory is what binds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from srnn.pruning.masking import GpuMasking, Masked

LOOK_EVERY = 4  # steps; what finds a parameter and launches takes 50 us of a host that has a whole step to launch


class WatchedMasks:
    """Zeroes what is pruned on a GPU, and watches whether it would stay so.

    Where weight, gradient and state are zero, torch's usual optimisers leave all three at zero: masking again finds
    nothing to do. It does where a loop changes gradients after the backward pass, as gradient noise does, where
    gradients are not masked, or where an optimiser mixes elements. So all is masked when masks have changed; and
    looked through at the steps after, zeroing what is found, until one look is known to have found nothing. The device
    says so in its own time, and nobody waits for it. From then on one parameter every few steps is looked through, in
    turn. All of them are, where weights or gradients were written more or fewer times than at the step before: by
    someone who sets weights, or a loop that begins to add noise. Once anything was found, all is masked at each step.

    Attributes:
        leaks: whether something was found.
    """

    def __init__(self) -> None:
        self._clear()
        self.leaks = False

    def _clear(self) -> None:
        self._changed = True
        self._masking = GpuMasking(mostly_zero=True)
        self._looking: GpuMasking | None = None
        self._flag: Any = None  # what the device writes and the host reads
        self._looked: Any = None  # an event: the first look since masks changed is over
        self._turn = 0
        self._weights, self._gradients = _Writes(), _Writes()

    def __getstate__(self) -> dict[str, Any]:
        return {"leaks": self.leaks}  # addresses and events are no good elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._clear()
        self.leaks = state["leaks"]

    def restart(self) -> None:
        """Masks have changed, or state has been loaded, or gradients were left as they were."""
        self._changed = True

    def due(self, parameters: Mapping[str, nn.Parameter]) -> Sequence[str]:
        """The names of those to be masked after this step; of those on a CPU all."""
        names = list(parameters)
        as_usual = self._weights.are_as_usual(parameters.values())
        as_usual &= self._gradients.are_as_usual(parameter.grad for parameter in parameters.values())
        looked = self._has_looked()
        if self._flag is not None and self._flag[0]:  # after that question: a look that is over has told
            self.leaks = True
        if self.leaks or self._changed or not as_usual or not looked:
            return names
        self._turn += 1
        one = names[self._turn // LOOK_EVERY % len(names)] if self._turn % LOOK_EVERY == 0 else None
        return [name for name in names if name == one or not parameters[name].is_cuda]

    def _has_looked(self) -> bool:
        """Whether a whole look since masks changed is over, which has found nothing by now."""
        return self._looked is not None and not torch.cuda.is_current_stream_capturing() and bool(self._looked.query())

    def __call__(self, masked: Sequence[Masked]) -> None:
        """Zero these, on GPUs."""
        on_gpu = masked[0][0].is_cuda
        if self._changed or self.leaks or (on_gpu and torch.cuda.is_current_stream_capturing()):
            self._changed, self._looked = False, None
            self._masking(masked)
            return
        if self._looking is None:
            found = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
            self._flag, self._looking = found.numpy(), GpuMasking(mostly_zero=True, found=found, kept=1 << 10)
        if not self._looking(masked):
            self.leaks = True  # some of it cannot be told
        elif self._looked is None:
            self._looked = _now({mask.device for mask, _ in masked})


class _Writes:
    """How often tensors are written in a step, by torch's own count, which starts anew with a new tensor."""

    def __init__(self) -> None:
        self._count = self._each = 0

    def are_as_usual(self, tensors: Iterable[Tensor | None]) -> bool:
        """Whether the count has grown by as much as the last time; by nothing, where each step has new tensors."""
        count = sum([tensor._version for tensor in tensors if tensor is not None])
        each, self._count = count - self._count, count
        usual, self._each = each == self._each, each
        return usual


def _now(devices: set[Any]) -> Any:
    """An event, once these devices have done what they were given; None for several of them."""
    if len(devices) > 1:
        return None
    (device,) = devices
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
