"""Matrices of a layer that cannot be pruned: parametrised, masked by another tool, quantised, not built yet."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from srnn.errors import UserError

FROZEN = "frozen (requires_grad=False)"


def matrix_names(module: nn.Module) -> list[str]:
    """The names of the matrices that a plain layer of this type has."""
    if isinstance(module, nn.RNNBase):
        return [name for names in module._all_weights for name in names if name.startswith("weight")]
    if isinstance(module, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    # A layer of another kind, which says itself of which type it is, has the names that it has.
    return ["weight"] if type(module).__module__.startswith("torch.") else _own_names(module) or ["weight"]


def _own_names(module: nn.Module) -> list[str]:
    return [name for name in module._parameters if name.startswith("weight_")]


def reason_left_out(module: nn.Module, name: str) -> str | None:
    """Why a matrix of a layer cannot be pruned, and what helps; None where it can be."""
    if parametrize.is_parametrized(module, name):
        kinds = ", ".join(type(each).__name__ for each in module.parametrizations[name])  # type: ignore[index]
        return (
            f"is parametrised ({kinds}): call torch.nn.utils.parametrize.remove_parametrizations(layer, '{name}') first"
        )
    if f"{name}_g" in module._parameters:
        return f"is under weight norm: call torch.nn.utils.remove_weight_norm(layer, '{name}') first"
    # What torch.nn.utils.prune and the old spectral norm train instead. Its zeros are zeros of the weight in use.
    parameter = module._parameters.get(name, module._parameters.get(f"{name}_orig"))
    if parameter is None:
        return "is no parameter of its layer any more"
    if not parameter.is_floating_point():
        return f"is of {parameter.dtype}: prune before quantising"
    return None


def is_half_of_a_norm(module: nn.Module, name: str) -> bool:
    """Whether a parameter is a length or a direction of ``torch.nn.utils.weight_norm``."""
    # Zeros of a direction would be zeros of the weight, but a row of them has no length: the weight is then NaN.
    stem = name[:-2]
    return name.endswith(("_g", "_v")) and f"{stem}_g" in module._parameters and f"{stem}_v" in module._parameters


def check_built(name: str, parameter: nn.Parameter) -> None:
    """Raise UserError if a lazy layer has not seen its first batch, or a weight is on the meta device."""
    if isinstance(parameter, UninitializedParameter):
        raise UserError(f"{name} has no shape yet, for its layer is lazy: run the model on a batch before pruning it.")
    if parameter.is_meta:
        raise UserError(
            f"{name} has no values yet, for it is on the meta device: call model.to_empty(device=...) and load or set "
            f"its weights before pruning it."
        )


def left_out(layers: Iterable[tuple[str, nn.Module]], patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Names of the matrices of these layers that cannot be pruned, each with its reason.

    Args:
        layers: name and module of those that should be pruned.
        patterns: of the scope. What is in a matrix's place, such as ``out.parametrizations.weight.original1``, may be
            named by one; the matrix is then not left out.
    """
    for prefix, module in layers:
        for name in matrix_names(module):
            full = f"{prefix}.{name}".lstrip(".")
            inside = [f"{prefix}.parametrizations.{name}.{each}".lstrip(".") for each in ("original", "original1")]
            if any(fnmatch.fnmatchcase(each, pattern) for each in inside for pattern in patterns):
                continue
            if why := reason_left_out(module, name):
                yield full, why


def warn_of_left_out(layers: Iterable[tuple[str, nn.Module]], patterns: Sequence[str]) -> None:
    """Name every matrix of these layers that is not pruned, and why."""
    if found := list(left_out(layers, patterns)):
        listed = "; ".join(f"{name} {why}" for name, why in found)
        warnings.warn(f"pruning leaves {len(found)} matrices dense: {listed}.", stacklevel=2)
