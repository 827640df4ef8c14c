"""What ``sparsify`` replaces in a network, what it leaves dense, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from srnn.inference.copying import is_mask, replaced
from srnn.inference.modules import SPARSE_KINDS
from srnn.inference.packing import Packer, matrix_gates

FEW_ZEROS = "has too few zeros to be smaller in a sparse format"


@dataclass
class Replacements:
    """Names of modules: those replaced, with their class; those left dense, with the reason; and which were pruned.

    Then those that were sparse before, and those replaced whose weights were float64.
    """

    sparse: dict[str, str] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    pruned: set[str] = field(default_factory=set)
    already: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        # A layer that is the whole network has no name, and is called what it is.
        sparse = [name if name == kind else f"{name} ({kind})" for name, kind in self.sparse.items()]
        dense = [f"{name} ({reason})" for name, reason in self.dense.items()]
        lines = [f"sparse: {', '.join(sparse) or 'nothing'}", f"left dense: {', '.join(dense)}" if dense else ""]
        lines.append(f"sparse before: {', '.join(self.already)}" if self.already else "")
        return "\n".join(line for line in lines if line)

    def warning(self) -> str | None:
        """What its user may not expect: pruned matrices that stay dense, or that nothing was replaced."""
        found = []
        if self.already:
            found.append(
                f"sparsify left {', '.join(self.already)} as is, on the kernel it has, for it is sparse already: "
                f"sparsify the dense network, which srnn.desparsify gives, for another kernel, structure or values."
            )
        if self.wide:
            found.append(
                f"sparsify keeps the float64 weights of {', '.join(self.wide)} in fp32 at most: outputs are as exact "
                f"as these; give inputs in fp32, x.float()."
            )
        left = {name: reason for name, reason in self.dense.items() if name in self.pruned}
        if left:
            found.append(
                "sparsify left dense, though pruned: " + "; ".join(f"{n} {why}" for n, why in left.items()) + "."
            )
        elif not self.sparse and not self.already:
            why = "; ".join(f"{name} {reason}" for name, reason in self.dense.items()) or "it has no matrices"
            found.append(f"sparsify replaced nothing: {why}.")
        return " ".join(found) or None


def unmasked(module: nn.Module) -> nn.Module:
    """The module with the masks of ``torch.nn.utils.prune`` made permanent: a copy, or itself where it has none."""
    masks: list[Any] = [hook for hook in module._forward_pre_hooks.values() if is_mask(hook)]
    if not masks:
        return module
    plain = replaced(module, {})
    for mask in masks:
        prune.remove(plain, mask._tensor_name)
    return plain


def matrices_of(module: nn.Module) -> Mapping[str, Tensor]:
    """The matrices that a module multiplies by, its own and not its children's; parametrised ones as they are used."""
    found = {name: weight for name, weight in module._parameters.items() if weight is not None and weight.ndim == 2}
    if parametrize.is_parametrized(module):
        used: Any = module.parametrizations
        found |= {name: weight for name in used if (weight := getattr(module, name).detach()).ndim == 2}
    return found


def is_layer(module: nn.Module) -> bool:
    """Whether it multiplies by weights of its own: matrices, or those of a convolution, say."""
    own = (weight.ndim > 2 for weight in module._parameters.values() if weight is not None)
    return bool(matrices_of(module)) or any(own)


def has_zeros(module: nn.Module, packer: Packer) -> bool:
    """Whether any of its matrices is smaller for being sparse, not only for its values' width."""
    return any(packer.is_worth(weight, matrix_gates(name, module)) for name, weight in matrices_of(module).items())


def why_dense(module: nn.Module) -> str | None:
    """Why a module has no sparse counterpart; None where it has one."""
    name = type(module).__name__
    if parametrize.is_parametrized(module):
        return "is parametrised: call torch.nn.utils.parametrize.remove_parametrizations first"
    if type(module) not in SPARSE_KINDS:
        base = next((kind.__name__ for kind in SPARSE_KINDS if isinstance(module, kind)), None)
        return f"is a {name}, which " + (
            f"is derived from {base}: only torch's own classes are replaced" if base else "has no sparse counterpart"
        )
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which changes its weights when it is called"
    if "forward" in vars(module):
        return "has a forward of its own"
    own = {"weight", "bias", "weight_hh", "weight_hh_reverse"}
    own = set(module._flat_weights_names) if isinstance(module, nn.RNNBase) else own
    own = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"} if isinstance(module, nn.RNNCellBase) else own
    more = (module._parameters.keys() - own) | module._buffers.keys() | module._modules.keys()
    return f"holds more than torch's layer does: {', '.join(sorted(more))}" if more else None
