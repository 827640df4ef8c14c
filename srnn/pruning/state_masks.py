"""What optimisers keep of pruned weights, on a CPU: masked at each step only where it does not stay zero by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Bits = tuple[Tensor, Tensor]  # a mask as integers, all ones where it keeps a weight, and a tensor of that size


class StateMasks:
    """Zeroes optimisers' tensors where weights are pruned, and looks whether they would stay so.

    Where weight, gradient and state are zero, torch's usual optimisers leave all three at zero: masking state at every
    step is idle. It is not where a loop changes gradients after the backward pass, as gradient noise does, or where an
    optimiser mixes elements or has state that never is zero. So all is masked when the masks have changed, looked
    through at the step after, and from then on one tensor a step, in turn. Once something is found, all is masked at
    each step, for good.
    """

    def __init__(self) -> None:
        self._masked = self._looked = self.leaks = False
        self._turn = 0

    def restart(self) -> None:
        """Masks have changed, or state has been loaded, or gradients were left as they were."""
        self._masked = self._looked = False

    def __call__(self, several: Sequence[Bits]) -> None:
        """After an optimiser's step: the tensors that there are."""
        if not several:
            return
        if self._masked and not self.leaks:
            self._turn += 1
            looked_at = [several[self._turn % len(several)]] if self._looked else several
            self._looked = True
            self.leaks = not all(map(_is_masked, looked_at))
        if self.leaks or not self._masked:
            self._masked = True
            mask_all(several)


def mask_all(several: Iterable[Bits]) -> None:
    """Zero them where their masks do not keep a weight, whatever there was: infinite times zero is NaN.

    It takes 0.26 ms for the weights and Adam state of a GRU 256, products with a mask of floats 0.24, masked_fill 1.16.
    """
    for bits, tensor in several:
        tensor.view(bits.dtype).bitwise_and_(bits)


def left_unmasked(
    parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]
) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
    """The parameters that are not zero where their masks are, by name, each with what is pruned of it, bool."""
    for name, parameter in parameters.items():
        pruned = ~masks[name].to(parameter.device)  # a Trainer moves the model to the CPU in the end
        if bool((parameter[pruned] != 0).any()):
            yield name, parameter, pruned


def _is_masked(one: Bits) -> bool:
    bits, tensor = one
    numbers = tensor.view(bits.dtype)
    return torch.equal(numbers & bits, numbers)


def state_beside(optimizers: Iterable[torch.optim.Optimizer], parameter: nn.Parameter) -> list[Tensor]:
    """The optimisers' tensors that go with a parameter, element for element."""
    state = [value for each in optimizers for value in each.state.get(parameter, {}).values()]
    return [value for value in state if isinstance(value, Tensor) and value.shape == parameter.shape]
