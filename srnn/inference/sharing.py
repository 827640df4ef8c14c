"""What layers of a network share stays shared when they are replaced: packed weights, and biases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor, nn

from srnn.inference.base import SparseModule
from srnn.inference.packed_weight import PackedWeight, Tied

Copies = dict[int, tuple[Tensor, Tensor]]  # id of a dense layer's bias -> itself, and that of sparse modules


def own_copy(bias: Tensor, copies: Copies) -> Tensor:
    """A bias for sparse modules to hold: the same for all whose dense layers share it.

    Args:
        bias: of a dense layer.
        copies: those of the same network until now; added to.
    """
    if id(bias) not in copies:
        copies[id(bias)] = bias, bias.detach().float().clone()  # the first keeps its id from being another's
    return copies[id(bias)][1]


def share_packed(network: nn.Module, of_dense: Mapping[int, nn.Parameter]) -> None:
    """Make one packed weight of those that hold the same tensors, as a shared parameter is one: so it stays shared when
    the network is moved, copied or pickled. Modules that hold the same bias know of each other.

    Args:
        network: with sparse modules.
        of_dense: id of a sparse module's bias -> the parameter of a dense module that it stands for, too. It takes its
            place, and needs no gradient from now on: none flows through sparse modules.
    """
    first: dict[tuple[int, int], PackedWeight] = {}
    modules = [module for module in network.modules() if isinstance(module, SparseModule)]
    for module in modules:
        for name, bias in module._buffers.items():
            parameter = of_dense.get(id(bias))
            if bias is not None and parameter is not None and parameter.dtype == bias.dtype:
                module._buffers[name] = parameter.requires_grad_(False)
    holders = Counter(id(bias) for module in modules for bias in module._buffers.values() if bias is not None)
    tied = Tied()
    for module in modules:
        for name, child in module._modules.items():
            if isinstance(child, PackedWeight):
                module._modules[name] = first.setdefault((id(child.values), child.gates), child)
        if any(holders[id(b)] > 1 or isinstance(b, nn.Parameter) for b in module._buffers.values()):
            module.tied = tied
        module._own()
        module.watch_shared()
