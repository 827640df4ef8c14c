"""Copies of networks in which layers are replaced: hooks, attributes and shared tensors go along."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.prune import BasePruningMethod

from srnn.errors import UserError
from srnn.meta_device import kept_tensors

# What torch keeps beside a module's hooks, such as whether one takes keywords, has the same keys as the hooks.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def replaced(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy in which the modules with these ids are others. What is replaced is not copied first.

    Hooks and the user's own attributes of a replaced module go along. A tensor with history is copied without it.

    Args:
        model: what is copied.
        memo: id of a module of ``model`` -> what stands for it in the copy.

    Raises:
        UserError: a part cannot be copied; names the module that holds it.
    """
    made = dict(memo)
    for tensor in kept_tensors(model):
        if not tensor.is_leaf:  # which torch does not copy
            memo[id(tensor)] = tensor.detach().clone()
    try:
        copied: nn.Module = memo[id(model)] if id(model) in made else copy.deepcopy(model, memo)
        for module in model.modules():
            if id(module) in made:
                _take_along(module, made[id(module)], memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{type(model).__name__} cannot be copied: {error}. Remove that part first.") from error
    return copied.eval()


def set_apart(network: nn.Module, shared: Iterable[Any]) -> nn.Module:
    """A copy that may be called without a trace in buffers and attributes of a network.

    Args:
        network: what is copied.
        shared: what the copy shares with it, as it does all parameters.
    """
    memo: dict[int, Any] = {id(part): part for part in (*network.parameters(), *shared)}
    for tensor in kept_tensors(network):
        if not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        copied: nn.Module = copy.deepcopy(network, memo)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise UserError(f"{type(network).__name__} cannot be copied: {error}. Remove that part first.") from error
    return copied


def _take_along(old: nn.Module, new: nn.Module, memo: dict[int, Any]) -> None:
    for name in _HOOKS:
        setattr(new, name, copy.deepcopy(getattr(old, name), memo))
    for key, hook in list(new._forward_pre_hooks.items()):
        if is_mask(hook):  # the weights were packed with it
            del new._forward_pre_hooks[key]
    taken = vars(new).keys() | new._parameters.keys() | new._buffers.keys() | new._modules.keys()
    for name, value in vars(old).items():
        if not name.startswith("_") and name not in taken and not hasattr(type(new), name):
            object.__setattr__(new, name, copy.deepcopy(value, memo))


def is_mask(hook: object) -> bool:
    """Whether a hook is a mask of ``torch.nn.utils.prune``."""
    return isinstance(hook, BasePruningMethod)
