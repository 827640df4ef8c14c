"""What ``sparsify``, ``save`` and ``load`` are given, checked before anything is done with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from srnn.errors import UserError
from srnn.kernels.contract import Kernel
from srnn.registry import register


def check_network(value: Any, call: str) -> None:
    """Raise UserError if something is no network, or one without values; ``call`` is what was asked for."""
    if not isinstance(value, nn.Module):
        kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        hint = ": make one first, and load the weights into it" if isinstance(value, type | dict) else ""
        raise UserError(f"{call} wants a network, a torch module, not {kind}{hint}.")
    for name, tensor in (*value.named_parameters(), *value.named_buffers()):
        if is_lazy(tensor):
            raise UserError(f"{call}: {name} has no shape yet, for its layer is lazy: run the network once first.")
        if tensor.is_meta:
            raise UserError(
                f"{call}: {name} has no values, for it is on the meta device: call model.to_empty(device=...) and load "
                f"its weights first."
            )


def check_layouts(network: nn.Module) -> None:
    """Raise UserError if a file cannot hold a tensor of a network because it is none of torch's dense ones."""
    for name, tensor in network.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.layout != torch.strided:
            layout = str(tensor.layout).removeprefix("torch.")
            raise UserError(f"srnn.save: {name} is a {layout} tensor, and a packed file holds dense ones: to_dense().")


def kernel_given(kernel: Any, call: str) -> Kernel:
    """The backend of a name, or the backend that was given. Raises UserError if it is neither."""
    if isinstance(kernel, str):
        kernel = register.rebuild("kernel", {"name": kernel})
    if not isinstance(kernel, Kernel):
        raise UserError(
            f"{call}: kernel={kernel!r} must be one of {', '.join(register.names('kernel'))}, or a Kernel of yours."
        )
    return kernel
