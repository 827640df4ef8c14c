"""Zeroing what is pruned: weights, averages of them, optimisers' state and gradients, on each device in its own way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from srnn.pruning.masking import GpuMasking, Masked
from srnn.pruning.state_masks import StateMasks, left_unmasked, mask_all, state_beside
from srnn.pruning.watched_masks import WatchedMasks

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Masker:
    """Zeroes all that goes with the weights that masks do not keep. Its owner says when.

    Args:
        parameters: what is pruned, by name.
        masks: bool, of the parameters' shapes, by the same names; True keeps a weight.
        averages: of these parameters, by name; on any device.
        optimizers: whose state is zeroed too.

    Attributes:
        state_on_cpu: what zeroes optimisers' state there, and watches it.
        on_gpu: what zeroes weights and state there, and watches both.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        averages: Mapping[str, Sequence[Tensor]],
        optimizers: Iterable[torch.optim.Optimizer],
    ) -> None:
        self._parameters, self._masks, self._averages, self._optimizers = parameters, masks, averages, optimizers
        self.state_on_cpu, self.on_gpu = StateMasks(), WatchedMasks()
        self._gradients_on_gpu = GpuMasking()
        self._held_bits: dict[tuple[str, int, torch.device], Tensor] = {}
        self._taken: dict[str, Tensor] = {}  # by name, weights as they were before ``take_weights``

    def masks_changed(self) -> None:
        """To be told after new masks were written."""
        self._held_bits.clear()
        self.restart()

    def restart(self) -> None:
        """From now on what is pruned may not be zero."""
        self.state_on_cpu.restart()
        self.on_gpu.restart()

    def mask(self, with_state: bool) -> None:
        """Zero weights and averages after an optimiser's step; where asked to, that optimiser's state.

        What is known to stay zero by itself is only looked at in turn: see ``StateMasks`` and ``WatchedMasks``.
        """
        on_gpu, on_cpu = [], []
        for name in self.on_gpu.due(self._parameters):
            parameter = self._parameters[name]
            weights = [parameter, *self._averages.get(name, ())]
            state = state_beside(self._optimizers, parameter) if with_state else []
            if parameter.is_cuda:
                here = [tensor for tensor in weights + state if tensor.device == parameter.device]
                on_gpu.append((self._masks[name], here))
                # Lightning keeps an average on the CPU unless told otherwise.
                weights, state = [tensor for tensor in weights + state if tensor.device != parameter.device], []
            mask_all((self._bits(name, tensor), tensor) for tensor in weights)
            on_cpu += [(self._bits(name, tensor), tensor) for tensor in state]
        self.state_on_cpu(on_cpu)
        if on_gpu:
            self.on_gpu(on_gpu)

    def mask_written(self) -> list[str]:
        """Zero pruned weights that something else wrote. Returns the names of the parameters it found them in."""
        found = list(left_unmasked(self._parameters, self._masks))
        for _, parameter, pruned in found:
            parameter.masked_fill_(pruned, 0)
        return [name for name, _, _ in found]

    def take_weights(self) -> None:
        """Zero pruned weights before a network trains, and remember what they were."""
        for name, parameter, pruned in left_unmasked(self._parameters, self._masks):
            self._taken[name] = parameter.detach().clone()
            parameter.masked_fill_(pruned, 0)

    def give_back(self) -> None:
        """The weights that ``take_weights`` zeroed, unless others have been loaded since."""
        for name, weight in self._taken.items():
            left = weight.masked_fill(~self._masks[name], 0)
            if torch.equal(self._parameters[name], left):
                self._parameters[name].copy_(weight)
        self.forget_taken()

    def forget_taken(self) -> None:
        """Training has begun: weights are no longer what they were."""
        self._taken.clear()

    def mask_gradient(self, name: str, gradient: Tensor) -> None:
        """Zero the gradient of what is pruned of a parameter, as soon as it is there.

        Args:
            name: of the parameter.
            gradient: of any layout: ``nn.Embedding(sparse=True)`` has some rows of the parameter, with repeats.
        """
        mask = self._masks[name]
        if gradient.device != mask.device:  # the last ``Pruner.step`` refuses
            return
        if gradient.is_sparse:
            _mask_rows(gradient, mask)
        elif mask.is_cuda:
            gradient.masked_fill_(~mask, 0)
        else:
            mask_all([(self._bits(name, gradient), gradient)])

    def mask_gradients_on_gpu(self) -> None:
        """Zero the gradients of what is pruned, of all parameters on a GPU in one launch."""
        masked: list[Masked] = []
        for name, parameter in self._parameters.items():
            gradient, mask = parameter.grad, self._masks[name]
            if gradient is None or not gradient.is_cuda or gradient.device != mask.device:  # as ``mask_gradient``
                continue
            if gradient.is_sparse:
                _mask_rows(gradient, mask)
            else:
                masked.append((mask, (gradient,)))
        if masked:
            self._gradients_on_gpu(masked)

    def _bits(self, name: str, tensor: Tensor) -> Tensor:
        """The mask as numbers of a tensor's size, of all ones where it keeps a weight; held until masks change."""
        key = name, tensor.itemsize, tensor.device
        if key not in self._held_bits:
            self._held_bits[key] = self._masks[name].to(tensor.device, _INTEGERS[tensor.itemsize]).neg_()
        return self._held_bits[key]


def _mask_rows(gradient: Tensor, mask: Tensor) -> None:
    """Zero what is pruned of a sparse gradient."""
    gradient._values().masked_fill_(~mask[gradient._indices()[0]], 0)
